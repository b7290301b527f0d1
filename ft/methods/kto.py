"""Kahneman-Tversky optimisation: good and bad answers, each by itself, against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from attrs import evolve, field, frozen, validators

from ft import losses
from ft.methods import rated
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class KTO:
    """Raise good answers above, and bad ones below, what the policy gains on answers that fit no prompt.

    That point of reference is the step's mean log-ratio of policy and reference over each prompt with the answer of
    another one, forwarded without gradient. Averaged over all of a step's answers on all ranks. A pair counts as one
    good and one bad answer. Formula and sources: ``ft.losses.kto``.
    """

    kind: Literal["kto", "apo_zero_unpaired"] = field(
        default="kto", validator=validators.in_(("kto", "apo_zero_unpaired"))
    )
    """apo_zero_unpaired takes 0 as the point of reference, which saves two forwards."""
    beta: float = field(default=0.1, validator=validators.gt(0.0))
    """How strongly the policy is held to the reference."""
    desirable: float = field(default=1.0, validator=validators.ge(0.0))
    """Weight of good answers. desirable x their number should be 1 to 4/3 of undesirable x the bad ones' number."""
    undesirable: float = field(default=1.0, validator=validators.ge(0.0))
    """Weight of bad answers."""

    asks = Asks(reference="logps")

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        drawn = rated.draw(step, ctx)
        return rated.mismatch(drawn) if self.kind == "kto" else drawn

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        from ft.models.reference import policy_logps, reference_logps

        ratio_S = None
        if self.kind == "kto":
            other = rated.mismatched(batch)
            ratio_S = rated.sums(policy_logps(policy, other) - reference_logps(policy, other), other)
        return evolve(batch, ref_logp_T=reference_logps(policy, batch), baseline_S=ratio_S, against=None)

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert batch.ref_logp_T is not None
        out = losses.kto(
            rated.sums(logprobs.logp_T, batch),
            rated.sums(batch.ref_logp_T, batch),
            rated.good(batch),
            kl=rated.baseline(counts) if self.kind == "kto" else None,
            kind=self.kind,
            beta=self.beta,
            desirable=self.desirable,
            undesirable=self.undesirable,
            labels=rated.labels(counts),
            units=counts.seqs,
        )
        return rated.with_lengths(out, batch, counts)
