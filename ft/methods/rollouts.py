"""What methods on sampled answers share: from prompts to scored groups, and the weights that make up for a sampler.

Shapes: S answers, T positions of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, field, frozen, validators

from ft.rollout.facts import Groups, facts, varied
from ft.types import Batch, Context, Counts, Example, LogProbs, Rollout

if TYPE_CHECKING:
    from torch import Tensor

_positive = validators.gt(0.0)


@frozen(kw_only=True)
class RewardFunction:
    """A function that scores answers: ``def reward(completions, **columns) -> list[float | None]``.

    ``completions`` are texts; the row's other columns come as lists of the same length, with ``prompts`` (lists of
    messages) and ``completion_ids``. None leaves an answer out. A call has some of a step's answers, often those to one
    prompt: a score must not depend on which others are there.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    """What its scores are multiplied by before they are added up."""
    options: dict[str, Any] = field(factory=dict)
    """More named arguments for it."""
    messages: bool = False
    """Give it each completion as a list of one message, as some libraries' reward functions expect."""

    @property
    def short(self) -> str:
        """Its name in logs, and among the parts of a reward."""
        return self.function.__name__


def as_rewards(value: Any) -> tuple[RewardFunction, ...]:
    """One function or RewardFunction, or several of either."""
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(RewardFunction(function=item) if callable(item) else item for item in items)


def _under_cap(correction: Correction, attribute: Any, value: float) -> None:
    if value > correction.cap:
        raise ValueError(f"'floor' must be at most cap={correction.cap:g}")


@frozen(kw_only=True)
class Correction:
    """Weights that make up for a sampler whose log-probs are not the trainer's (``ft.losses.importance``)."""

    level: Literal["token", "sequence", "geometric"] = "token"
    """What is compared: each token, a whole answer, or an answer's mean token."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Whether an outlier's weight is held at the limit, or becomes 0."""
    cap: float = field(default=2.0, validator=_positive)
    """Upper limit of a weight."""
    floor: float | None = field(default=None, validator=validators.optional(validators.and_(_positive, _under_cap)))
    """Lower limit; None has none."""
    sequence_kl: float | None = field(default=None, validator=validators.optional(_positive))
    """Leave out answers below their group's mean from which the policy has moved farther than this, per token."""


# Groups ---------------------------------------------------------------------------------------------------------------

Asking = Callable[[int, int], list[Example]]
"""(batch, turn) -> the prompts of that batch, each a group of its own; other prompts in each turn."""


@frozen(kw_only=True, eq=False)
class Drawn:
    """Scored groups of a step: those to train, and all that were sampled, with their rewards as scored."""

    groups: Groups
    every: Groups


def drawn(
    batch: int,
    step: int,
    ctx: Context,
    n: int,
    *,
    again: int = 0,
    shape: Callable[[Groups], Any],
    prompts: Asking,
) -> Drawn:
    """Groups of ``n`` answers to a batch of prompts, sampled from the policy as it is after ``step`` steps and scored.

    Groups whose answers were all scored alike teach nothing. Up to ``again`` more times as many prompts are drawn in
    their place, and what is left over is left out; all that was sampled is told in the numbers.

    Args:
        shape: changes rewards before they are looked at.
        prompts: which are asked.
    """
    timed: dict[str, float] = {"generate_s": 0.0, "score_s": 0.0}
    scored = _scored(batch, step, ctx, n, 0, timed, prompts)
    found = shape(scored)
    every, good = list(found), [group for group in found if varied(group)]
    for turn in range(1, again + 1):
        if len(good) >= len(found):
            break
        scored = [*scored, *_scored(batch, step, ctx, n, turn, timed, prompts)]
        more = shape(scored[len(every) :])
        every, good = [*every, *more], [*good, *(group for group in more if varied(group))]
    ctx.note({**facts(every, step=step), **timed})
    ctx.show(step, [rollout for group in every for rollout in group])
    if not again:
        return Drawn(groups=found, every=scored)
    kept = good[: len(found)]
    ctx.note({"groups_drawn": len(every), "groups_kept": len(kept)})
    return Drawn(groups=kept or found, every=scored)


def _scored(
    batch: int, step: int, ctx: Context, n: int, turn: int, timed: dict[str, float], prompts: Asking
) -> list[list[Rollout]]:
    assert ctx.judge is not None
    began = time.perf_counter()
    groups = _answers(batch, step, ctx, n, turn, prompts)
    sampled = time.perf_counter()
    flat = ctx.judge.score([rollout for group in groups for rollout in group])
    timed["generate_s"] += sampled - began
    timed["score_s"] += time.perf_counter() - sampled
    return [flat[i : i + n] for i in range(0, len(flat), n)]


def _answers(batch: int, step: int, ctx: Context, n: int, turn: int, prompts: Asking) -> list[list[Rollout]]:
    """The first draw may have been made ahead, and then others are made ahead in its place."""
    sampler: Any = ctx.sampler
    if turn:
        return sampler.rollout(prompts(batch, turn), n, step)
    if not ctx.ahead:
        sampler.sync(step)
        return sampler.rollout(prompts(batch, turn), n, step)
    if step and not sampler.has(batch):
        ctx.say(f"rollouts that were drawn ahead of step {step + 1} are drawn again, by the policy as it is now")
    sampler.sync(step)
    for later in range(batch, batch + ctx.ahead + 1):
        if not sampler.has(later):
            sampler.begin(later, prompts(later, 0), n, step)
    return sampler.take(batch)


