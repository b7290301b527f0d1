"""What a row becomes, whatever its format: frozen values, from which ``ft.data.render`` makes examples."""

from __future__ import annotations

import numpy as np
from attrs import frozen

from ft.data.messages import Conversation


@frozen(kw_only=True)
class Segments:
    """Stretches of text, each with its own mask; no template touches them.

    ``whole`` rows (prompt and completion) are a document, which the end-of-sequence token closes where
    `Data.append_eos` says so; `segments` rows hold the special tokens they want.
    """

    parts: tuple[tuple[str, bool], ...]
    whole: bool = False


@frozen(kw_only=True)
class Text:
    """A plain document: every token is trained."""

    text: str


@frozen(kw_only=True, eq=False)
class Tokens:
    """A row that is tokens already, padding removed; no mask trains all of them."""

    input_ids: np.ndarray  # int32, L
    mask: np.ndarray | None = None  # bool, L


@frozen(kw_only=True)
class Pair:
    """Two answers to one prompt, each with that prompt before it; only the answers are trained."""

    chosen: Conversation | Segments
    rejected: Conversation | Segments
    margin: float | None = None  # how much better the chosen answer is


@frozen(kw_only=True)
class Labelled:
    """One answer after its prompt, and whether it is a good one; only the answer is trained."""

    answer: Conversation | Segments
    good: bool


@frozen(kw_only=True)
class Steps:
    """An answer in steps, with a judgement of each from 0 (bad) to 1 (good); each is judged at its last token.

    The prompt is text, which no template touches, or a conversation that the assistant's turn goes on from.
    """

    prompt: Conversation | str
    steps: tuple[str, ...]
    labels: tuple[float, ...]


Single = Conversation | Segments | Text | Tokens
"""A value that is one example."""

Value = Single | Pair | Labelled | Steps
