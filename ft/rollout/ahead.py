"""Answers drawn in the background, while a batch trains: on the first rank, in one thread, without collectives.

``sync`` waits until nothing is being drawn, so that all answers of a batch are by one policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from attrs import define, field, frozen

from ft.dist import World
from ft.rollout.shared import Answer, from_all_ranks, on_first
from ft.types import Example, Rollout, Sampler

Found = list[list[Answer]]


class Beside(Sampler, Protocol):
    """A sampler that may run while the policy trains."""

    def ask(self, prompts: Sequence[Example], n: int, step: int) -> Found:
        """``n`` answers to each prompt, on the first rank alone, from any thread."""
        ...


@frozen(kw_only=True, eq=False)
class _Job:
    """A batch of answers to come; ``found`` is None on the other ranks."""

    prompts: Sequence[Example]
    n: int
    policy_step: int
    found: Future[Found] | None


@define(kw_only=True, eq=False)
class AheadSampler:
    """Implements ``ft.types.Sampler`` with another one, and draws batches ahead."""

    sampler: Beside
    world: World
    thread: ThreadPoolExecutor = field(factory=lambda: ThreadPoolExecutor(1))  # one, so that batches come in order
    jobs: dict[int, _Job] = field(factory=dict)
    step: int = -1  # of the weights that the sampler has

    def sync(self, step: int) -> None:
        self._wait()
        self.sampler.sync(step)
        self.step = step

    def rollout(self, prompts: Sequence[Example], n: int, step: int, *, greedy: bool = False) -> list[list[Rollout]]:
        self._wait()
        return self.sampler.rollout(prompts, n, step, greedy=greedy)

    def has(self, batch: int) -> bool:
        """Whether this batch has been begun, and not been taken."""
        return batch in self.jobs

    def begin(self, batch: int, prompts: Sequence[Example], n: int, step: int) -> None:
        """Start to draw a batch by the weights of the last ``sync``. Seeds depend on ``batch``, not on the time."""
        found = self.thread.submit(self.sampler.ask, prompts, n, batch) if self.world.first else None
        self.jobs[batch] = _Job(prompts=prompts, n=n, policy_step=step, found=found)

    def take(self, batch: int) -> list[list[Rollout]]:
        """A batch that was begun, on every rank.

        Raises:
            FtError: the sampler failed; on every rank.
        """
        job = self.jobs.pop(batch)
        nothing: Found = [[] for _ in job.prompts]
        found = on_first(lambda: _result(job), self.world, nothing)
        found = from_all_ranks(found, job.n, self.world)
        return [
            [_rollout(prompt, answer, job.policy_step) for answer in group]
            for prompt, group in zip(job.prompts, found, strict=True)
        ]

    def _wait(self) -> None:
        wait([job.found for job in self.jobs.values() if job.found is not None])

    def close(self) -> None:
        """What is being drawn ends with the sampler; what has not begun is not begun."""
        self.thread.shutdown(wait=False, cancel_futures=True)


def _result(job: _Job) -> Found:
    assert job.found is not None
    return job.found.result()


def _rollout(prompt: Example, answer: Answer, step: int) -> Rollout:
    finish = "stop" if answer.stopped else "length"
    return Rollout(
        prompt=prompt, tokens_L=answer.tokens_L, logp_L=answer.logp_L, finish=finish, policy_step=step,
        routes_LMK=answer.routes_LMK,
    )  # fmt: skip
