"""Which prompts come up, by what became of them: a curriculum of those half solved, and failed ones asked again.

What is known of prompts is a plain value that is passed in and out (and kept in checkpoints): {"rates": {row: success
rate}, "again": [[batch, row, time], ...]}, rows as text. It is the same on every rank, as are the answers it is made
of. Shapes: R candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, field, frozen, validators

from ft.rollout.facts import Groups
from ft.types import Context, Example

Past = Mapping[str, Any]


@frozen(kw_only=True)
class Curriculum:
    """Prompts that about half of the answers solve come up more often than those that all or none do.

    The prompts of a batch are chosen among ``among`` times as many that the data gives, so that each is a candidate
    ``among`` times an epoch. One with success rate p is chosen with weight p (1 - p) + floor; p of one that was never
    asked counts as 1/2.
    """

    among: int = field(default=4, validator=validators.ge(2))
    """Candidates for each place in a batch."""
    floor: float = field(default=0.05, validator=validators.gt(0.0))
    """Weight of a prompt that all answers solve, or none. 1/4 more is the largest weight."""
    above: float = 0.5
    """An answer succeeds whose reward is above this; punishment for length does not count."""
    pace: float = field(default=0.5, validator=validators.and_(validators.gt(0.0), validators.le(1.0)))
    """Share of the newest answers in a prompt's success rate."""


@frozen(kw_only=True)
class Reroll:
    """Prompts that no answer solved are asked again some batches later, in the place of others of that batch."""

    after: int = field(default=4, validator=validators.ge(1))
    """Batches until then; later where that batch is full of such prompts, or drawn already."""
    times: int = field(default=2, validator=validators.ge(1))
    """How often a prompt is asked again while it goes on failing."""
    share: float = field(default=0.25, validator=validators.and_(validators.gt(0.0), validators.le(1.0)))
    """Largest share of a batch that is asked again, but for one prompt that every batch may."""
    above: float = 0.0
    """A prompt fails where no answer is rewarded above this; punishment for length does not count."""


# Before a batch -------------------------------------------------------------------------------------------------------


def prompts_of(
    batch: int, turn: int, ctx: Context, past: Past, curriculum: Curriculum | None, reroll: Reroll | None
) -> list[Example]:
    """The prompts of a batch, each a group of its own; with ``turn`` others, from an order of their own."""
    assert ctx.data is not None
    n, seed = ctx.examples, ctx.seed + 1_000_003 * turn
    if curriculum is None:
        found = ctx.data.draw(batch, n, seed)
    else:
        candidates = ctx.data.draw(batch, n * curriculum.among, seed)
        found = chosen(candidates, n, past.get("rates", {}), curriculum, (seed, batch))
    if reroll is not None and not turn:
        again = [ctx.data.row(row)[0] for row in due(past, batch)]
        found = [*again, *found[: len(found) - len(again)]]
    return [evolve(prompt, group=turn * n + i) for i, prompt in enumerate(found)]


def weight(rate: float, floor: float) -> float:
    """p (1 - p) + floor: the spread of a reward that is 1 with probability p, and never nothing."""
    return rate * (1 - rate) + floor


def chosen(
    candidates: Sequence[Example], n: int, rates: Mapping[str, float], curriculum: Curriculum, key: tuple[int, ...]
) -> list[Example]:
    """``n`` of the candidates, in their order, drawn by weight without putting back; the same for the same ``key``.

    A row that is a candidate twice is chosen again only where there are not enough others.
    """
    import numpy as np

    rows = [candidate.row for candidate in candidates]
    repeat_R = np.array([row is not None and row in rows[:i] for i, row in enumerate(rows)])
    weight_R = np.array([weight(rates.get(str(row), 0.5), curriculum.floor) for row in rows])
    raw_R = np.random.PCG64(np.random.SeedSequence(key)).random_raw(len(rows))
    u_R = ((raw_R >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0
    order = np.lexsort((-np.log(u_R) / weight_R, repeat_R))  # Efraimidis and Spirakis, 2006
    return [candidates[i] for i in sorted(order[:n].tolist())]


def due(past: Past, batch: int) -> list[int]:
    """Rows that are asked again in this batch."""
    return [row for at, row, _ in past.get("again", ()) if at == batch]


# After it -------------------------------------------------------------------------------------------------------------


def learnt(
    past: Past, groups: Groups, batch: int, ctx: Context, curriculum: Curriculum | None, reroll: Reroll | None
) -> Past:
    """What is known of prompts once these scored answers are. Those without a score tell nothing."""
    rewards: dict[int, list[float]] = {}
    for rollout in (rollout for group in groups for rollout in group):
        if rollout.prompt.row is not None and rollout.reward is not None:
            rewards.setdefault(rollout.prompt.row, []).append(rollout.reward)
    found = dict(past)
    if curriculum is not None:
        found["rates"] = rated(past.get("rates", {}), rewards, curriculum)
    if reroll is not None:
        found["again"] = scheduled(past.get("again", ()), rewards, batch, reroll, ctx.examples, ahead=ctx.ahead)
    return found


def numbers(
    past: Past, groups: Groups, batch: int, curriculum: Curriculum | None, reroll: Reroll | None
) -> dict[str, float]:
    """For the log: prompts asked again, and the success rate so far of those that were asked before."""
    found: dict[str, float] = {} if reroll is None else {"prompts_again": len(due(past, batch))}
    rates = past.get("rates", {})
    known = [rates[str(group[0].prompt.row)] for group in groups if str(group[0].prompt.row) in rates]
    return found | ({"solved_before": sum(known) / len(known)} if curriculum is not None and known else {})


def rated(
    rates: Mapping[str, float], rewards: Mapping[int, Sequence[float]], curriculum: Curriculum
) -> dict[str, float]:
    """p <- p + pace (share of the new answers that succeed - p); the first answers count alone."""
    found = dict(rates)
    for row, scores in rewards.items():
        share = sum(score > curriculum.above for score in scores) / len(scores)
        old = found.get(str(row))
        found[str(row)] = share if old is None else old + curriculum.pace * (share - old)
    return found


def scheduled(
    again: Sequence[Sequence[int]],
    rewards: Mapping[int, Sequence[float]],
    batch: int,
    reroll: Reroll,
    n: int,
    *,
    ahead: int = 0,
) -> list[list[int]]:
    """[batch, row, time] of prompts that are to be asked again, once those of ``batch`` were answered.

    A prompt that fails is put into the first batch with room. What was due in ``batch`` stays until the next one, so
    that a run that draws it once more asks the same.

    Args:
        ahead: batches after this one that are drawn already.
    """
    failed = [row for row, scores in rewards.items() if max(scores) <= reroll.above]
    solved = rewards.keys() - set(failed)
    found = [list(entry) for entry in again if entry[0] == batch or (entry[0] > batch and entry[1] not in solved)]
    waiting = {row for at, row, _ in found if at > batch}
    before = {row: time for at, row, time in found if at == batch}
    most = max(1, int(reroll.share * n))
    for row in failed:
        time = before.get(row, 0) + 1
        if row in waiting or time > reroll.times:
            continue
        at = batch + max(reroll.after, ahead + 1)
        while sum(entry[0] == at for entry in found) >= most:
            at += 1
        found.append([at, row, time])
    return sorted(found, key=lambda entry: entry[0])
