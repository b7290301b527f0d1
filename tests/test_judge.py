"""Reward functions that misbehave, in real worker processes: what each costs, what is said, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field
from misbehaving import (
    chatty,
    exits,
    exits_at_once,
    generator,
    good,
    hangs,
    infinite,
    leaves_children,
    nan,
    none,
    nothing,
    number,
    numpy_values,
    parent_of_many,
    raises,
    reads,
    segfaults,
    sized,
    spoken,
    strings,
    too_few,
)

from ft.dist import World
from ft.errors import DataError
from ft.methods.rollouts import RewardFunction
from ft.rollout.judge import Judge, arguments, scorers_of
from ft.rollout.process import Worker
from ft.types import Example, Rollout

HERE = str(Path(__file__).parent)


# What stands around them ---------------------------------------------------------------------------------------------


def alone() -> World:
    return World(rank=0, size=1, device=torch.device("cpu"), mesh=None)  # type: ignore[arg-type]


def rollout(text: str, **columns: Any) -> Rollout:
    prompt = Example(
        tokens_L=np.array([1, 2], np.int32), mask_L=np.zeros(2, bool), source=f"rows.jsonl:{len(text)}",
        columns={"prompt": [{"role": "user", "content": "?"}], **columns},
    )  # fmt: skip
    tokens_L = np.array([ord(letter) for letter in text], np.int32)
    return Rollout(prompt=prompt, tokens_L=tokens_L, logp_L=None, finish="stop", policy_step=0)


def judge_on(rewards: Sequence[Any], notice: Any, *, world: World | None = None, **options: Any) -> Judge:
    """On functions of ``misbehaving``; texts are what tokens spell."""
    wrapped = [r if isinstance(r, RewardFunction) else RewardFunction(function=r) for r in rewards]
    return Judge(
        scorers=scorers_of(wrapped), decode=lambda ids: "".join(map(chr, ids)), notice=notice,
        world=alone() if world is None else world, **options,
    )  # fmt: skip


@define
class Judged:
    """Scores texts with functions of ``misbehaving``; keeps the notices and the judges."""

    said: list[str] = field(factory=list)
    made: list[Judge] = field(factory=list)

    def __call__(self, rewards, texts, *, timeout=20.0, workers=1, most=0.5, **columns) -> list[Rollout]:
        judge = judge_on(rewards, self.said.append, timeout=timeout, workers=workers, most_failures=most)
        self.made.append(judge)
        return judge.score([rollout(text, **columns) for text in texts])


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judged]:
    monkeypatch.setenv("PYTHONPATH", HERE)
    score = Judged()
    yield score
    for judge in score.made:
        judge.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def group(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found.append(int(stat.parent.name))
    return found


# One sample -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (raises, "AssertionError: no such answer (misbehaving.py:"),
        (exits, "SystemExit: 3"),
        (exits_at_once, "its process died (status 3)"),
        (segfaults, "its process died (signal 11)"),
        (nan, "a score of nan"),
        (infinite, "a score of inf"),
        (strings, "a score of '1'"),
        (too_few, "0 scores for 1 completions"),
        (nothing, "it returned None, not a list of scores"),
        (number, "it returned 1.0, not a list of scores"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_goes_wrong_costs_that_sample_alone_and_is_said(judged, function, why):
    found = judged([function], ["a", "bad", "four"])
    assert [r.reward for r in found] == [1.0, None, 4.0]
    (said,) = judged.said
    assert said.startswith(f"{function.__name__} failed on an answer to rows.jsonl:3: {why}")
    assert said.endswith("'bad'")


def test_a_hang_costs_the_timeout_and_that_sample(judged):
    began = time.monotonic()
    found = judged([hangs], ["a", "bad", "four"], timeout=2.0)
    assert [r.reward for r in found] == [1.0, None, 4.0] and time.monotonic() - began < 30
    assert "hangs failed on an answer to rows.jsonl:3: no answer within 2 s; its process was killed" in judged.said[0]


@pytest.mark.parametrize("function", [good, generator, numpy_values, chatty, reads])
def test_what_is_unusual_but_right_is_scored(judged, function):
    assert [r.reward for r in judged([function], ["a", "bad"])] == [1.0, 3.0]


def test_functions_may_start_processes_which_cannot_read_the_requests(judged):
    assert [r.reward for r in judged([parent_of_many], ["a", "bad"])] == [1.0, 3.0]


def test_none_is_no_failure(judged):
    assert [r.reward for r in judged([none], ["a", "bad"], most=0.0)] == [1.0, None] and not judged.said


# Several functions ----------------------------------------------------------------------------------------------------


def test_weighted_scores_are_added_up_and_a_none_is_left_out(judged):
    rewards = [RewardFunction(function=good, weight=2.0), RewardFunction(function=none, weight=10.0)]
    found = judged(rewards, ["a", "bad"])
    assert [r.reward for r in found] == [2 + 10, 6]
    assert [r.parts for r in found] == [{"good": 1.0, "none": 1.0}, {"good": 3.0}]


def test_where_one_of_them_fails_there_is_no_reward(judged):
    found = judged([good, raises], ["a", "bad"])
    assert [r.reward for r in found] == [2.0, None] and found[1].parts == {"good": 3.0}


def test_two_of_one_name_are_told_apart(judged):
    found = judged([good, RewardFunction(function=good, weight=0.5)], ["four"])
    assert found[0].parts == {"good": 4.0, "good_2": 4.0} and found[0].reward == 6


def test_too_many_failures_stop_the_run_and_show_a_sample(judged):
    with pytest.raises(DataError, match=r"the reward function misbehaving:raises fails too often") as error:
        judged([raises], ["bad", "bad", "a", "b"], most=0.25)
    assert error.value.got.startswith("2 of 4; the first: AssertionError: no such answer")
    assert "ft reward" in error.value.fix


def test_when_all_hang_the_run_does_not_wait_for_each(judged):
    began = time.monotonic()
    with pytest.raises(DataError, match="fails too often"):
        judged([hangs], ["bad"] * 40, timeout=0.7, most=0.03)
    assert time.monotonic() - began < 20  # 40 deadlines would be 28 s; it takes 1 + 2 of them


# What they are given --------------------------------------------------------------------------------------------------


def test_a_request_larger_than_any_pipe_comes_through(judged):
    found = judged([sized], ["z" * 300_000, "y" * 400_000], entry={"x": "w" * 500_000})
    assert [r.reward for r in found] == [300_000 * 2 + 500_000, 400_000 * 2 + 500_000]


def test_a_worker_that_reads_nothing_does_not_hold_up_the_run(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    worker = Worker(timeout=1.0)
    assert worker.call("misbehaving:good", {"completions": ["x"]}).scores == [1.0]
    assert worker.process is not None
    os.kill(worker.process.pid, signal.SIGSTOP)
    reply = worker.call("misbehaving:good", {"completions": ["x" * 5_000_000]})
    worker.end()
    assert reply.why == "no answer within 1 s; its process was killed"


def test_a_function_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    worker = Worker(timeout=20.0)
    reply = worker.call("misbehaving:missing", {"completions": []})
    worker.end()
    assert "cannot find 'misbehaving:missing'" in reply.why


def test_completions_come_as_messages_where_asked_and_only_known_columns(judged):
    reward = RewardFunction(function=spoken, messages=True)
    found = judged([reward], ["yes", "no"], answer="yes", unknown=1)
    assert [r.reward for r in found] == [1.0, 0.0]


def test_columns_of_rows_become_lists():
    (one,) = scorers_of([RewardFunction(function=good, options={"most": 8})])
    rows = [rollout("ab", answer=4), rollout("c", other="x")]
    assert arguments(one, rows) == {
        "prompts": [[{"role": "user", "content": "?"}]] * 2, "answer": [4, None], "other": [None, "x"],
        "completions": ["", ""], "completion_ids": [[97, 98], [99]], "most": 8,
    }  # fmt: skip


# What is left behind --------------------------------------------------------------------------------------------------


def test_a_worker_that_was_killed_while_idle_is_replaced(judged):
    judged([good], ["a"])
    (worker,) = judged.made[0].pool
    first = worker.process.pid
    os.kill(first, signal.SIGKILL)
    assert gone([first])
    assert judged.made[0].score([rollout("four")])[0].reward == 4 and worker.process.pid != first
    assert not judged.said


@pytest.mark.parametrize("how", ["hang", "close"])
def test_children_of_a_function_end_with_its_worker(judged, tmp_path, how):
    note = str(tmp_path / "pid")
    judged([leaves_children], ["a", *(["bad"] if how == "hang" else [])], timeout=3.0, note=note)
    leader = int(Path(note).read_text().split()[0])
    for judge in judged.made:
        judge.close()
    assert gone(group(leader))


PARENT = """
import sys
sys.path.insert(0, {here!r})
import misbehaving, test_judge as t
from ft.methods.rollouts import RewardFunction
from ft.rollout.judge import Judge, scorers_of
judge = Judge(scorers=scorers_of([RewardFunction(function=misbehaving.leaves_children)]), decode=lambda ids: "bad",
              timeout=60.0, workers=1, most_failures=1.0, notice=print, world=t.alone())
