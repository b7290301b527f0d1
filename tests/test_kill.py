"""kill -9 during a run that saves after every step: it resumes, and ends in the same bits as a run left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

RECIPE = """
from ft import SFT, AdamW, Batching, Data, LoRA, Model, Recipe, Save

recipe = Recipe(
    model=Model(id="nowhere/llama", family="llama", tiny=True, dtype="float32"),
    adapter=LoRA(r=4, targets=("all-linear",), dropout=0.1),
    data=Data(train="rows.jsonl", cache=None),
    method=SFT(),
    optim=AdamW(lr=1e-2),
    batch=Batching(examples=3, tokens=128),
    save=Save(every=1, keep=2),
    steps=60,
)
"""


def run(folder: Path, name: str, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ft", "run", "recipe.py", f"save.dir={name}", *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-??????"))


def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    rows = [{"prompt": f"say {i} ", "completion": "word " * (i % 5 + 1)} for i in range(11)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.py").write_text(RECIPE)
    straight = run(tmp_path, "straight")
    rng, killed = random.Random(1), 0
    for attempt in range(3):
        known = set(checkpoints(tmp_path / "killed"))
        process = run(tmp_path, "killed", *(["--resume"] if attempt else []))
        deadline = time.time() + 150
        while process.poll() is None and time.time() < deadline:
            if len(set(checkpoints(tmp_path / "killed")) - known) >= 2:  # it trains, and saves all the time
                time.sleep(rng.uniform(0, 0.2))
                process.send_signal(signal.SIGKILL)
                killed += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.005)
    assert killed >= 2, "the run was over before it could be killed"
    finish(run(tmp_path, "killed", "--resume"))
    finish(straight)
    for name in ("adapter_model", "optimizer"):
        ours, theirs = (
            load_file(tmp_path / run_name / "step-000060" / f"{name}.safetensors")
            for run_name in ("killed", "straight")
        )
        assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
