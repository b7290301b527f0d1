"""Groups of answers with spread, trained once more where a batch's own groups have none.

They keep the sampler's log-probs as they were drawn: importance weights are against the policy that drew them. The
log-probs that ratios are taken to are the trainer's own, computed anew with the batch.

Held groups are plain values, kept in checkpoints: {"batch": when they were drawn, "used": how often, "group": {...}}.
Shapes: L tokens of a prompt, A tokens of a group's answers, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen, validators

from ft.rollout.facts import Groups, varied
from ft.types import Example, Rollout

Held = Mapping[str, Any]


@frozen(kw_only=True)
class Replay:
    """Groups whose answers were scored differently are held, and take the places of groups scored alike.

    The newest are taken first. What makes up for their age is ``GRPO.correction``, or ``old="sampler"``; the log says
    how many steps old they are (``replay_age``).
    """

    batches: int = field(default=4, validator=validators.ge(1))
    """Batches for which a group is held: the one that trains on it comes at most so many after the one that drew it."""
    fill: float = field(default=1.0, validator=validators.and_(validators.gt(0.0), validators.le(1.0)))
    """Share of a batch's groups with spread below which held groups are mixed in, up to this share."""
    times: int = field(default=1, validator=validators.ge(1))
    """How often a group is trained once more."""


@frozen(kw_only=True, eq=False)
class Mixed:
    """The groups to train, which end with those that were held; and what is held on."""

    groups: Groups
    taken: int
    left: Sequence[Held]


def mixed(fresh: Groups, held: Sequence[Held], batch: int, n: int, replay: Replay) -> Mixed:
    """This batch's groups, with held ones in the place of those that were scored alike.

    Args:
        fresh: this batch's own; they may be fewer than ``n`` where others were left out.
        n: groups of a whole batch.
    """
    usable = [one for one in held if 0 < batch - one["batch"] <= replay.batches and one["used"] < replay.times]
    lacking = max(0, math.floor(replay.fill * n + 1e-9) - sum(map(varied, fresh)))
    newest = sorted(range(len(usable)), key=lambda i: -usable[i]["batch"])[:lacking]
    taken = set(newest)
    left = [{**one, "used": one["used"] + (i in taken)} for i, one in enumerate(usable)]
    groups = _less_alike(fresh, len(fresh) + len(taken) - n)
    groups = [*groups, *(rollouts_of(usable[i]["group"]) for i in newest)]
    return Mixed(groups=groups, taken=len(newest), left=left)


def _less_alike(groups: Groups, drop: int) -> list[Sequence[Rollout]]:
    """Without the last ``drop`` of those that were scored alike."""
    alike = [i for i, group in enumerate(groups) if not varied(group)]
    gone = set(alike[max(0, len(alike) - max(0, drop)) :]) if drop > 0 else set()
    return [group for i, group in enumerate(groups) if i not in gone]


def holding(held: Sequence[Held], groups: Groups, batch: int, replay: Replay) -> list[Held]:
    """What is held from now on: these groups of this batch too, and none that no later batch may take."""
    new = [{"batch": batch, "used": 0, "group": plain(group)} for group in groups]
    return [
        one for one in [*held, *new] if batch + 1 - one["batch"] <= replay.batches and one["used"] < replay.times
    ]  # fmt: skip


def numbers(mixed: Mixed, held: Sequence[Held], step: int) -> dict[str, float]:
    """For the log: groups taken and held, and how many steps ago the policies that drew those taken stood."""
    flat = [rollout for group in mixed.groups[len(mixed.groups) - mixed.taken :] for rollout in group]
    found: dict[str, float] = {"groups_replayed": mixed.taken, "groups_held": len(held)}
    return found | ({"replay_age": sum(step - r.policy_step for r in flat) / len(flat)} if flat else {})


# A group as JSON and arrays -------------------------------------------------------------------------------------------


def plain(group: Sequence[Rollout]) -> dict[str, Any]:
    """What training needs of a group; texts and columns, by which it was scored, are left behind."""
    import numpy as np

    prompt = group[0].prompt
    said = [np.full(len(r.tokens_L), np.nan, np.float32) if r.logp_L is None else r.logp_L for r in group]
    mask = [np.ones(len(r.tokens_L), bool) if r.mask_L is None else r.mask_L for r in group]
    return {
        "source": prompt.source,
        "row": prompt.row,
        "prompt": prompt.tokens_L.astype(np.int32),
        "tokens": np.concatenate([r.tokens_L for r in group]).astype(np.int32),
        "logp": np.concatenate(said).astype(np.float32),
        "mask": np.concatenate(mask),
        "routes": [r.routes_LMK for r in group],
        "answers": [
            {"length": len(r.tokens_L), "reward": r.reward, "parts": dict(r.parts), "finish": r.finish,
             "policy_step": r.policy_step} for r in group
        ],
    }  # fmt: skip


def rollouts_of(kept: Mapping[str, Any]) -> list[Rollout]:
    """The group again."""
    import numpy as np

    prompt_L = kept["prompt"]
    prompt = Example(tokens_L=prompt_L, mask_L=np.zeros(len(prompt_L), bool), source=kept["source"], row=kept["row"])
    ends = np.cumsum([answer["length"] for answer in kept["answers"]])[:-1]
    routes = kept.get("routes") or [None] * len(kept["answers"])
    pieces = zip(*(np.split(kept[name], ends) for name in ("tokens", "logp", "mask")), strict=True)
    return [
        Rollout(
            prompt=prompt, tokens_L=tokens_L, logp_L=logp_L, mask_L=mask_L, finish=answer["finish"],
            policy_step=answer["policy_step"], reward=answer["reward"], parts=answer["parts"], routes_LMK=routes_LMK,
        )
        for answer, routes_LMK, (tokens_L, logp_L, mask_L) in zip(kept["answers"], routes, pieces, strict=True)
    ]  # fmt: skip
