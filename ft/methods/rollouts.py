"""What methods on sampled answers share: from prompts to scored groups, and from groups to examples.

Shapes: S answers, T positions of a batch, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from ft.rollout.facts import Groups
from ft.types import Batch, Context, Counts, Example, LogProbs, Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from ft.methods.grpo import Correction


@frozen(kw_only=True)
class RewardFunction:
    """A function that scores answers: ``def reward(completions, **columns) -> list[float | None]``.

    ``completions`` are texts; the row's other columns come as lists of the same length, with ``prompts`` (lists of
    messages) and ``completion_ids``. None leaves an answer out.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    """What its scores are multiplied by before they are added up."""
    options: dict[str, Any] = field(factory=dict)
    """More named arguments for it."""


def as_rewards(value: Any) -> tuple[RewardFunction, ...]:
    """One function or RewardFunction, or several of either."""
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(RewardFunction(function=item) if callable(item) else item for item in items)


def scored(step: int, ctx: Context, n: int) -> list[list[Rollout]]:
    """The step's groups: ``n`` answers to each of its prompts, sampled from the policy as it is, and scored."""
    assert ctx.data is not None and ctx.sampler is not None and ctx.judge is not None
    prompts = ctx.data.draw(step, ctx.examples, ctx.seed)
    ctx.sampler.sync(step)
    groups = ctx.sampler.rollout(prompts, n, step)
    flat = ctx.judge.score([rollout for group in groups for rollout in group])
    return [flat[i : i + n] for i in range(0, len(flat), n)]


def to_examples(groups: Groups, advantage: str, *, truncated: bool, tokens: int | None = None) -> list[Example]:
    """One example for each answer; the answer is trained, the prompt is not.

    An answer without a score has advantage 0, as have those of a group that was scored alike. ``truncated=False``
    leaves answers that were cut off out of the loss, though not out of their group's mean. Answers of one prompt are
    units of at most ``tokens`` positions, so that their prompt is forwarded once.
    """
    from ft.losses import advantage as estimators

    flat = [rollout for group in groups for rollout in group]
    adv = _advantages(flat, [g for g, group in enumerate(groups) for _ in group], getattr(estimators, advantage))
    examples = [
        _example(rollout, value, group)
        for rollout, value, group in zip(flat, adv, [g for g, x in enumerate(groups) for _ in x], strict=True)
        if truncated or rollout.finish != "length"
    ]
    return examples if tokens is None else _in_units(examples, tokens)


def _in_units(examples: Sequence[Example], tokens: int) -> list[Example]:
    """Neighbours of one group share a unit while they fit into ``tokens`` positions, whole prompts counted."""
    found: list[Example] = []
    unit, room = -1, 0
    for i, example in enumerate(examples):
        if i == 0 or example.group != examples[i - 1].group or len(example) - 1 > room:
            unit, room = unit + 1, tokens
        room -= len(example) - 1
        found.append(evolve(example, unit=unit))
    return found


def _advantages(flat: Sequence[Rollout], group: Sequence[int], estimator: Callable[..., Tensor]) -> list[float]:
    import torch

    from ft.losses.advantage import from_list, opo

    reward_S, group_S = from_list([r.reward for r in flat]), torch.tensor(group)
    if estimator is opo:
        return opo(reward_S, torch.tensor([len(r.tokens_L) for r in flat]), group_S).tolist()
    return estimator(reward_S, group_S).tolist()


def _example(rollout: Rollout, advantage: float, group: int) -> Example:
    import numpy as np

    prompt_L, answer_L = rollout.prompt.tokens_L, rollout.tokens_L
    tokens_L = np.concatenate([prompt_L, answer_L]).astype(np.int32)
    said_L = np.full(len(answer_L), np.nan, np.float32) if rollout.logp_L is None else rollout.logp_L
    return Example(
        tokens_L=tokens_L,
        mask_L=np.arange(len(tokens_L)) >= len(prompt_L),
        source=rollout.prompt.source,
        group=group,
        sampled_logp_L=np.concatenate([np.zeros(len(prompt_L), np.float32), said_L.astype(np.float32)]),
        adv_L=np.full(len(tokens_L), advantage, np.float32),
    )


def importance(logp_T: Tensor, adv_T: Tensor, batch: Batch, correction: Correction | None) -> dict[str, Tensor]:
    """``is_weight_T`` and ``keep_T`` of the loss: what makes up for the sampler's own log-probs."""
    if correction is None or batch.sampled_logp_T is None:
        return {}
    from ft.losses import importance as make

    ours_T = logp_T if batch.old_logp_T is None else batch.old_logp_T
    between = (ours_T, batch.sampled_logp_T)
    found = {
        "is_weight_T": make.weights(
            *between, batch.mask_T, batch.seq_T,
            level=correction.level, mode=correction.mode, cap=correction.cap, floor=correction.floor,
        )
    }  # fmt: skip
    if correction.sequence_kl is not None:
        keep_T = make.keep_by_kl(*between, adv_T, batch.mask_T, batch.seq_T, threshold=correction.sequence_kl)
        found["keep_T"] = keep_T.float()
    return found


def denominators(aggregate: str, counts: Counts) -> dict[str, Any]:
    """The step's numbers that means are over."""
    return {"tokens": counts.tokens} | ({} if aggregate == "token" else {"seqs": counts.seqs})


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
        sums["mismatch_kl"] = share((gap_T.exp() - 1 - gap_T).sum(), counts.tokens)
    return sums
