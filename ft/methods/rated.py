"""What methods on rated answers share. Shapes: T positions of a batch, S sequences, L tokens of one sequence.

A rated answer is an example with a label, 1 where it is desirable. The two answers of a pair are taken as one desirable
and one undesirable answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from ft.errors import DataError
from ft.types import Batch, Context, Counts, Example, LossOutput

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def draw(step: int, ctx: Context) -> Sequence[Example]:
    """The rated answers of a step.

    Raises:
        DataError: rows that are neither rated answers nor pairs.
    """
    assert ctx.data is not None
    return _labelled(ctx.data.draw(step, ctx.examples, ctx.seed))


def _labelled(examples: Sequence[Example]) -> list[Example]:
    found, seen = [], set[int]()
    for example in examples:
        if example.label is None and example.unit is None:
            raise DataError(
                "this method learns from rated answers, and this row says not whether its answer is a good one",
                where=example.source,
                expected='"label" (true or false), or a pair of answers',
                got="an answer alone",
                fix="give rows a label, or choose another method",
            )
        if example.label is None and example.unit is not None:
            example = attrs.evolve(example, label=float(example.unit not in seen), unit=None, margin=None)
            seen.add(examples[len(found)].unit)  # type: ignore[arg-type]
        found.append(example)
    return found


def mismatch(examples: Sequence[Example]) -> list[Example]:
    """The same examples, each with ``against``: its prompt and the next answer of the step that has another prompt.

    The prompt is what stands before the first trained token. Where all prompts are the same, nothing can be
    mismatched, and ``against`` stays None.
    """
    starts = [_start(example) for example in examples]
    prompts = [prompt(example).tobytes() for example in examples]
    return [
        example if j is None else attrs.evolve(example, against=_joined(example, starts[i], examples[j], starts[j]))
        for i, example in enumerate(examples)
        for j in [_other(prompts, i)]
    ]


def prompt(example: Example) -> np.ndarray:
    """What stands before the first trained token."""
    return example.tokens_L[: _start(example)]


def _start(example: Example) -> int:
    return max(1, int(example.mask_L.argmax()))


def _other(prompts: Sequence[bytes], i: int) -> int | None:
    around = [*range(i + 1, len(prompts)), *range(i)]
    return next((j for j in around if prompts[j] != prompts[i]), None)


def _joined(asked: Example, asked_end: int, said: Example, said_start: int) -> Example:
    import numpy as np

    return Example(
        tokens_L=np.concatenate([asked.tokens_L[:asked_end], said.tokens_L[said_start:]]),
        mask_L=np.concatenate([asked.mask_L[:asked_end], said.mask_L[said_start:]]),
        source=f"{asked.source} with the answer of {said.source}",
    )


def mismatched(batch: Batch) -> Batch:
    """The mismatched answers; a filler where there are none, since ranks must forward equally often."""
    from ft.data.pack import collate

    return collate([]).to(batch.input_T.device) if batch.against is None else batch.against


def sums(x_T: Tensor, batch: Batch) -> Tensor:
    """x_S: the sum of ``x_T`` over each answer. Empty, with a graph, for a filler batch."""
    from ft.data.pack import segment_sum

    return segment_sum(x_T, batch.seq_T, len(batch.lengths))


def good(batch: Batch) -> Tensor:
    """label_S, bool: True where the answer is desirable."""
    if batch.label_S is None:
        return batch.mask_T.new_zeros(len(batch.lengths))
    return batch.label_S > 0.5


def labels(counts: Counts) -> tuple[Any, Any]:
    """The step's numbers of desirable and undesirable answers."""
    return counts.desirable, counts.seqs - counts.desirable


def with_lengths(out: LossOutput, batch: Batch, counts: Counts) -> LossOutput:
    """The same loss, and the mean lengths of desirable and undesirable answers among its numbers."""
    n_S, good_S = sums(batch.mask_T, batch), good(batch)
    n_w, n_l = (_share((n_S * kind_S).sum(), n) for kind_S, n in zip((good_S, ~good_S), labels(counts), strict=True))
    return attrs.evolve(out, sums={**out.sums, "lengths/chosen": n_w, "lengths/rejected": n_l})


def baseline(counts: Counts) -> Any:
    """The step's mean of ``Batch.baseline_S``; 0 where there is none."""
    return _share(counts.baseline, counts.baselines)


def _share(total: Any, count: Any) -> Any:
    return total / (count.clamp(min=1) if hasattr(count, "clamp") else max(1, count))
