"""Answers of several turns, with a scripted sampler whose tokens are letters: 0 ends a turn, 1 begins the next."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from attrs import evolve, field, frozen

from ft.data.tokenizer import byte_tokenizer
from ft.methods.credit import _example
from ft.rollout.calculator import Calculator, calculate
from ft.rollout.environment import EnvironmentSampler, reply_ids
from ft.rollout.rewards import environment
from ft.types import Example, Rollout

END, BEGIN = 0, 1


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def words(tokens: Iterable[int]) -> str:
    return "".join(chr(token) for token in tokens if token > 1)


@frozen
class Scripted:
    """Says the next line of the script of each prompt, and keeps what it was asked."""

    script: dict[str, list[str]]  # by the prompt's first letter
    asked: list[tuple[int, list[str]]] = field(factory=list)
    groups: list[list[int | None]] = field(factory=list)

    def sync(self, step: int) -> None: ...

    def rollout(self, prompts, n, step, *, greedy=False):
        self.asked.append((step, [words(p.tokens_L) for p in prompts]))
        self.groups.append([p.group for p in prompts])
        return [[self._turn(prompt, step) for _ in range(n)] for prompt in prompts]

    def _turn(self, prompt: Example, step: int) -> Rollout:
        turn = prompt.tokens_L.tolist().count(END)
        text = self.script[chr(prompt.tokens_L[0])][turn]
        cut = text.endswith("...")
        tokens_L = np.array(ids(text) + ([] if cut else [END]), np.int32)
        logp_L = np.full(len(tokens_L), -0.5 - turn, np.float32)
        return Rollout(prompt=prompt, tokens_L=tokens_L, logp_L=logp_L, finish="length" if cut else "stop",
                       policy_step=step)  # fmt: skip


def prompt(text: str, answer: str) -> Example:
    tokens_L = np.array(ids(text), np.int32)
    return Example(tokens_L=tokens_L, mask_L=np.zeros(len(text), bool), source=text, columns={"answer": answer})


def sampler(script: dict[str, list[str]], **options) -> EnvironmentSampler:
    known = {"turns": 4, "longest": 1000, "environment": Calculator()} | options
    return EnvironmentSampler(
        sampler=Scripted(script), decode=words, reply_ids=lambda text: [END, *ids(text), BEGIN], **known
    )


def test_turns_and_replies_alternate_and_only_turns_are_trained():
    made = sampler({"a": ["<calc>2*3</calc>", "6"]})
    ((found,),) = made.rollout([prompt("a?", "6")], 1, 5)
    assert words(found.tokens_L) == "<calc>2*3</calc><result>6</result>6"
    assert found.tokens_L.tolist() == [*ids("<calc>2*3</calc>"), END, *ids("<result>6</result>"), BEGIN, *ids("6"), END]
    assert found.mask_L is not None and found.logp_L is not None
    assert found.mask_L.tolist() == [True] * 17 + [False] * 19 + [True] * 2
    assert found.logp_L.tolist() == [-0.5] * 17 + [0.0] * 19 + [-1.5] * 2
    assert (found.finish, found.policy_step) == ("stop", 5)
    example = _example(found, 2.0, 0)
    assert example.mask_L.tolist() == [False] * 2 + found.mask_L.tolist()
    assert words(example.tokens_L) == "a?<calc>2*3</calc><result>6</result>6"


def test_what_was_sampled_is_asked_on_from_as_it_was():
    made = sampler({"a": ["<calc>1</calc>", "1"], "b": ["2"]})
    first, second = made.rollout([prompt("a?", "1"), prompt("b?", "2")], 2, 0)
    (step, begun), (later, went_on) = made.sampler.asked  # type: ignore[attr-defined]
    assert begun == ["a?", "b?"] and went_on == ["a?<calc>1</calc><result>1</result>"] * 2
    assert step == 0 and later != step  # other draws
    assert [len(r.tokens_L) for r in second] == [2, 2] and len(first) == 2
    assert all(r.policy_step == 0 for r in first)


def test_later_turns_are_seeded_by_the_answer():
    """Two answers to each of two prompts: numbers 6, 7 and 2, 3 where their groups are 3 and 1."""
    made = sampler({"a": ["<calc>1</calc>", "1"], "b": ["<calc>2</calc>", "2"]})
    asked = [evolve(prompt("a?", "1"), group=3), evolve(prompt("b?", "2"), group=1)]
    made.rollout(asked, 2, 0)
    assert made.sampler.groups == [[3, 1], [6, 7, 2, 3]]  # type: ignore[attr-defined]


def test_the_environments_reward_is_a_column():
    made = sampler({"a": ["<calc>2*3</calc>", "it is 6"], "b": ["7"], "c": ["6"]}, environment=Calculator(cost=0.25))
    flat = [r for (r,) in made.rollout([prompt(f"{name}?", "6") for name in "abc"], 1, 0)]
    columns = [r.prompt.columns["environment"] for r in flat if r.prompt.columns]
    assert columns == [0.75, 0.0, 1.0]
    assert environment([""] * 3, columns) == [0.75, 0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "script", "text"),
    [
        ({"turns": 2}, ["<calc>1</calc>"] * 9, "<calc>1</calc><result>1</result><calc>1</calc>"),
        ({"longest": 36}, ["<calc>1</calc>"] * 9, "<calc>1</calc>"),
        ({}, ["<calc>1</calc>", "so..."], "<calc>1</calc><result>1</result>so..."),
    ],
)
def test_limits_cut_an_answer_off_after_what_the_model_said(options, script, text):
    made = sampler({"a": script}, **options)
    ((found,),) = made.rollout([prompt("a?", "1")], 1, 0)
    assert words(found.tokens_L) == text and found.finish == "length"
    assert found.mask_L is not None and found.mask_L[-1]


def test_the_calculator_answers_no_more_than_it_was_told_to():
    made = sampler({"a": ["<calc>1</calc>"] * 9}, environment=Calculator(most=1))
    ((found,),) = made.rollout([prompt("a?", "1")], 1, 0)
    assert words(found.tokens_L) == "<calc>1</calc><result>1</result><calc>1</calc>" and found.finish == "stop"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("17 * (2 + 3)", "85"), ("-7 // 2", "-4"), ("1 / 4", "0.25"), (" 2 - -2 ", "4"), ("1 / 0", "error"),
        ("__import__('os')", "error"), ("9 ** 9 ** 9", "error"), ("(" * 300, "error"), ("", "error"),
        ("'a' * 3", "error"),
    ],
)  # fmt: skip
def test_arithmetic_and_nothing_else(text, value):
    assert calculate(text) == value


def test_a_reply_stands_between_two_turns_as_the_template_has_it():
    tokenizer = byte_tokenizer()
    found = tokenizer.decode(reply_ids(tokenizer, "<result>6</result>"))
    assert found == "<|im_end|>\n<|im_start|>user\n<result>6</result><|im_end|>\n<|im_start|>assistant\n"


RECIPE = """
from ft import GRPO, AdamW, Batching, Data, Model, Recipe, Sampling
from ft.rollout.rewards import environment



recipe = Recipe(
    model=Model(id="nowhere/llama", family="llama", tiny=True, dtype="float32"),
    data=Data(train="rows.jsonl", cache=None, max_tokens=200),
    method=GRPO(rewards=environment, group=2, sampling=Sampling(max_tokens=8)),
    environment=talker.Talker(),
    turns=3, batch=Batching(examples=2, tokens=1024), steps=2,
)
"""

TALKER = """
from attrs import frozen

@frozen
class Talker:
    def reset(self, columns):
        return 0
    def step(self, turns, said):
        return turns + 1, "go on" if turns < 2 else None
    def reward(self, turns):
        return float(turns)
"""


def test_a_run_with_an_environment(tmp_path, monkeypatch):
    from ft.recipe import dumps, load
    from ft.train.loop import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "talker.py").write_text(TALKER)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "x.py").write_text("import talker\n" + RECIPE)
    recipe = load("x.py")
    assert '"type": "talker:Talker"' in dumps(recipe)
    assert train(recipe).ended == "done"
    kept = (tmp_path / "runs" / "x" / "rollouts.jsonl").read_text().splitlines()
    assert len(kept) == 2 * 4 and all('"parts":{"environment":' in line for line in kept)
