"""Scoring completions in worker processes, which may hang, crash or answer nonsense: that costs the sample alone."""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any

import numpy as np
import torch
from attrs import define, evolve, field, frozen

from ft import dist
from ft.dist import World
from ft.errors import DataError
from ft.recipe.typed import name_of
from ft.types import Rollout

Notice = Callable[[str], None]


@frozen(kw_only=True, eq=False)
class Scorer:
    """A reward function by its name, with its weight and what it is given besides the samples."""

    name: str  # "package.module:function"
    weight: float
    options: Mapping[str, Any]

    @property
    def short(self) -> str:
        return self.name.rpartition(":")[2]


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
        named = [evolve(rollout, text=self.decode(rollout.tokens_L.tolist())) for rollout in rollouts]
        table, failure = np.zeros((len(self.scorers), len(named))), None
        if self.world.first:
            try:
                table[:] = [[math.nan if s is None else s for s in self._scores(one, named)] for one in self.scorers]
            except DataError as error:
                failure = error
        if dist.any_rank(failure is not None, self.world):
            raise failure or DataError("the first rank could not score the answers")
        shared = dist.sum_over_ranks(torch.from_numpy(table).to(self.world.device), self.world).cpu().numpy()
        return [self._weighed(rollout, column.tolist()) for rollout, column in zip(named, shared.T, strict=True)]

    def _weighed(self, rollout: Rollout, scores: Sequence[float]) -> Rollout:
        known = [(s, score) for s, score in zip(self.scorers, scores, strict=True) if not math.isnan(score)]
        reward = sum(s.weight * score for s, score in known) if known else None
        return evolve(rollout, reward=reward, parts={s.short: score for s, score in known})

    def _scores(self, scorer: Scorer, rollouts: Sequence[Rollout]) -> list[float | None]:
        """All samples in one call for each worker; where that fails, one by one, so that only the culprit is lost."""
        size = -(-len(rollouts) // len(self.pool)) or 1
        parts = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        found = list(self.threads.map(lambda job: self._part(scorer, *job), zip(self.pool, parts, strict=False)))
        scores, failures = [s for part, _ in found for s in part], [f for _, part in found for f in part]
        for rollout, why in failures[:3]:
            self.notice(
                f"{scorer.short} failed on an answer to {rollout.prompt.source}: {why}\n  {rollout.text[:200]!r}"
            )
        if len(failures) > self.most_failures * len(rollouts):
            raise DataError(
                f"the reward function {scorer.name} fails too often",
                where=failures[0][0].prompt.source,
                expected=f"at most {self.most_failures:.0%} of a step's answers without a score",
                got=f"{len(failures)} of {len(rollouts)}; the first: {failures[0][1]}",
                fix="try it by itself on a few rows: ft reward",
            )
        return scores

    def _part(
        self, scorer: Scorer, worker: Worker, rollouts: Sequence[Rollout]
    ) -> tuple[list[float | None], list[tuple[Rollout, str]]]:
        scores, why = worker.call(scorer.name, arguments(scorer, rollouts))
        if scores is not None:
            return scores, []
        if len(rollouts) == 1:
            return [None], [(rollouts[0], why)]
        alone = [self._part(scorer, worker, [rollout]) for rollout in rollouts]
        return [s for part, _ in alone for s in part], [f for _, part in alone for f in part]

    def close(self) -> None:
        for worker in self.pool:
            worker.close()
        self.threads.shutdown()


def arguments(scorer: Scorer, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """What a reward function is called with: the completions, and every column of their rows, as lists."""
    rows = [rollout.prompt.columns or {} for rollout in rollouts]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {("prompts" if name == "prompt" else name): [row.get(name) for row in rows] for name in names}
    return {
        **columns,
        "completions": [rollout.text for rollout in rollouts],
        "completion_ids": [rollout.tokens_L.tolist() for rollout in rollouts],
        **scorer.options,
    }


class Worker:
    """A process that scores. It is started when first needed, and again after it crashed or was killed."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[list[float | None] | None, str]:
        """(scores, "") or (None, why not)."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"function": name, "arguments": arguments}, default=str).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process.stdout, self.timeout)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.close()
            return None, f"no answer within {self.timeout:g} s; its process was killed"
        if not line.endswith(b"\n"):
            self.close()
            return None, f"its process died ({_ended(process.returncode)})"
        reply = json.loads(line)
        return (reply["scores"], "") if "scores" in reply else (None, reply["error"])

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "ft.rollout.worker", str(os.getpid())]
            paths = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
        return self.process

    def close(self) -> None:
        """Kill the process and all that it started."""
        if self.process is None:
            return
        process, self.process = self.process, None
        with suppress(ProcessLookupError):  # it has ended already
            os.killpg(process.pid, 9)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _read_line(pipe: IO[bytes], timeout: float) -> bytes:
    """A line, or what came before the pipe was closed.

    Raises:
        TimeoutError: neither came in time.
    """
    deadline, found = time.monotonic() + timeout, b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not found.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            piece = os.read(pipe.fileno(), 1 << 20)
            if not piece:
                break
            found += piece
    return found


def _ended(status: int | None) -> str:
    return f"signal {-status}" if status is not None and status < 0 else f"status {status}"


def scorer(function: Callable[..., Any], weight: float, options: Mapping[str, Any]) -> Scorer:
    """Of a function that a recipe names."""
    assert math.isfinite(weight)
    return Scorer(name=name_of(function), weight=weight, options=dict(options))
