"""Group relative policy optimisation: sample answers, score them, raise those above their group's mean.

With its options this is GRPO, DAPO, Dr. GRPO, GSPO, RLOO, REINFORCE++ and what else ``ft.methods.objectives`` and
``ft.methods.credit`` name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

from attrs import evolve, field, frozen, validators

from ft import losses
from ft.methods import credit, curriculum, replay, rollouts
from ft.methods.credit import Advantage, Overlong
from ft.methods.curriculum import Curriculum, Reroll
from ft.methods.objectives import CISPO, DPPO, GMPO, LUSPO, RLOO, SAPO, VESPO, Clipped, Reinforce
from ft.methods.replay import Replay
from ft.methods.rollouts import Correction, Drawn
from ft.recipe.online import Sampling
from ft.rollout.facts import Groups, varied
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput

_natural = validators.ge(0.0)
_STORE = "grpo"


def _corrected(method: GRPO, attribute: Any, value: Correction | None) -> None:
    if value is not None and method.sampling.truncates:
        raise ValueError(
            "'correction' compares log-probs over the whole vocabulary, which sampling with top_p, top_k or min_p has "
            "not: leave those alone, or set correction=None"
        )
    if value is not None and isinstance(method.objective, VESPO) and value.level != "token":
        raise ValueError("'correction' must have level='token' with VESPO, which multiplies the weights of tokens")


def _old(method: GRPO, attribute: Any, value: str) -> None:
    if value == "sampler" and method.correction is not None:
        raise ValueError("'old' must be 'trainer' with a correction: ratios to the sampler need none, set it to None")
    if value == "sampler" and method.sampling.truncates:
        raise ValueError("'old' must be 'trainer' with top_p, top_k or min_p, whose log-probs are not the policy's")
    if value == "sampler" and isinstance(method.objective, Reinforce):
        raise ValueError("'old' must be 'trainer' with Reinforce, which takes no ratio")
    if value == "trainer" and isinstance(method.objective, DPPO):
        raise ValueError("'old' must be 'sampler' with DPPO, which measures how far the policy is from the sampler")


def _aggregate(method: GRPO, attribute: Any, value: str | None) -> None:
    fitting = method.objective.aggregates
    if value is not None and value not in fitting:
        name = type(method.objective).__name__
        raise ValueError(f"'aggregate' must be {' or '.join(map(repr, fitting))} with {name}, or None")


def _repeated(method: GRPO, attribute: Any, value: int) -> None:
    if value > 1 and isinstance(method.objective, Reinforce):
        raise ValueError("'iterations' must be 1 with Reinforce, which takes no ratio to the policy that was sampled")


def _scaled(method: GRPO, attribute: Any, value: str | None) -> None:
    fitting = credit.SCALES.get(method.advantage, ())
    if value is not None and value not in fitting:
        names = " or ".join(map(repr, fitting)) or "None"
        raise ValueError(f"'scale' must be {names} with advantage={method.advantage!r}")


def _estimated(method: GRPO, attribute: Any, value: str) -> None:
    names = [reward.short for reward in method.rewards]
    if value == "gdpo" and len({*names, credit.OVERLONG}) <= len(names):
        raise ValueError("'rewards' must have different names, other than 'overlong', with advantage='gdpo'")
    if value not in ("reinforce_pp",) and method.group < 2:
        raise ValueError(f"'group' must be at least 2 with advantage={value!r}, which compares answers of one prompt")


def _unbiased(method: GRPO, attribute: Any, value: bool) -> None:
    if value and not method.kl:
        raise ValueError("'kl_corrected' must be False with kl=0: there is nothing to correct")


def _fits(method: GRPO, attribute: Any, value: Overlong | None) -> None:
    if value is not None and value.buffer > method.sampling.max_tokens:
        raise ValueError(f"'overlong' must have a buffer of at most sampling.max_tokens={method.sampling.max_tokens}")


def _replayed(method: GRPO, attribute: Any, value: Replay | None) -> None:
    if value is not None and method.correction is None and method.old == "trainer":
        raise ValueError("'replay' needs a correction, or old='sampler': held answers are an older policy's")


@frozen(kw_only=True)
class GRPO:
    """Answers to prompts, scored by ``rewards``, trained by a policy gradient. Formulas: ``ft.losses``.

    A batch takes ``batch.examples`` prompts and samples ``group`` answers to each.
    """

    rewards: tuple[rollouts.RewardFunction, ...] = field(converter=rollouts.as_rewards, validator=validators.min_len(1))
    """What scores an answer; the weighted sum counts."""
    group: int = field(default=8, validator=validators.ge(1))
    """Answers to each prompt."""
    sampling: Sampling = field(factory=Sampling)
    """How they are drawn."""
    advantage: Advantage = field(
        default="group_zscore", validator=validators.and_(validators.in_(get_args(Advantage)), _estimated)
    )
    """How rewards become advantages (``ft.losses.advantage``); gdpo normalises each reward before they are added."""
    scale: Literal["group", "batch", "none"] | None = field(default=None, validator=_scaled)
    """Whose spread advantages are divided by; None is the estimator's own."""
    overlong: Overlong | None = field(default=None, validator=_fits)
    """Punishment of answers that come near sampling.max_tokens."""
    truncated: bool = True
    """Train answers that were cut off at sampling.max_tokens."""
    resample: int = field(default=0, validator=validators.ge(0))
    """Draw up to this many more batches of prompts in the place of groups whose answers were scored alike."""
    iterations: int = field(default=1, validator=validators.and_(validators.ge(1), _repeated))
    """Steps on each batch of answers. The answers are not in checkpoints: a run that is stopped between these steps
    draws them again and says so; with save.every a multiple of it nothing is drawn twice."""
    objective: Clipped | CISPO | SAPO | GMPO | VESPO | LUSPO | DPPO | Reinforce | RLOO = field(factory=Clipped)
    """The loss, and the options that are its own."""
    aggregate: Literal["token", "sequence", "constant"] | None = field(default=None, validator=_aggregate)
    """Mean over all tokens (DAPO), over answers (GRPO), or a sum over sampling.max_tokens (Dr. GRPO); None is the
    objective's own, for Clipped over tokens."""
    kl: float = field(default=0.0, validator=_natural)
    """Weight of the divergence from the reference (see `reference`); 0 needs no reference."""
    kl_estimator: Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"] = "k3"
    """How it is estimated from the sampled tokens (``ft.losses.kl``)."""
    kl_corrected: bool = field(default=False, validator=_unbiased)
    """Multiply the estimate by the ratio, which makes it unbiased for answers of an older policy."""
    entropy_bonus: float = field(default=0.0, validator=_natural)
    """Weight of the policy's entropy, which is raised; its gradient is estimated from the sampled tokens."""
    top_entropy: float = field(default=1.0, validator=validators.and_(validators.gt(0.0), validators.le(1.0)))
    """Share of a batch's tokens that is trained: those at which the policy is least decided."""
    correction: Correction | None = field(default=Correction(), validator=_corrected)
    """Importance weights against the sampler's own log-probs; None trusts the sampler."""
    old: Literal["trainer", "sampler"] = field(default="trainer", validator=_old)
    """Whose log-probs ratios are taken to: the trainer's before the first step on a batch, or the sampler's as it
    drew the tokens, which saves nothing but counts its age as part of the ratio."""
    curriculum: Curriculum | None = None
    """Choose prompts by how often they were solved; None takes them as the data gives them."""
    reroll: Reroll | None = None
    """Ask prompts again later that no answer solved."""
    replay: Replay | None = field(default=None, validator=_replayed)
    """Hold groups with spread, and train them once more in the place of groups that were scored alike."""

    @property
    def asks(self) -> Asks:
        return Asks(
            rows="prompts",
            entropy=True,
            temperature=self.sampling.temperature,
            reference="logps" if self.kl else "none",
            repeats=self.iterations,
        )

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        batch, turn = divmod(step, self.iterations)
        if ctx.store.get(_STORE, (None, ()))[0] != batch:
            if turn:
                ctx.say(f"the answers of step {step - turn + 1} are no longer there; the policy as it is draws others")
            ctx.store[_STORE] = batch, self._fresh(batch, step, ctx)
        return ctx.store[_STORE][1]

    def _fresh(self, batch: int, step: int, ctx: Context) -> list[Example]:
        past = ctx.kept.get(_STORE, {})
        found = rollouts.drawn(
            batch, step, ctx, self.group, again=self.resample, shape=self._shaped,
            prompts=partial(
                curriculum.prompts_of, ctx=ctx, past=past, curriculum=self.curriculum, reroll=self.reroll
            ),
        )  # fmt: skip
        groups = self._remembered(found, batch, step, ctx, past)
        examples = credit.to_examples(
            groups, self.advantage, scale=self.scale, weights=self._weights(), truncated=self.truncated,
            tokens=ctx.tokens,
        )  # fmt: skip
        top = self.top_entropy if self.top_entropy < 1 else None
        if self.iterations == 1 and top is None:  # the policy as it is
            return examples
        return rollouts.with_old(examples, ctx, self.sampling.temperature, top=top)

    def _remembered(self, found: Drawn, batch: int, step: int, ctx: Context, past: curriculum.Past) -> Groups:
        """The groups to train, held ones among them. What was learnt of prompts and groups is kept."""
        if self.curriculum is None and self.reroll is None and self.replay is None:
            return found.groups
        ctx.note(curriculum.numbers(past, found.every, batch, self.curriculum, self.reroll))
        kept = dict(curriculum.learnt(past, found.every, batch, ctx, self.curriculum, self.reroll))
        groups = found.groups
        if self.replay is not None:
            mixed = replay.mixed(groups, past.get("held", ()), batch, ctx.examples, self.replay)
            groups, with_spread = mixed.groups, [group for group in self._shaped(found.every) if varied(group)]
            kept["held"] = replay.holding(mixed.left, with_spread, batch, self.replay)
            ctx.note(replay.numbers(mixed, kept["held"], step))
        ctx.kept[_STORE] = kept
        return groups

    def _shaped(self, groups: Groups) -> Groups:
        return credit.shaped(groups, self.overlong, self.sampling.max_tokens)

    def _weights(self) -> dict[str, float]:
        weights = {reward.short: reward.weight for reward in self.rewards}
        return weights if self.overlong is None else {**weights, credit.OVERLONG: 1.0}

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        if not self.kl:
            return batch
        from ft.models.reference import reference_logps

        return evolve(batch, ref_logp_T=reference_logps(policy, batch, temperature=self.sampling.temperature))

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert logprobs.entropy_T is not None
        logp_T = logprobs.logp_T
        batch = rollouts.filled(batch, logp_T, keep=self.top_entropy < 1)
        adv_T = batch.adv_T
        assert adv_T is not None
        aggregate = self.aggregate or self.objective.aggregates[0]
        old_T = rollouts.old_logps(logp_T, batch, self.old)
        out = self.objective.loss(
            logp_T,
            old_T,
            adv_T,
            batch.mask_T,
            seq_T=batch.seq_T,
            aggregate=aggregate,
            constant=self.sampling.max_tokens if aggregate == "constant" else None,
            ref_logp_T=batch.ref_logp_T,
            kl_coef=self.kl,
            kl=self.kl_estimator,
            kl_bias_correction=self.kl_corrected,
            tokens=counts.tokens,
            seqs=None if aggregate == "token" else counts.seqs,
            **rollouts.importance(logp_T.detach(), adv_T, batch, self.correction),
        )
        moved = losses.drift(
            logp_T, old_T, batch.mask_T, seq_T=batch.seq_T, level=self.objective.level, tokens=counts.tokens
        )
        sums = {**out.sums, **moved.sums, **rollouts.mismatch(logprobs, batch, counts)}
        out = evolve(out, sums=sums, maxes=moved.maxes)
        if not self.entropy_bonus:
            return out
        bonus = rollouts.undecided(logp_T, logprobs.entropy_T, batch.mask_T, counts.tokens)
        return evolve(out, loss=out.loss - self.entropy_bonus * bonus)
