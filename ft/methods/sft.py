"""Supervised fine-tuning: predict the tokens that the mask marks. The smallest method; read it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from attrs import field, frozen, validators

from ft import losses
from ft.errors import DataError
from ft.types import Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class SFT:
    """Maximise the likelihood of the trained tokens, averaged over all of a step's tokens on all ranks."""

    kind: Literal["nll", "dft"] = field(default="nll", validator=validators.in_(("nll", "dft")))
    """nll: the negative log-likelihood; dft: each token's share weighs its own probability (dynamic fine-tuning)."""

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        assert ctx.data is not None
        return _all_good(ctx.data.draw(step, ctx.examples, ctx.seed))

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        return batch

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        loss = losses.nll if self.kind == "nll" else losses.dft
        return loss(logprobs.logp_T, batch.mask_T, tokens=counts.tokens)


def _all_good(examples: Sequence[Example]) -> Sequence[Example]:
    """Refuse compared and rated answers: the bad ones would be learnt like the good ones."""
    for example in examples:
        if example.unit is not None or example.label is not None or example.label_L is not None:
            raise DataError(
                "this row holds answers that are not to be imitated",
                where=example.source,
                expected="rows of good answers only",
                got=_what(example),
                fix="choose a method that compares, such as DPO, or name the part of the row to train in Source.format "
                "and Source.columns",
            )
    return examples


def _what(example: Example) -> str:
    if example.label_L is not None:
        return "an answer of which each step is judged"
    return "a pair of answers" if example.label is None else "a rated answer"