# The policy that ratios are taken to ----------------------------------------------------------------------------------


def with_old(examples: Sequence[Example], ctx: Context, temperature: float, *, top: float | None) -> list[Example]:
    """With the policy's own log-probs as it is now, to be kept for several steps.

    Args:
        top: keep, in the policy loss, the share of the step's trained tokens at which the policy is least decided
            (the threshold is one of the whole step, however it is split).
    """
    import numpy as np
    import torch

    from ft.losses import entropy

    assert ctx.score is not None, "a session gives it"
    said = ctx.score(examples, temperature=temperature)
    found = [evolve(e, old_logp_L=s.logp_L) for e, s in zip(examples, said, strict=True)]
    if top is None or not found:
        return found
    entropy_T = torch.from_numpy(np.concatenate([s.entropy_L for s in said]))
    mask_T = torch.from_numpy(np.concatenate([_trained(e) for e in examples]))
    keep_T = entropy.top(entropy_T, mask_T, fraction=top).float().numpy()
    pieces = np.split(keep_T, np.cumsum([len(e) for e in examples])[:-1])
    return [evolve(e, keep_L=piece) for e, piece in zip(found, pieces, strict=True)]


def _trained(example: Example) -> Any:
    """The mask, and False for the first token, which nothing predicts."""
    mask_L = example.mask_L.copy()
    mask_L[:1] = False
    return mask_L


def old_logps(logp_T: Tensor, batch: Batch, old: str) -> Tensor | None:
    """What ratios are taken to: the policy before the first step on these answers, or what the sampler said.

    Where the sampler said nothing (NaN) the policy as it is takes its place: a ratio of 1.
    """
    import torch

    if old == "trainer" or batch.sampled_logp_T is None:
        return batch.old_logp_T
    return torch.where(batch.sampled_logp_T.isnan(), logp_T.detach(), batch.sampled_logp_T)


def filled(batch: Batch, logp_T: Tensor, *, keep: bool) -> Batch:
    """An idle rank's filler with the streams of the others' batches, so that all ranks have the same numbers to add."""
    if batch.lengths:
        return batch
    zeros_T = logp_T.detach() * 0
    return evolve(batch, adv_T=zeros_T, sampled_logp_T=zeros_T, keep_T=zeros_T if keep else None)


# Importance -----------------------------------------------------------------------------------------------------------


def importance(logp_T: Tensor, adv_T: Tensor, batch: Batch, correction: Correction | None) -> dict[str, Tensor]:
    """``is_weight_T`` and ``keep_T`` of the loss: what makes up for the sampler's own log-probs."""
    kept = {} if batch.keep_T is None else {"keep_T": batch.keep_T}
    if correction is None or batch.sampled_logp_T is None:
        return kept
    from ft.losses import importance as make

    ours_T = logp_T if batch.old_logp_T is None else batch.old_logp_T
    is_weight_T = make.weights(
        ours_T, batch.sampled_logp_T, batch.mask_T, batch.seq_T,
        level=correction.level, mode=correction.mode, cap=correction.cap, floor=correction.floor,
    )  # fmt: skip
    if correction.sequence_kl is not None:
        near_T = make.keep_by_kl(
            logp_T, batch.sampled_logp_T, adv_T, batch.mask_T, batch.seq_T, threshold=correction.sequence_kl
        ).float()
        kept = {"keep_T": near_T * kept.get("keep_T", 1.0)}
    return {"is_weight_T": is_weight_T, **kept}


def mismatch(logprobs: LogProbs, batch: Batch, counts: Counts) -> dict[str, Tensor]:
    """How far trainer and sampler are apart, and how spread the policy is: means over the step's trained tokens."""
    import torch

    from ft.losses.reduce import share

    assert logprobs.entropy_T is not None
    sums = {"entropy": share(logprobs.entropy_T.sum(), counts.tokens)}
    if batch.sampled_logp_T is not None:
        ours_T = logprobs.logp_T.detach() if batch.old_logp_T is None else batch.old_logp_T
        known_T = batch.mask_T & ~batch.sampled_logp_T.isnan()
        gap_T = torch.where(known_T, ours_T - batch.sampled_logp_T, 0.0).clamp(-20, 20)
        sums["mismatch_kl"] = share((gap_T.expm1() - gap_T).sum(), counts.tokens)
    return sums


def undecided(logp_T: Tensor, entropy_T: Tensor, mask_T: Tensor, tokens: Any) -> Tensor:
    """This micro-batch's share of the mean entropy, 0-d, with the score function's gradient.

    Its slope by logp is -logp - H at each token: over tokens drawn from the policy that is on average the gradient of
    H, and needs no gradient through a whole vocabulary. Williams and Peng, 1991.
    """
    import torch

    from ft.losses.reduce import share

    surprise_T = torch.where(mask_T, -logp_T.detach() - entropy_T, 0.0)
    scored_T = surprise_T * torch.where(mask_T, logp_T, 0.0)
    return share((scored_T - scored_T.detach() + torch.where(mask_T, entropy_T, 0.0)).sum(), tokens)
