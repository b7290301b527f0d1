"""Supervised fine-tuning: predict the tokens that the mask marks. The smallest method; read it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from attrs import field, frozen, validators

from ft import losses
from ft.types import Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class SFT:
    """Maximise the likelihood of the trained tokens, averaged over all of a step's tokens on all ranks."""

    kind: Literal["nll", "dft"] = field(default="nll", validator=validators.in_(("nll", "dft")))
    """nll: the negative log-likelihood; dft: each token's share weighs its own probability (dynamic fine-tuning)."""

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        assert ctx.data is not None
        return ctx.data.draw(step, ctx.examples, ctx.seed)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        return batch

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        loss = losses.nll if self.kind == "nll" else losses.dft
        return loss(logprobs.logp_T, batch.mask_T, tokens=counts.tokens)
