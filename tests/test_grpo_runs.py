"""Runs of GRPO on a random model: resumed to the bit, and the same on two ranks as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

from ft import (
    GRPO,
    AdamW,
    Batching,
    Constant,
    Curriculum,
    Data,
    Judging,
    LoRA,
    Model,
    Recipe,
    Replay,
    Reroll,
    RewardFunction,
    Sampling,
    Save,
)  # fmt: skip
from ft.recipe import dump
from ft.rollout.embedded import EmbeddedSampler
from ft.rollout.rewards import matches
from ft.train import loop
from ft.train.loop import train

TINY = Model(id="-", family="llama", dtype="float32", tiny=True)
ADAPTER = LoRA(r=4, alpha=8.0)


@pytest.fixture(autouse=True)
def calm() -> None:
    torch.set_num_threads(1)


def run(folder: Path, name: str, **changes: Any) -> Recipe:
    """Six prompts, two a step, rewarded where an answer of a random model has a letter of the first half in it."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(6)))
    scored = RewardFunction(function=matches, options={"pattern": changes.pop("pattern", ".*[a-mA-M].*")})
    method: Any = GRPO(rewards=scored, group=4, sampling=Sampling(max_tokens=6), **changes.pop("options", {}))
    base = Recipe(
        model=TINY, adapter=ADAPTER, data=Data(train=str(rows), cache=None), method=method, optim=AdamW(lr=1e-2),
        schedule=Constant(), batch=Batching(examples=2, tokens=128), save=Save(dir=folder / name, every=2),
        judging=Judging(workers=1), steps=4,
    )  # fmt: skip
    return evolve(base, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


@pytest.mark.parametrize("options", [{}, {"iterations": 2, "resample": 1}], ids=["each step", "two steps on a batch"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    train(run(tmp_path, "whole", options=options))
    train(run(tmp_path, "parts", options=options, steps=2))
    train(run(tmp_path, "parts", options=options), resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    told = lines(tmp_path / "whole")
    assert any(line.get("grad_norm", 0) > 0 for line in told)
    if "iterations" in options:
        ratios = [line["ratio_max"] for line in told if "ratio_max" in line]
        assert ratios[0] == ratios[2] == 1 < max(ratios), "the second step on a batch is off the policy that drew it"


def test_the_clock_of_the_first_step_starts_when_the_sampler_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server is started by the first ``sync``: before the first step is timed, also of a resumed run."""
    said: list[Any] = []
    window = loop.Window
    monkeypatch.setattr(EmbeddedSampler, "sync", lambda self, step: said.append(step))
    monkeypatch.setattr(loop, "Window", lambda: said.append("clock") or window())
    train(run(tmp_path, "x", steps=2))
    assert said == [0, "clock", 0, "clock", 1, "clock"]
    said.clear()
    train(run(tmp_path, "x", steps=3), resume=True)
    assert said == [2, "clock", 2, "clock"]
    said.clear()
    train(run(tmp_path, "x", steps=3), resume=True)
    assert said == ["clock"], "nothing is left to do"


RARE = "[a-mA-M].*"  # one answer in eight
MEMORY: dict[str, dict[str, Any]] = {
    "replay": {"replay": Replay(batches=2)},
    "reroll": {"reroll": Reroll(after=1, share=0.5)},
    "curriculum": {"curriculum": Curriculum(among=2)},
    "all": {"replay": Replay(), "reroll": Reroll(after=1), "curriculum": Curriculum(among=2)},
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", MEMORY)
def test_what_earlier_batches_taught_is_taken_up_again(tmp_path: Path, name: str) -> None:
    options = MEMORY[name]
    train(run(tmp_path, "whole", options=options, pattern=RARE, steps=6, seed=2))
    train(run(tmp_path, "parts", options=options, pattern=RARE, steps=3, seed=2))
    train(run(tmp_path, "parts", options=options, pattern=RARE, steps=6, seed=2), resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    asked = [(tmp_path / folder / "rollouts.jsonl").read_text() for folder in ("whole", "parts")]
    assert asked[0] == asked[1], "the same answers to the same prompts"
    kept = [(tmp_path / folder / "step-000006" / "meta.json").read_text() for folder in ("whole", "parts")]
    assert kept[0] == kept[1]
    told = [line for line in lines(tmp_path / "parts") if line.get("step", 0) > 3]
    acted = {"replay": "groups_replayed", "reroll": "prompts_again", "curriculum": "solved_before"}
    for option, number in acted.items():
        if option in options:
            assert any(line.get(number, 0) > 0 for line in told), f"{option} had something to do after the stop"


def test_two_ranks_draw_and_learn_what_one_does(tmp_path: Path) -> None:
    one = run(tmp_path, "one", steps=4, pattern=RARE, options=MEMORY["all"], optim=AdamW(lr=1e-3, eps=1e-3))
    train(one)
    (tmp_path / "recipe.json").write_text(json.dumps(dump(evolve(one, save=Save(dir=tmp_path / "two")))))
    command = [sys.executable, "-m", "ft", "run", "recipe.json", "--nproc", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = [[line for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    for a, b in zip(*found, strict=True):
        for number in ("reward", "length", "groups_alike", "groups_replayed", "prompts_again"):
            assert a[number] == b[number], number
        assert (a["loss"], a["entropy"]) == pytest.approx((b["loss"], b["entropy"]), abs=1e-5)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=2e-5)
