"""A run may change its number of ranks: begun on two, taken up by one, it ends where one rank alone would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPE = """
from ft import NF4, SFT, AdamW, Batching, Constant, Data, LoRA, Model, Recipe, Save

recipe = Recipe(
    model=Model(id="nowhere/moe", family="qwen3_moe", tiny=True, dtype="float32", quant=NF4()),
    adapter=LoRA(r=4, targets=("attention", "experts")),
    data=Data(train="rows.jsonl", eval="rows.jsonl", cache=None),
    method=SFT(),
    optim=AdamW(lr=1e-3),
    schedule=Constant(),
    batch=Batching(examples=5, tokens=64),
    save=Save(every=2),
    steps=6,
)
"""


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ft", "run", "recipe.py", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {i} ", "completion": "word " * (i % 5 + 1)} for i in range(13)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines if "loss" in m]


def test_a_run_begun_on_two_ranks_is_taken_up_by_one(folder):
    run(folder, "save.dir=one")
    said = run(folder, "save.dir=two", "steps=3", "--nproc", "2")
    assert "2 on cpu" in said
    run(folder, "save.dir=two", "--resume")
    assert losses(folder / "one") == [
        (step, pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3))
        for step, loss, norm in losses(folder / "two")
    ]
    one, two = (load_file(folder / name / "final" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-5)
