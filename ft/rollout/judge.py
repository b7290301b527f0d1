"""Scoring completions in worker processes, which may hang, crash or answer nonsense: that costs the sample alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import LifoQueue
from threading import Lock
from typing import Any

import numpy as np
import torch
from attrs import define, evolve, field, frozen

from ft import dist
from ft.dist import World
from ft.errors import DataError
from ft.recipe.typed import name_of
from ft.rollout.process import Worker
from ft.types import Arrived, Example, Rollout

Notice = Callable[[str], None]
Scored = tuple[float, str]  # a score, NaN for none, and why there is none if it should be there
Job = tuple[Future[list[list[Scored]]], int]  # some answers' scores by each function, and one answer's place in them
Key = tuple[Example, bytes, int]

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
class _Tally:
    """How often each function has failed on answers that are drawn together, and may."""

    most: float
    failed: Counter[str] = field(factory=Counter)
    lost: bool = False  # one failed more often: the run is to stop, and nothing more is tried
    lock: Lock = field(factory=Lock)

    def add(self, label: str, failures: int) -> None:
        with self.lock:
            self.failed[label] += failures
            self.lost = self.lost or self.failed[label] > self.most


@define(eq=False)
class Judge:
    """Implements ``ft.types.Judge``. ``close`` ends its processes.

    Groups may be scored before all answers of a draw are there (``expect``): a score and what is said of it are the
    same. A call of a function has answers to one prompt then, and those of several otherwise.
    """

    scorers: Sequence[Scorer]
    decode: Callable[[Sequence[int]], str]
    timeout: float  # seconds that a call may take
    workers: int
    most_failures: float  # share of a step's scores that may fail
    notice: Notice
    world: World
    pool: list[Worker] = field(init=False)
    free: LifoQueue[Worker] = field(init=False)  # last in, first out: one that has its functions loaded goes first
    threads: ThreadPoolExecutor = field(init=False)  # kept, since a worker dies with the thread that started it
    begun: dict[Key, Job] = field(init=False, factory=dict)  # on the first rank; no more than was drawn
    closed: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self.pool = [Worker(self.timeout) for _ in range(self.workers)]
        self.threads, self.free = ThreadPoolExecutor(self.workers), LifoQueue()
        for worker in reversed(self.pool):
            self.free.put(worker)

    def expect(self, answers: int) -> Arrived:
        """Of a draw of so many answers: what each group is given to when it is complete, to be scored at once.

        ``score`` collects what has become of it. Only the first rank's workers score.
        """
        tally = _Tally(self.most_failures * answers)

        def arrived(group: Sequence[Rollout]) -> None:
            if self.world.first and not self.closed:
                self.begun.update(zip(_keys(group), self._begin(group, answers, tally), strict=True))

        return arrived

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with text, parts and reward. Every rank calls it with the same; the first one's workers score.

        Raises:
            DataError: more calls failed than may; on every rank.
        """
        named = [self._named(rollout) for rollout in rollouts]
        table, failure = np.zeros((len(self.scorers), len(named))), None
        if self.world.first:
            try:
                table[:] = [[_FAILED if why else s for s, why in scores] for scores in self._scores(named)]
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

    def _scores(self, rollouts: Sequence[Rollout]) -> list[list[Scored]]:
        """By each function. What was not begun is scored in one call for each worker."""
        begun = [self.begun.pop(key, None) for key in _keys(rollouts)]
        rest = [rollout for rollout, job in zip(rollouts, begun, strict=True) if job is None]
        others = iter(self._begin(rest, len(rest), _Tally(self.most_failures * len(rollouts))))
        jobs = [job or next(others) for job in begun]
        found = [[call.result()[i][place] for call, place in jobs] for i in range(len(self.scorers))]
        for scorer, scored in zip(self.scorers, found, strict=True):
            self._report(scorer, rollouts, scored)
        return found

    def _begin(self, rollouts: Sequence[Rollout], of: int, tally: _Tally) -> list[Job]:
        """Have them scored in one call, or in several where ``of`` answers would leave workers idle otherwise."""
        jobs: list[Job] = []
        size = -(-of // len(self.pool)) or 1
        for start in range(0, len(rollouts), size):
            part = rollouts[start : start + size]
            call = self.threads.submit(self._call, part, tally)
            jobs += [(call, place) for place in range(len(part))]
        return jobs

    def _call(self, rollouts: Sequence[Rollout], tally: _Tally) -> list[list[Scored]]:
        """Their scores by each function, in one of the threads, of which there is one for each worker."""
        named, worker = [self._named(rollout) for rollout in rollouts], self.free.get()
        try:
            return [_part(scorer, worker, named, tally) for scorer in self.scorers]
        finally:
            self.free.put(worker)

    def _named(self, rollout: Rollout) -> Rollout:
        return rollout if rollout.text else evolve(rollout, text=self.decode(rollout.tokens_L.tolist()))

    def _report(self, scorer: Scorer, rollouts: Sequence[Rollout], scored: Sequence[Scored]) -> None:
        failures = [(r, why) for r, (_, why) in zip(rollouts, scored, strict=True) if why and why != _UNTRIED]
        for rollout, why in failures[:3]:
            self.notice(
                f"{scorer.label} failed on an answer to {rollout.prompt.source}: {why}\n  {rollout.text[:200]!r}"
            )
        if len(failures) > self.most_failures * len(rollouts):
            raise DataError(
                f"the reward function {scorer.name} fails too often",
                where=failures[0][0].prompt.source,
                expected=f"at most {self.most_failures:.0%} of a step's answers without a score",
                got=f"{len(failures)} of {len(rollouts)}; the first: {failures[0][1]}",
                fix="try it by itself on a few rows: ft reward",
            )

    def close(self) -> None:
        """End the workers, also while they score: those calls come back as failures. What arrives later is left."""
        self.closed = True
        for worker in self.pool:
            worker.closed = True
            worker.kill()
        self.threads.shutdown(cancel_futures=True)
        for worker in self.pool:
            worker.end()


def _keys(rollouts: Sequence[Rollout]) -> Iterator[Key]:
    """What tells answers apart: the prompt as it was asked this time, the tokens, and how many before had the same."""
    before: Counter[tuple[Example, bytes]] = Counter()
    for rollout in rollouts:
        said = rollout.prompt, rollout.tokens_L.tobytes()
        yield *said, before[said]
        before[said] += 1


def _part(scorer: Scorer, worker: Worker, rollouts: Sequence[Rollout], tally: _Tally) -> list[Scored]:
    """All samples in one call; where that fails, one by one, so that only the culprit is lost."""
    if tally.lost:
        return [(math.nan, _UNTRIED)] * len(rollouts)
    reply = worker.call(scorer.name, arguments(scorer, rollouts))
    if reply.scores is not None:
        found = [(math.nan if s is None else s, reply.wrong.get(i, "")) for i, s in enumerate(reply.scores)]
    elif len(rollouts) == 1:
        found = [(math.nan, reply.why)]
    else:
        return [scored for rollout in rollouts for scored in _part(scorer, worker, [rollout], tally)]
    tally.add(scorer.label, sum(bool(why) for _, why in found))
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
