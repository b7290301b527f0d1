"""Groups scored while others are still drawn: by real workers, under the stand-in for vLLM's server and embedded."""

from __future__ import annotations

import json
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
from attrs import evolve
from fake_vllm import Fake, _Handler
from misbehaving import counted, good, hangs, leaves_children, none, raises, segfaults
from test_embedded import PROMPTS
from test_embedded import sampler as embedded
from test_judge import HERE, alone, gone, group, judge_on
from test_methods import model
from test_vllm import prompts, recipe, sampler, told
from tiny_models import build

from ft import VLLM, Ahead, Batching, Data, Judging, Model, Save, dist
from ft.data.tokenizer import byte_tokenizer
from ft.dist import World
from ft.errors import DataError
from ft.methods.rollouts import RewardFunction
from ft.rollout.calculator import Calculator
from ft.rollout.environment import EnvironmentSampler
from ft.rollout.judge import Judge
from ft.train import online
from ft.train.loop import train
from ft.types import Example, Rollout

FOUR = [["a", "bad", "bad"], ["four", "a", "a"], ["bad", "seven77", "six666"], ["a", "bad", "five5"]]


class Judges:
    """Makes judges on functions of ``misbehaving`` and ends them; keeps what they said."""

    def __init__(self) -> None:
        self.made: list[Judge] = []
        self.said: list[list[str]] = []

    def __call__(self, *rewards: Any, workers: int = 1, most: float = 1.0, timeout: float = 20.0, **over: Any) -> Judge:
        self.said.append([])
        judge = judge_on(
            rewards, self.said[-1].append, timeout=timeout, workers=workers, most_failures=most, world=over.get("world")
        )
        self.made.append(judge)
        return judge


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judges]:
    monkeypatch.setenv("PYTHONPATH", HERE)
    made = Judges()
    yield made
    for judge in made.made:
        judge.close()


@pytest.fixture
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as world:
        yield world


def answers(texts: Sequence[str], source: str = "rows.jsonl:1", **columns: Any) -> list[Rollout]:
    """Of one prompt."""
    prompt = Example(tokens_L=np.array([1], np.int32), mask_L=np.zeros(1, bool), source=source, columns=columns)
    return [said(prompt, text) for text in texts]


def said(prompt: Example, text: str) -> Rollout:
    tokens_L = np.array([ord(letter) for letter in text], np.int32)
    return Rollout(prompt=prompt, tokens_L=tokens_L, logp_L=None, finish="stop", policy_step=0)


def draw(**columns: Any) -> list[list[Rollout]]:
    return [answers(texts, f"rows.jsonl:{i}", **columns) for i, texts in enumerate(FOUR)]


def flat(groups: Sequence[Sequence[Rollout]]) -> list[Rollout]:
    """Others of the same prompts and tokens, as a sampler gives them when all are there."""
    return [evolve(rollout) for group in groups for rollout in group]


def noted(note: Path, parent: int) -> int:
    """The worker of ``parent`` that ``leaves_children`` runs in, as soon as it does."""
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text().endswith(f" {parent}")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(note.read_text().split()[0])


# The judge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_and_what_is_said_are_the_same_however_early_they_were_begun(judges: Judges, workers: int) -> None:
    rewards = [good, RewardFunction(function=none, weight=10.0), raises]
    late, early = judges(*rewards), judges(*rewards, workers=workers)
    expected = late.score(flat(draw()))
    groups = draw()
    arrived = early.expect(12)
    for i in (3, 0, 2):  # not in order, and one of them not at all
        arrived(groups[i])
    found = early.score(flat(groups))
    assert [(r.text, r.reward, r.parts) for r in found] == [(r.text, r.reward, r.parts) for r in expected]
    assert [r.reward for r in found[3:6]] == [4 + 40 + 4, 12, 12] and found[1].reward is None
    assert judges.said[0] == judges.said[1] and len(judges.said[0]) == 3 and not early.begun


