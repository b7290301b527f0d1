"""Group relative policy optimisation: sample answers, score them, raise those above their group's mean.

With the options of ``ft.losses.grpo`` this is GRPO, DAPO, Dr. GRPO or GSPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from attrs import Attribute, evolve, field, frozen, validators

from ft import losses
from ft.methods import rollouts
from ft.recipe.parts import Sampling
from ft.rollout.facts import facts
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput

Advantage = Literal["group_zscore", "group_mean", "leave_one_out", "opo", "maxrl"]
_positive = validators.gt(0.0)


@frozen(kw_only=True)
class Correction:
    """Weights that make up for a sampler whose log-probs are not the trainer's (``ft.losses.importance``)."""

    level: Literal["token", "sequence", "geometric"] = "token"
    """What is compared: each token, a whole answer, or an answer's mean token."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Whether an outlier's weight is held at the limit, or becomes 0."""
    cap: float = field(default=2.0, validator=_positive)
    """Upper limit of a weight."""
    floor: float | None = field(default=None, validator=validators.optional(_positive))
    """Lower limit; None has none."""
    sequence_kl: float | None = field(default=None, validator=validators.optional(_positive))
    """Leave out answers below their group's mean from which the policy has moved farther than this, per token."""


def _untruncated(method: GRPO, attribute: Attribute[Any], value: Correction | None) -> None:
    if value is not None and method.sampling.truncates:
        raise ValueError(
            "'correction' compares log-probs over the whole vocabulary, which sampling with top_p, top_k or min_p has "
            "not: leave those alone, or set correction=None"
        )


@frozen(kw_only=True)
class GRPO:
    """Answers to prompts, scored by ``rewards``, trained by a clipped policy gradient. Formulas: ``ft.losses.grpo``.

    A step takes ``batch.examples`` prompts and samples ``group`` answers to each.
    """

    rewards: tuple[rollouts.RewardFunction, ...] = field(converter=rollouts.as_rewards, validator=validators.min_len(1))
    """What scores an answer; the weighted sum counts."""
    group: int = field(default=8, validator=validators.ge(1))
    """Answers to each prompt."""
    sampling: Sampling = field(factory=Sampling)
    """How they are drawn."""
    advantage: Advantage = field(default="group_zscore", validator=validators.in_(get_args(Advantage)))
    """How rewards become advantages (``ft.losses.advantage``)."""
    level: Literal["token", "sequence"] = "token"
    """Of the ratio that is clipped; sequence is GSPO."""
    clip: tuple[float, float] = (0.2, 0.2)
    """How far the ratio may fall and rise before it stops counting."""
    dual_clip: float | None = field(default=None, validator=validators.optional(validators.gt(1.0)))
    """Most that a ratio counts where the advantage is negative."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens (DAPO), over answers (GRPO), or a sum over sampling.max_tokens (Dr. GRPO)."""
    kl: float = field(default=0.0, validator=validators.ge(0.0))
    """Weight of the divergence from the reference; 0 needs no reference."""
    correction: Correction | None = field(default=Correction(), validator=_untruncated)
    """Importance weights against the sampler's own log-probs; None trusts the sampler."""
    truncated: bool = True
    """Train answers that were cut off at sampling.max_tokens."""

    @property
    def asks(self) -> Asks:
        return Asks(
            rows="prompts",
            entropy=True,
            temperature=self.sampling.temperature,
            reference="logps" if self.kl else "none",
        )

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        groups = rollouts.scored(step, ctx, self.group)
        ctx.note(facts(groups))
        return rollouts.to_examples(groups, self.advantage, truncated=self.truncated, tokens=ctx.tokens)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        if not self.kl:
            return batch
        from ft.models.reference import reference_logps

        return evolve(batch, ref_logp_T=reference_logps(policy, batch, temperature=self.sampling.temperature))

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert logprobs.entropy_T is not None
        adv_T = batch.adv_T if batch.adv_T is not None else logprobs.logp_T.detach() * 0
        weights: Any = rollouts.importance(logprobs.logp_T.detach(), adv_T, batch, self.correction)
        out = losses.grpo(
            logprobs.logp_T,
            batch.old_logp_T,
            adv_T,
            batch.mask_T,
            seq_T=batch.seq_T,
            level=self.level,
            clip=self.clip,
            dual_clip=self.dual_clip,
            aggregate=self.aggregate,
            constant=self.sampling.max_tokens if self.aggregate == "constant" else None,
            ref_logp_T=batch.ref_logp_T,
            kl_coef=self.kl,
            **rollouts.denominators(self.aggregate, counts),
            **weights,
        )
        more = rollouts.mismatch(logprobs, batch, counts)
        return evolve(out, sums={**out.sums, **more})
