"""Whole runs of tiny models: what a run promises, from recipe to folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from attrs import frozen
from safetensors.torch import load_file

from ft import NF4, SFT, AdamW, Batching, Constant, Data, Eval, Log, LoRA, Model, Recipe, Save
from ft.errors import CapacityError, CheckpointError, ModelError, NumericsError, RunFolderError
from ft.train.loop import train


@frozen(kw_only=True)
class Interrupted(SFT):
    """SFT during which somebody presses Ctrl+C in step ``at``, or which returns NaN in ``nan_steps``."""

    at: ClassVar[int | None] = None
    nan_steps: ClassVar[tuple[int, ...]] = ()
    now: ClassVar[int] = 0

    def examples(self, step, ctx):
        Interrupted.now = step
        if step == Interrupted.at:
            Interrupted.at = None
            os.kill(os.getpid(), signal.SIGINT)
        return super().examples(step, ctx)

    def loss(self, logprobs, batch, counts):
        out = super().loss(logprobs, batch, counts)
        bad = Interrupted.now in Interrupted.nan_steps and logprobs.logp_T.requires_grad
        return attrs.evolve(out, loss=out.loss * float("nan")) if bad else out


@pytest.fixture(autouse=True)
def calm():
    torch.set_num_threads(1)
    Interrupted.at, Interrupted.nan_steps = None, ()


def write_rows(path: Path, count: int = 11, word: str = "word") -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{word} " * (i % 5 + 1)},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(tmp_path: Path, name: str = "run", **changes) -> Recipe:
    """Three rows a step of eleven: steps 4, 8, ... run over the end of an epoch."""
    rows = tmp_path / "rows.jsonl"
    base = Recipe(
        model=Model(id="nowhere/llama", family="llama", tiny=True, dtype="float32"),
        adapter=LoRA(r=4, targets=("all-linear",), dropout=0.1),
        data=Data(train=str(rows if rows.exists() else write_rows(rows)), cache=None),
        method=Interrupted(),
        optim=AdamW(lr=1e-2),
        batch=Batching(examples=3, tokens=128),
        save=Save(dir=tmp_path / name, every=2),
        steps=6,
    )
    return attrs.evolve(base, **changes)


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = folder / f"step-{step:06d}"
    return {f"{f.stem}/{k}": v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


MOE = {
    "model": Model(id="nowhere/moe", family="qwen3_5_moe_text", tiny=True, dtype="float32", quant=NF4()),
    "adapter": LoRA(r=4, targets=("attention", "experts")),
}


@pytest.mark.parametrize("changes", [{}, {"adapter": None}, MOE], ids=["lora", "full", "moe-qlora"])
def test_stop_and_resume_is_bitwise_equal_to_not_stopping(tmp_path, changes):
    straight = recipe(tmp_path, "straight", **changes)
    assert train(straight).ended == "done"
    stopped = recipe(tmp_path, "stopped", **changes)
    for at in (2, 4):  # in the middle of an epoch, and at its edge
        Interrupted.at = at
        outcome = train(stopped, resume=at > 2)
        assert (outcome.ended, outcome.step) == ("stopped", at + 1)
    assert train(stopped, resume=True).ended == "done"
    assert same(state(tmp_path / "straight", 6), state(tmp_path / "stopped", 6))
    lines = [line for line in metrics(tmp_path / "stopped") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [m["loss"] for m in metrics(tmp_path / "straight") if "loss" in m]


def test_a_run_learns_whatever_its_micro_batch(tmp_path):
    for name, tokens in (("large", 128), ("small", 64)):
        train(recipe(tmp_path, name, adapter=None, steps=15, batch=Batching(examples=3, tokens=tokens)))
    large, small = ([m["loss"] for m in metrics(tmp_path / n) if "loss" in m] for n in ("large", "small"))
    assert large[-1] < 0.5 * large[0]
    assert small == pytest.approx(large, rel=1e-3)


def test_a_non_finite_step_changes_nothing_and_names_its_rows(tmp_path):
    Interrupted.nan_steps = (2,)
    outcome = train(recipe(tmp_path, save=Save(dir=tmp_path / "run", every=1, keep=9)))
    assert outcome.ended == "done"
    before, after = (state(tmp_path / "run", step) for step in (2, 3))
    assert same(before, after)
    kept = json.loads((tmp_path / "run" / "bad_batches" / "step-000002-rank-0.json").read_text())
    assert any("rows.jsonl:" in source for batch in kept["batches"] for source in batch["sources"])


def test_non_finite_steps_in_a_row_end_the_run_with_good_weights_saved(tmp_path):
    Interrupted.nan_steps = (2, 3, 4, 5)
    with pytest.raises(NumericsError, match="2 steps in a row"):
        train(recipe(tmp_path, log=Log(patience=2)))
    assert all(t.isfinite().all() for t in state(tmp_path / "run", 2).values())


def test_evaluation_keeps_the_best_and_stops_early(tmp_path):
    data = Data(
        train=str(write_rows(tmp_path / "rows.jsonl")), eval=str(write_rows(tmp_path / "e.jsonl", 5)), cache=None
    )
    outcome = train(
        recipe(
            tmp_path,
            data=data,
            optim=AdamW(lr=1.0),  # far too high: it gets worse after the first evaluation
            schedule=Constant(),
            eval=Eval(every=1, patience=2),
            save=Save(dir=tmp_path / "run", every=1, keep=1),
            steps=40,
        )
    )
    evals = [m["eval/loss"] for m in metrics(tmp_path / "run") if "eval/loss" in m]
    assert outcome.ended == "early" and outcome.step < 40
    assert outcome.best == min(evals) and min(evals[-2:]) > min(evals)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    train(recipe(tmp_path, steps=2))
    with pytest.raises(RunFolderError, match="occupied"):
        train(recipe(tmp_path, steps=2))


def test_changed_data_or_recipe_is_refused_on_resume(tmp_path):
    train(recipe(tmp_path, steps=2))
    with pytest.raises(CheckpointError, match=r"optim\.lr"):
        train(recipe(tmp_path, steps=4, optim=AdamW(lr=0.5)), resume=True)
    write_rows(tmp_path / "rows.jsonl", word="other")
    with pytest.raises(CheckpointError, match="data"):
        train(recipe(tmp_path, steps=4), resume=True)


def test_a_full_run_leaves_a_folder_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(recipe(tmp_path, adapter=None, steps=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32)
    saved = load_file(tmp_path / "run" / "step-000002" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], t) for name, t in saved.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final")("a").input_ids == [97]


def test_a_saved_adapter_can_be_gone_on_from(tmp_path):
    train(recipe(tmp_path, "first", steps=2))
    start = LoRA(r=4, targets=("all-linear",), dropout=0.1, init=tmp_path / "first" / "final")
    train(recipe(tmp_path, "second", adapter=start, steps=1, optim=AdamW(lr=1e-30)))
    first, second = (load_file(tmp_path / n / "final" / "adapter_model.safetensors") for n in ("first", "second"))
    assert same(first, second)


def test_a_model_that_is_nowhere_is_one_message(tmp_path):
    with pytest.raises(ModelError, match="neither on this machine nor to be had"):
        train(recipe(tmp_path, model=Model(id="nowhere/llama")))


def test_a_model_too_large_for_this_machine_is_refused_before_its_weights_are_looked_for(tmp_path):
    from transformers import AutoConfig

    from ft.data.tokenizer import byte_tokenizer

    folder = tmp_path / "huge"
    AutoConfig.for_model("llama", hidden_size=65536, intermediate_size=2**18, num_hidden_layers=96).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(CapacityError, match="cannot hold this run") as caught:
        train(recipe(tmp_path, model=Model(id=str(folder))))
    assert "--tiny" in str(caught.value) and "free" in str(caught.value)
