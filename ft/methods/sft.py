"""Supervised fine-tuning: predict the tokens that the mask marks. The smallest method; read it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import frozen

from ft import losses
from ft.types import Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class SFT:
    """Maximise the likelihood of the trained tokens, averaged over all of a step's tokens on all ranks."""

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        assert ctx.data is not None
        return ctx.data.draw(step, ctx.examples, ctx.seed)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        return batch

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        return losses.nll(logprobs.logp_T, batch.mask_T, tokens=counts.tokens)
