"""From scored groups of answers to examples: what an answer earns, and how much of that is its own merit.

Shapes: S answers, K rewards of one, L tokens of one sequence; of routes, M layers and K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, field, frozen, validators

from ft.rollout.facts import Groups
from ft.types import Example, Rollout

if TYPE_CHECKING:
    from torch import Tensor

Advantage = Literal[
    "group_zscore", "group_mean", "leave_one_out", "opo", "maxrl", "gdpo", "reinforce_pp", "reinforce_pp_baseline"
]
SCALES = {"group_zscore": ("group", "batch"), "leave_one_out": ("none", "batch")}
"""What advantages can be divided by, their own first."""
OVERLONG = "overlong"


@frozen(kw_only=True)
class Overlong:
    """DAPO's soft punishment of long answers (arXiv:2503.14476), taken off the reward.

    0 up to sampling.max_tokens - buffer tokens, from there in a line to ``penalty`` at sampling.max_tokens.
    """

    buffer: int = field(validator=validators.ge(1))
    """Tokens before the limit over which the punishment grows."""
    penalty: float = field(default=1.0, validator=validators.gt(0.0))
    """What an answer loses that reaches the limit."""

    def reward(self, length: int, limit: int) -> float:
        over = min(max(0, length - (limit - self.buffer)), self.buffer)
        return -self.penalty * over / self.buffer


def shaped(groups: Groups, overlong: Overlong | None, limit: int) -> list[list[Rollout]]:
    """The same with the punishment in their rewards, and among its parts."""
    if overlong is None:
        return [list(group) for group in groups]

    def one(rollout: Rollout) -> Rollout:
        if rollout.reward is None:
            return rollout
        extra = overlong.reward(len(rollout.tokens_L), limit)
        return evolve(rollout, reward=rollout.reward + extra, parts={**rollout.parts, OVERLONG: extra})

    return [[one(rollout) for rollout in group] for group in groups]


def to_examples(
    groups: Groups,
    advantage: Advantage = "group_zscore",
    *,
    scale: str | None = None,
    weights: dict[str, float] | None = None,
    truncated: bool = True,
    tokens: int | None = None,
) -> list[Example]:
    """One example for each answer; the answer is trained, the prompt is not.

    An answer without a score has advantage 0, as have those of a group that was scored alike. Answers of one prompt
    are units of at most ``tokens`` positions, so that their prompt is forwarded once.

    Args:
        weights: of the parts of a reward, by name, for ``gdpo``.
        truncated: False leaves answers that were cut off out of the loss, though not out of their group's mean.
    """
    flat, of = _flat(groups)
    adv = advantages(flat, of, advantage, scale=scale, weights=weights)
    found = zip(flat, adv, of, strict=True)
    examples = [_example(r, value, group) for r, value, group in found if truncated or r.finish != "length"]
    return examples if tokens is None else _in_units(examples, tokens)


def advantages(
    flat: Sequence[Rollout],
    of: Sequence[int],
    advantage: Advantage,
    *,
    scale: str | None = None,
    weights: dict[str, float] | None = None,
) -> list[float]:
    """Of each answer, by ``ft.losses.advantage``; ``of`` says which group it is in."""
    import torch

    from ft.losses import advantage as made

    reward_S, group_S = made.from_list([r.reward for r in flat]), torch.tensor(of)
    if not flat:
        return []
    if advantage == "gdpo":
        names = weights or dict.fromkeys(flat[0].parts, 1.0)
        reward_SK = torch.stack([made.from_list([r.parts.get(name) for r in flat]) for name in names], 1)
        return made.gdpo(reward_SK, group_S, weights=list(names.values())).tolist()
    if advantage in ("reinforce_pp", "reinforce_pp_baseline"):
        return _whitened(flat, group_S, reward_S, advantage).tolist()
    if advantage == "opo":
        return made.opo(reward_S, torch.tensor([len(r.tokens_L) for r in flat]), group_S).tolist()
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    return getattr(made, advantage)(reward_S, group_S, **options).tolist()


def _whitened(flat: Sequence[Rollout], group_S: Tensor, reward_S: Tensor, advantage: str) -> Tensor:
    """Advantages of tokens, all alike in an answer: its last token's."""
    import torch

    from ft.losses.advantage import reinforce_pp, reinforce_pp_baseline

    length_S = torch.tensor([len(r.tokens_L) for r in flat])
    seq_T = torch.arange(len(flat)).repeat_interleave(length_S)
    mask_T = torch.ones_like(seq_T, dtype=torch.bool)
    if advantage == "reinforce_pp":
        adv_T = reinforce_pp(reward_S, seq_T, mask_T)
    else:
        adv_T = reinforce_pp_baseline(reward_S, group_S, seq_T, mask_T)
    return adv_T[length_S.cumsum(0) - 1]


def _flat(groups: Groups) -> tuple[list[Rollout], list[int]]:
    return [r for group in groups for r in group], [g for g, group in enumerate(groups) for _ in group]


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


def _sampled(rollout: Rollout) -> Any:
    import numpy as np

    return np.ones(len(rollout.tokens_L), bool) if rollout.mask_L is None else rollout.mask_L


def _example(rollout: Rollout, advantage: float, group: int) -> Example:
    import numpy as np

    prompt_L, answer_L, routes_LMK = rollout.prompt.tokens_L, rollout.tokens_L, rollout.routes_LMK
    tokens_L = np.concatenate([prompt_L, answer_L]).astype(np.int32)
    said_L = np.full(len(answer_L), np.nan, np.float32) if rollout.logp_L is None else rollout.logp_L
    return Example(
        tokens_L=tokens_L,
        mask_L=np.concatenate([np.zeros(len(prompt_L), bool), _sampled(rollout)]),
        source=rollout.prompt.source,
        group=group,
        sampled_logp_L=np.concatenate([np.zeros(len(prompt_L), np.float32), said_L.astype(np.float32)]),
        adv_L=np.full(len(tokens_L), advantage, np.float32),
        routes_LMK=None if routes_LMK is None else np.pad(routes_LMK, ((0, 1), (0, 0), (0, 0)), constant_values=-1),
    )
