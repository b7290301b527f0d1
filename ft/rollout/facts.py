"""Numbers of sampled and scored answers, for the log."""

from __future__ import annotations

from collections.abc import Sequence

from ft.types import Rollout

Groups = Sequence[Sequence[Rollout]]


def varied(group: Sequence[Rollout]) -> bool:
    """Whether two of its answers were scored differently, so that something can be learnt."""
    return len({r.reward for r in group if r.reward is not None}) > 1


def facts(groups: Groups, *, step: int | None = None) -> dict[str, float]:
    """Numbers of a step's answers, for the log. ``step``: of the policy that trains on them, to tell their age."""
    flat = [rollout for group in groups for rollout in group]
    rewards = [rollout.reward for rollout in flat if rollout.reward is not None]
    mean = sum(rewards) / max(1, len(rewards))
    alike = [not varied(group) for group in groups]
    lengths = [len(rollout.tokens_L) for rollout in flat]
    found = {
        "reward": mean,
        "reward_std": (sum((r - mean) ** 2 for r in rewards) / max(1, len(rewards))) ** 0.5,
        "groups_alike": sum(alike) / max(1, len(groups)),
        "unscored": 1 - len(rewards) / max(1, len(flat)),
        "length": sum(lengths) / max(1, len(flat)),
        "cut_off": sum(r.finish == "length" for r in flat) / max(1, len(flat)),
    }
    if step is not None:
        found["staleness"] = sum(step - r.policy_step for r in flat) / max(1, len(flat))
    return found | _by_function(flat)


def _by_function(flat: Sequence[Rollout]) -> dict[str, float]:
    names = {name for rollout in flat for name in rollout.parts}
    values = {name: [r.parts[name] for r in flat if name in r.parts] for name in sorted(names)}
    return {f"reward/{name}": sum(found) / len(found) for name, found in values.items()}
