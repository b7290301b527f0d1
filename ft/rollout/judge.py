"""Scoring completions in worker processes, which may hang, crash or answer nonsense: that costs the sample alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from attrs import define, evolve, field, frozen

from ft import dist
from ft.dist import World
from ft.errors import DataError
from ft.recipe.typed import name_of
from ft.rollout.process import Worker
from ft.types import Rollout

Notice = Callable[[str], None]
Scored = tuple[float, str]  # a score, NaN for none, and why there is none if it should be there

_UNTRIED = "not tried, since too many failed before"
_FAILED = math.inf  # in the table that ranks share, where NaN is a None


@frozen(kw_only=True, eq=False)
class Scorer:
    """A reward function by its name, with its weight and what it is given besides the samples."""

    name: str  # "package.module:function", or "recipe.py:function"
    weight: float
    options: Mapping[str, Any]
    messages: bool = False  # completions come as lists of one message
    label: str  # names its scores; no other one's


def scorers_of(rewards: Sequence[Any]) -> list[Scorer]:
    """Of a method's reward functions. Two of one name are told apart by a number."""
    found: list[Scorer] = []
    for reward in rewards:
        assert math.isfinite(reward.weight)
        short = reward.function.__name__
        before = sum(s.name.rpartition(":")[2] == short for s in found)
        found.append(
            Scorer(
                name=name_of(reward.function), weight=reward.weight, options=dict(reward.options),
                messages=reward.messages, label=f"{short}_{before + 1}" if before else short,
            )
        )  # fmt: skip
    return found


@define(eq=False)
class Judge:
    """Implements ``ft.types.Judge``. ``close`` ends its processes."""

    scorers: Sequence[Scorer]
    decode: Callable[[Sequence[int]], str]
    timeout: float  # seconds that a call may take
    workers: int
    most_failures: float  # share of a step's scores that may fail
    notice: Notice
    world: World
    pool: list[Worker] = field(init=False)
    threads: ThreadPoolExecutor = field(init=False)  # kept, since a worker dies with the thread that started it

    def __attrs_post_init__(self) -> None:
        self.pool = [Worker(self.timeout) for _ in range(self.workers)]
        self.threads = ThreadPoolExecutor(self.workers)

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with text, parts and reward. Every rank calls it with the same; the first one's workers score.

        Raises:
            DataError: more calls failed than may; on every rank.
        """
        named = [r if r.text else evolve(r, text=self.decode(r.tokens_L.tolist())) for r in rollouts]
        table, failure = np.zeros((len(self.scorers), len(named))), None
        if self.world.first:
            try:
                table[:] = [[_FAILED if why else s for s, why in self._scores(one, named)] for one in self.scorers]
            except DataError as error:
                failure = error
        if dist.any_rank(failure is not None, self.world):
            raise failure or DataError("the first rank could not score the answers")
        shared = dist.sum_over_ranks(torch.from_numpy(table).to(self.world.device), self.world).cpu().numpy()
        return [self._weighed(rollout, column.tolist()) for rollout, column in zip(named, shared.T, strict=True)]

    def _weighed(self, rollout: Rollout, scores: Sequence[float]) -> Rollout:
        """A None is left out of the sum. Where a function failed there is no reward: it would be too small."""
        known = [(s, score) for s, score in zip(self.scorers, scores, strict=True) if math.isfinite(score)]
        whole = known and _FAILED not in scores
        reward = sum(s.weight * score for s, score in known) if whole else None
        return evolve(rollout, reward=reward, parts={s.label: score for s, score in known})

    def _scores(self, scorer: Scorer, rollouts: Sequence[Rollout]) -> list[Scored]:
        """All samples in one call for each worker; where that fails, one by one, so that only the culprit is lost."""
        size, most = -(-len(rollouts) // len(self.pool)) or 1, self.most_failures * len(rollouts)
        parts = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        jobs = zip(self.pool, parts, strict=False)
        found = [s for part in self.threads.map(lambda job: _part(scorer, job[0], job[1], most), jobs) for s in part]
        failures = [(r, why) for r, (_, why) in zip(rollouts, found, strict=True) if why and why != _UNTRIED]
        for rollout, why in failures[:3]:
            self.notice(
                f"{scorer.label} failed on an answer to {rollout.prompt.source}: {why}\n  {rollout.text[:200]!r}"
            )
        if len(failures) > most:
            raise DataError(
                f"the reward function {scorer.name} fails too often",
                where=failures[0][0].prompt.source,
                expected=f"at most {self.most_failures:.0%} of a step's answers without a score",
                got=f"{len(failures)} of {len(rollouts)}; the first: {failures[0][1]}",
                fix="try it by itself on a few rows: ft reward",
            )
        return found

    def close(self) -> None:
        """End the workers, also while they score: those calls come back as failures."""
        for worker in self.pool:
            worker.closed = True
            worker.kill()
        self.threads.shutdown(cancel_futures=True)
        for worker in self.pool:
            worker.end()


def _part(scorer: Scorer, worker: Worker, rollouts: Sequence[Rollout], most: float) -> list[Scored]:
    """One worker's share. Where a call fails on several samples each is tried alone, until ``most`` have failed."""
    reply = worker.call(scorer.name, arguments(scorer, rollouts))
    if reply.scores is not None:
        return [(math.nan if s is None else s, reply.wrong.get(i, "")) for i, s in enumerate(reply.scores)]
    if len(rollouts) == 1:
        return [(math.nan, reply.why)]
    found: list[Scored] = []
    for rollout in rollouts:
        enough = sum(bool(why) for _, why in found) > most
        found += [(math.nan, _UNTRIED)] if enough else _part(scorer, worker, [rollout], most)
    return found


def arguments(scorer: Scorer, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """What a reward function is called with: the completions, and every column of their rows, as lists."""
    rows = [rollout.prompt.columns or {} for rollout in rollouts]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {("prompts" if name == "prompt" else name): [row.get(name) for row in rows] for name in names}
    texts = [rollout.text for rollout in rollouts]
    return {
        **columns,
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if scorer.messages else texts,
        "completion_ids": [rollout.tokens_L.tolist() for rollout in rollouts],
        **scorer.options,
    }