@pytest.mark.parametrize("function", [raises, segfaults, hangs])
def test_what_goes_wrong_in_a_group_that_came_early_costs_its_sample_alone(judges: Judges, function: Any) -> None:
    judge, groups = judges(function, timeout=1.0), draw()[2:]
    arrived = judge.expect(6)
    for one in groups:
        arrived(one)
    assert [r.reward for r in judge.score(flat(groups))] == [None, 7, 6, 1, None, 5]
    for line, source in zip(judges.said[0], ("rows.jsonl:2", "rows.jsonl:3"), strict=True):
        assert line.startswith(f"{function.__name__} failed on an answer to {source}: ")


def test_groups_of_a_draw_share_the_number_of_failures_after_which_no_more_is_tried(
    judges: Judges, tmp_path: Path
) -> None:
    judge = judges(counted, good, most=0.1)
    groups = [answers(["bad"] * 4, f"rows.jsonl:{i}", calls=str(tmp_path / "calls")) for i in range(5)]
    arrived = judge.expect(20)
    for one in groups:
        arrived(one)
    with pytest.raises(DataError, match="misbehaving:counted fails too often") as error:
        judge.score(flat(groups))
    assert error.value.got.startswith("3 of 20; the first: AssertionError: no such answer")
    assert (tmp_path / "calls").read_text() == "....", "the first group's, and three of its answers alone"


def test_two_draws_at_a_time_and_the_same_prompt_twice(judges: Judges) -> None:
    judge = judges(good, workers=2)
    first, second = answers(["a", "bad"]), answers(["a", "four"])
    twice = [said(first[0].prompt, text) for text in ("bad", "four")]
    one, other = judge.expect(4), judge.expect(2)
    for arrived, texts in ((one, first), (other, second), (one, twice)):
        arrived(texts)
    assert [r.reward for r in judge.score(flat([second]))] == [1, 4]
    assert [r.reward for r in judge.score(flat([first, twice]))] == [1, 3, 3, 4] and not judge.begun


def test_few_groups_keep_every_worker_busy(judges: Judges, tmp_path: Path) -> None:
    """8 answers in 2 groups for 4 workers: 4 calls of 2."""
    judge = judges(counted, workers=4)
    groups = [answers(["a"] * 4, f"rows.jsonl:{i}", calls=str(tmp_path / "calls")) for i in range(2)]
    arrived = judge.expect(8)
    for one in groups:
        arrived(one)
    judge.score(flat(groups))
    assert (tmp_path / "calls").read_text() == "...."


