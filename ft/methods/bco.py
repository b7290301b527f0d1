"""Binary classifier optimisation: tell good answers from bad ones by their reward against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import evolve, field, frozen, validators

from ft import losses
from ft.methods import rated
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class BCO:
    """A logistic loss on beta (log-prob - reference's) above or below the step's mean of it.

    The mean is over all answers of the step on all ranks, known from a forward without gradient: nothing is carried
    from step to step. A pair counts as one good and one bad answer. Formula and source: ``ft.losses.bco``.
    """

    beta: float = field(default=0.1, validator=validators.gt(0.0))
    """Scale of the rewards."""

    asks = Asks(reference="logps")

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        return rated.draw(step, ctx)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        from ft.models.reference import policy_logps, reference_logps

        ref_logp_T = reference_logps(policy, batch)
        reward_S = self.beta * rated.sums(policy_logps(policy, batch) - ref_logp_T, batch)
        return evolve(batch, ref_logp_T=ref_logp_T, baseline_S=reward_S)

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert batch.ref_logp_T is not None
        return losses.bco(
            rated.sums(logprobs.logp_T, batch),
            rated.sums(batch.ref_logp_T, batch),
            rated.good(batch),
            delta=rated.baseline(counts),
            beta=self.beta,
            labels=rated.labels(counts),
            units=counts.seqs,
        )
