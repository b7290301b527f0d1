"""SmolLM2-135M-Instruct learns to add from rewards alone, with each sampler and several seeds: `make demo-rl`.

    python bench/rl.py [--samplers embedded vllm] [--seeds 0 1 2] [NAME=VALUE ...]

Each run is `ft run recipes/smollm2_grpo.py seed=S` (or smollm2_grpo_vllm.py, whose server is a real vLLM in the
environment that $FT_VLLM_PYTHON names). Accuracy is of greedy answers to the held-out questions, where the last number
said is the right one; the rewards are of the answers sampled for training, over the first and the last ten steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import record

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "demo-rl"
RECIPES = {"embedded": "recipes/smollm2_grpo.py", "vllm": "recipes/smollm2_grpo_vllm.py"}
SHOWN = {
    "accuracy_before": "held-out before",
    "accuracy_after": "after",
    "reward_first": "reward first",
    "reward_last": "last",
    "minutes": "minutes",
    "generate_s": "generate s",
    "train_s": "train s",
}


def run(sampler: str, seed: int, words: Sequence[str]) -> dict[str, Any]:
    name = f"{sampler}-{seed}"
    began = time.time()
    command = ["ft", "run", RECIPES[sampler], f"save.dir={RUNS / name}", f"seed={seed}", *words]
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text().splitlines()]
    return {"sampler": sampler, "seed": seed, "minutes": (time.time() - began) / 60, **numbers(lines)}


def numbers(lines: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [line for line in lines if "loss" in line]
    accuracy = [line["eval/reward"] for line in lines if "eval/reward" in line]
    reward = [line["reward"] for line in steps]
    return {
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy[-1],
        "reward_first": statistics.mean(reward[:10]),
        "reward_last": statistics.mean(reward[-10:]),
        "generate_s": statistics.mean(line["generate_s"] for line in steps),
        "train_s": statistics.mean(line["train_s"] for line in steps),
        "accuracies": accuracy,
        "mismatch_kl": max(line["mismatch_kl"] for line in steps),
        "steps": len(steps),
    }


def table(found: list[dict[str, Any]]) -> None:
    print(f"\n{'sampler':10}{'seed':>5}" + "".join(f"{title:>17}" for title in SHOWN.values()))
    for line in found:
        print(f"{line['sampler']:10}{line['seed']:>5}" + "".join(f"{line[key]:17.3f}" for key in SHOWN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="of the recipes, as in steps=20")
    args = parser.parse_args()
    found = []
    for sampler in args.samplers:
        for seed in args.seeds:
            shutil.rmtree(RUNS / f"{sampler}-{seed}", ignore_errors=True)
            found.append(run(sampler, seed, args.overrides))
            record("rl", found[-1])
    table(found)
    assert all(line["accuracy_after"] > line["accuracy_before"] for line in found)


if __name__ == "__main__":
    main()
