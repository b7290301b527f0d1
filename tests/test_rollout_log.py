"""What is kept and said of scored answers: rollouts.jsonl, samples for the terminal, the hook, and health alarms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ft.rollout.health import Health
from ft.rollout.record import FILE, Record, middle, read, short, spread
from ft.types import Example, Rollout


def rollout(reward: float | None, text: str = "four", finish: str = "stop") -> Rollout:
    prompt = Example(
        tokens_L=np.zeros(3, np.int32), mask_L=np.zeros(3, bool), source="rows.jsonl:7",
        columns={"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "2 + 2?"}]},
    )  # fmt: skip
    return Rollout(
        prompt=prompt, tokens_L=np.zeros(5, np.int32), logp_L=None, finish=finish, policy_step=2, text=text,
        reward=reward, parts={} if reward is None else {"exact": reward},
    )  # fmt: skip


@pytest.fixture
def said() -> list[str]:
    return []


def record(folder: Path, said: list[str], **options) -> Record:
    return Record(**{"folder": folder, "most": 2, "first": True, "notice": said.append, **options})


# The file -------------------------------------------------------------------------------------------------------------


def test_a_few_answers_of_a_step_from_best_to_worst(tmp_path, said):
    kept = record(tmp_path, said)
    kept.add(2, [rollout(0.5), rollout(1.0), rollout(0.0), rollout(0.25)])
    kept.close()
    best, worst = read(tmp_path)
    assert best == {
        "step": 3, "source": "rows.jsonl:7", "prompt": "2 + 2?", "text": "four", "reward": 1.0,
        "parts": {"exact": 1.0}, "finish": "stop", "length": 5, "policy_step": 2,
    }  # fmt: skip
    assert worst["reward"] == 0.0 and not said


def test_answers_without_a_reward_stand_last():
    found = spread([rollout(None), rollout(-1.0), rollout(2.0), rollout(None)], 3)
    assert [r.reward for r in found] == [2.0, None, None]
    assert spread([rollout(1.0)], 0) == [] and len(spread([rollout(1.0)] * 2, 5)) == 2


def test_steps_that_run_again_are_written_once(tmp_path, said):
    first = record(tmp_path, said, most=1)
    for step in range(4):
        first.add(step, [rollout(float(step))])
    first.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 2, "tex')  # killed while it wrote
    second = record(tmp_path, said, most=1)
    second.begin(2)
    second.add(2, [rollout(7.0)])
    assert [(kept["step"], kept["reward"]) for kept in read(tmp_path)] == [(1, 0.0), (2, 1.0), (3, 7.0)]


def test_other_ranks_write_nothing_and_none_is_a_choice(tmp_path, said):
    record(tmp_path, said, first=False, hook=lambda *_: said.append("hook")).add(0, [rollout(1.0)])
    record(tmp_path, said, most=0).add(0, [rollout(1.0)])
    assert not list(tmp_path.iterdir()) and not said


def test_a_disk_that_fails_is_announced_once(tmp_path, said):
    (tmp_path / FILE).mkdir()
    kept = record(tmp_path, said)
    kept.add(0, [rollout(1.0)])
    kept.add(1, [rollout(1.0)])
    assert len(said) == 1 and said[0].startswith(f"cannot write {tmp_path / FILE}: Is a directory")


# Samples and the hook -------------------------------------------------------------------------------------------------


def test_two_samples_are_shown_once(tmp_path, said):
    kept = record(tmp_path, said, most=4)
    kept.add(0, [rollout(0.0, "a\nb"), rollout(0.5), rollout(1.0), rollout(None, "x" * 300, "length")])
    best, worst = kept.samples().splitlines()
    assert best == '       1  "2 + 2?" -> "four"'
    assert worst.startswith('    none  "2 + 2?" -> "xxx') and worst.endswith('xxx" (cut off)') and len(worst) < 140
    assert kept.samples() == ""
    assert (
        short(json.loads('{"reward": 0, "prompt": "p", "text": "a\\nb", "finish": "stop"}')) == '     0  "p" -> "a\\nb"'
    )
    assert middle("abcdefghijklmnop", 11) == "abc ... nop"


def test_a_hook_gets_every_answer_and_may_fail(tmp_path, said):
    got: list[tuple[int, int]] = []

    def hook(step, rollouts):
        got.append((step, len(rollouts)))
        if step == 2:
            raise RuntimeError("enough")

    kept = record(tmp_path, said, hook=hook)
    for step in range(3):
        kept.add(step, [rollout(1.0)] * 5)
    assert got == [(1, 5), (2, 5)]
    assert said == ["judging.hook failed at step 2 (RuntimeError: enough) and is not called again"]


# Health ---------------------------------------------------------------------------------------------------------------

WELL = {
    "reward": 0.5, "reward_std": 0.5, "entropy": 0.6, "ratio_inverse_max": 1.2, "mismatch_kl": 1e-5, "cut_off": 0.1,
    "groups_alike": 0.3, "unscored": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "begins", "advice"),
    [
        ({"entropy": 0.009}, "entropy is 0.009: the policy always says the same (mode collapse)", "temperature"),
        ({"ratio_inverse_max": 1000.0}, "the smallest ratio is 1 / 1e+03", "Sync more often"),
        ({"mismatch_kl": 0.1}, "sampler and trainer differ by 0.1 per token", "canary"),
        ({"cut_off": 0.75}, "75% of the answers were cut off", "Raise sampling.max_tokens"),
        ({"groups_alike": 1.0}, "100% of the groups have one reward", "too hard or too easy"),
        ({"unscored": 0.2}, "20% of the answers have no reward", "ft reward"),
    ],
)
def test_an_alarm_says_what_and_what_to_do_once(numbers, begins, advice):
    health = Health()
    assert health.look(1, WELL) == []
    (text,) = health.look(2, {**WELL, **numbers})
    assert text.startswith(begins) and advice in text
    assert health.look(3, {**WELL, **numbers}) == []


def test_a_reward_that_stays_zero_is_said_after_twenty_steps():
    flat = {**WELL, "reward": 0.0, "reward_std": 0.0}
    health = Health()
    found = [(step, text) for step in range(1, 40) for text in health.look(step, flat)]
    assert [step for step, _ in found] == [20] and "ft reward" in found[0][1]
    once = Health()
    once.look(5, WELL)
    assert not [text for step in range(6, 60) for text in once.look(step, flat)]


def test_methods_without_rewards_are_left_alone():
    assert Health().look(1, {"loss": 1.0, "entropy": 0.0}) == []
