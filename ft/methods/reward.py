"""A reward model: a score for each answer, higher for the better one of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from attrs import field, frozen, validators

from ft import losses
from ft.methods import pairs
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class Reward:
    """The Bradley-Terry model of preferences on the scores of pairs, averaged over all of a step's pairs on all ranks.

    The score of an answer stands at the last token of its whole row that is not padding, where transformers'
    ``...ForSequenceClassification`` reads it, which loads what is saved. Formula and sources:
    ``ft.losses.bradley_terry``.
    """

    centring: float = field(default=0.0, validator=validators.ge(0.0))
    """Weight of the square of a pair's summed scores, which keeps them near 0; 0.01 is usual."""
    margin: bool = False
    """Ask of each pair the margin in its row (`margin`, or `score_chosen` - `score_rejected`)."""

    @property
    def asks(self) -> Asks:
        return Asks(head="score")

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        padding = _padding(ctx)
        return [at_last_token(example, padding) for example in pairs.draw(step, ctx, margin=self.margin)]

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        pairs.check(batch)
        return batch

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert logprobs.score_TC is not None
        margin = None if batch.margin_S is None or not self.margin else pairs.split(batch.margin_S)[0]
        chosen_P, rejected_P = pairs.sums(logprobs.score_TC[:, 0], batch)  # one position of each answer is scored
        return losses.bradley_terry(chosen_P, rejected_P, margin=margin, centring=self.centring, units=counts.units)


def _padding(ctx: Context) -> int | None:
    from ft.data.tokenizer import padding

    return None if ctx.tokenizer is None else padding(ctx.tokenizer)


def at_last_token(example: Example, padding: int | None) -> Example:
    """The example marked at its last token that is not ``padding``, and nowhere else.

    What comes after that token is left out. A batch forwards all tokens but the last, so one more is put behind it,
    of which nothing is learnt.
    """
    import numpy as np

    tokens_L = example.tokens_L
    real = np.flatnonzero(tokens_L != padding) if padding is not None else np.arange(len(tokens_L))
    length = int(real[-1]) + 1 if real.size else 1  # transformers reads the first token of nothing but padding
    tokens_L = np.append(tokens_L[:length], tokens_L[length - 1])
    return attrs.evolve(example, tokens_L=tokens_L, mask_L=np.arange(length + 1) == length)