def test_closing_ends_what_was_begun_and_what_comes_later_starts_nothing(judges: Judges, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    judge = judges(leaves_children, timeout=60.0)
    arrived = judge.expect(9)
    for _ in range(2):  # one is being scored, one waits
        arrived(answers(["bad", "a"], note=str(note)))
    left = group(noted(note, os.getpid()))
    assert len(left) >= 3
    judge.close()
    assert gone(left)
    arrived(answers(["a"], note=str(note)))
    assert judge.pool[0].process is None and all(not thread.is_alive() for thread in judge.threads._threads)


PARENT = """
import sys, threading, time
sys.path.insert(0, {here!r})
import misbehaving, test_arrivals as t
from ft.methods.rollouts import RewardFunction
from ft.rollout.judge import Judge, scorers_of
judge = Judge(scorers=scorers_of([RewardFunction(function=misbehaving.leaves_children)]), decode=lambda ids: "bad",
              timeout=60.0, workers=1, most_failures=1.0, notice=print, world=t.alone())
try:
    arrived = judge.expect(1)
    threading.Thread(target=arrived, args=[t.answers(["bad"], note={note!r})], daemon=True).start()
    time.sleep(60)
finally:
    judge.close()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_while_it_draws_leaves_no_process_that_scores(tmp_path: Path, number: int) -> None:
    note = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(here=HERE, note=str(note))], env=environment, start_new_session=True,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    left = group(noted(note, parent.pid))
    assert len(left) >= 3  # the worker, what ends its group, and the child
    os.killpg(parent.pid, number)  # as the terminal does
    _, errors = parent.communicate(timeout=30)
    assert gone(left)
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")


def test_other_ranks_begin_nothing(judges: Judges) -> None:
    judge = judges(good, world=evolve(alone(), rank=1, size=2))
    judge.expect(2)(answers(["a", "bad"]))
    assert not judge.begun and judge.pool[0].process is None


# Samplers -------------------------------------------------------------------------------------------------------------


class Waiting(_Handler):
    """Answers the k-th prompt when the reward function was called for all k before it, and notes whether it was."""

    def completion(self, body: dict[str, Any], fault: str) -> None:
        server: Any = self.server
        if body.get("n") == 2:  # the canary asks for one
            k, deadline = len(server.held), time.monotonic() + 10
            while server.calls() < k and all(server.held) and time.monotonic() < deadline:
                time.sleep(0.01)
            server.held.append(server.calls() >= k)
        super().completion(body, fault)


@pytest.mark.parametrize("ahead", [False, True])
def test_in_a_run_each_group_is_scored_before_the_next_answers_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE)
    calls = tmp_path / "calls"
    calls.touch()
    build("llama", vocab_size=261).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Say {i}.", "calls": str(calls)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Fake() as fake:
        server: Any = fake
        server.RequestHandlerClass, server.held = Waiting, []
        server.calls = lambda: len(calls.read_text())
        one = recipe(
            model=Model(id=str(tmp_path / "model"), dtype="float32", checkpointing=False),
            data=Data(train=str(tmp_path / "rows.jsonl"), max_tokens=64, cache=None),
            sampler=VLLM(url=fake.url, canary=None, concurrency=1),
            batch=Batching(examples=3, tokens=512), judging=Judging(workers=1),
            save=Save(dir=tmp_path / "run"), steps=2,
        )  # fmt: skip
        method: Any = evolve(one.method, group=2, rewards=RewardFunction(function=counted))
        outcome = train(evolve(one, method=Ahead(method) if ahead else method))
        assert outcome.ended == "done" and server.held[:6] == [True] * 6


def test_a_prompt_that_is_asked_again_arrives_once(fake: Fake, world: World, tmp_path: Path) -> None:
    expected: list[int] = []
    came: list[list[Rollout]] = []
    made = sampler(
        world, tmp_path, url=fake.url, options={"canary": None, "concurrency": 1},
        expect=lambda answers: expected.append(answers) or came.append,
    )  # fmt: skip
    made.sync(0)
    fake.faults = ["ok", "500"]
    groups = made.rollout(asked := prompts(3), 2, 0)
    assert "trying again" in told(made)[-1] and expected == [6]
    assert [[r.prompt is p for r in one] for one, p in zip(came, asked, strict=True)] == [[True, True]] * 3
    assert [[r.tokens_L.tolist() for r in one] for one in came] == [[r.tokens_L.tolist() for r in g] for g in groups]


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        yield server


def test_the_model_in_training_hands_on_each_chunk_of_rows(world: World) -> None:
    built = model(world)
    forwards: list[int] = []
    hook = built.policy.scorer.model.register_forward_hook(lambda *_: forwards.append(1))
    came: list[tuple[int, list[Rollout]]] = []
    made = evolve(
        embedded(built, world, rows=6), expect=lambda answers: lambda group: came.append((len(forwards), group))
    )
    groups = made.rollout(PROMPTS, 3, 0)  # two prompts at a time
    hook.remove()
    assert [[r.tokens_L.tolist() for r in one] for _, one in came] == [[r.tokens_L.tolist() for r in g] for g in groups]
    assert came[0][0] == came[1][0] < came[2][0] == came[3][0] == len(forwards)


@pytest.mark.parametrize("environment", [None, Calculator()])
def test_answers_of_several_turns_are_scored_at_their_end(world: World, environment: Any) -> None:
    one = recipe(model=Model(id="-", family="llama", tiny=True), environment=environment)
    started = online.start(one, model(world), world, byte_tokenizer(), None, lambda line: None)
    made: Any = started.sampler
    if isinstance(made, EnvironmentSampler):
        made = made.sampler
    assert made.expect == (started.judge.expect if environment is None else None)  # type: ignore[union-attr]
    started.close()
