"""Odds ratio preference optimisation: learn the chosen answer, and raise its odds over the rejected one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import field, frozen, validators

from ft import losses
from ft.methods import pairs
from ft.types import Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class ORPO:
    """Likelihood of the chosen answers (a mean over their tokens) and an odds ratio (a mean over pairs). No reference.

    Formula and source: ``ft.losses.orpo``.
    """

    beta: float = field(default=0.1, validator=validators.ge(0.0))
    """Weight of the odds ratio term (the paper's lambda)."""

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        return pairs.draw(step, ctx)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        pairs.check(batch)
        return pairs.weigh_chosen(batch)

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        chosen_P, _ = pairs.sums(logprobs.logp_T, batch)
        out = losses.orpo(
            *pairs.means(logprobs.logp_T, batch),
            beta=self.beta,
            sft_P=chosen_P,
            tokens=counts.ce_tokens,
            units=counts.units,
        )
        return pairs.with_lengths(out, batch, counts)
