"""A prompt that several answers share is forwarded once: cut it off all of them but one.

    whole     [prompt a]         [prompt b]           [prompt c]
    shared    [prompt a]    [last prompt token, b]    [last prompt token, c]

The last token of the prompt stays with each answer, since it predicts the answer's first token. A cut sequence is a
sequence like any other, but for two things: its positions begin at ``shared``, and its attention also sees the first
``shared`` positions of the sequence that kept the prompt (``ft.models.documents``).

Shapes: L tokens of one sequence (ragged).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import attrs
import numpy as np

from ft.types import Example


def share_prompts(examples: Sequence[Example]) -> list[Example]:
    """The same examples, cut where they begin like an earlier one of their unit and nothing of that is trained.

    The order stays as it is, and packing must keep it within units: a cut sequence reads the one before it that is
    whole.
    """
    units: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        if example.unit is not None:
            units.setdefault(example.unit, []).append(i)
    shared = list(examples)
    for places in units.values():
        for i, n in zip(places, _shares([examples[i] for i in places]), strict=True):
            shared[i] = _cut(examples[i], n) if n else examples[i]
    return shared


def _shares(unit: Sequence[Example]) -> list[int]:
    """Positions that each reads of the last one before that reads none.

    One that could be cut stays whole where the next one gains more by it than it loses itself: the first answer to
    another prompt, in a unit of many pairs whose prompts begin alike.
    """
    head, found = unit[0], [0]
    for example, after in zip_longest(unit[1:], unit[2:]):
        n = _common(head, example)
        gain = _common(example, after) - _common(head, after) if after is not None else 0
        found.append(0 if gain > n else n)
        head = example if found[-1] == 0 else head
    return found


def _common(head: Example, example: Example) -> int:
    """Positions of ``head`` that ``example`` can read instead of forwarding them; one of its own is always left."""
    n = min(len(head), len(example)) - 1
    usable_L = (head.tokens_L[:n] == example.tokens_L[:n]) & ~example.mask_L[:n]
    usable_L[:1] = head.tokens_L[:1] == example.tokens_L[:1]  # mask_L[0] is never used
    tokens = n if usable_L.all() else int(np.argmin(usable_L))
    return max(0, tokens - 1)


def _cut(example: Example, n: int) -> Example:
    """``example`` without its first ``n`` tokens, in all that it has per token."""
    streams = {f.name: getattr(example, f.name) for f in attrs.fields(Example) if "_L" in f.name}
    return attrs.evolve(example, shared=n, **{name: x[n:] for name, x in streams.items() if x is not None})