try:
    judge.score([t.rollout("bad", note={note!r})])
finally:
    judge.close()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_is_killed_or_interrupted_leaves_no_process(tmp_path, number):
    note = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(here=HERE, note=str(note))], env=environment, start_new_session=True,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text().endswith(str(parent.pid))) and time.monotonic() < deadline:
        time.sleep(0.02)
    leader = int(note.read_text().split()[0])
    left = group(leader)
    assert len(left) >= 3  # the worker, what ends its group, and the child
    os.killpg(parent.pid, number)  # as the terminal does
    _, errors = parent.communicate(timeout=30)
    assert gone(left)
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")


# Ranks ----------------------------------------------------------------------------------------------------------------


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), PYTHONPATH=HERE)
    torch.set_num_threads(1)
    from ft import dist

    with dist.launched() as world:
        judge = Judge(
            scorers=scorers_of([RewardFunction(function=none), RewardFunction(function=raises)]),
            decode=lambda ids: "".join(map(chr, ids)), timeout=30.0, workers=1, most_failures=0.5,
            notice=lambda text: None, world=world,
        )  # fmt: skip
        found = judge.score([rollout(text) for text in ("a", "four", "bad")])
        started = judge.pool[0].process is not None
        try:
            judge.score([rollout("bad")])
            failed = ""
        except DataError as error:
            failed = error.problem
        judge.close()
    Path(folder, str(rank)).write_text(f"{[r.reward for r in found]} {started} {failed}")


def test_only_the_first_rank_scores_and_a_failure_stops_all(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    assert (
        tmp_path / "0"
    ).read_text() == "[2.0, 8.0, None] True the reward function misbehaving:raises fails too often"
    assert (tmp_path / "1").read_text() == "[2.0, 8.0, None] False the first rank could not score the answers"
