"""SFT side by side: ft against TRL's SFTTrainer on the same model, the same rows and the same LoRA, in turns.

    python bench/sft.py --model models/HuggingFaceTB/SmolLM2-135M-Instruct --rounds 3

Each run is a fresh process. Tokens are those of the rows (padding is not counted); tokens/s leaves out the first
step, which is told apart as the time from the start of the process to its end. Memory is the process's peak.
Both train every token, so that the losses can be compared; TRL runs as its defaults are, but for what the recipe fixes.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STARTED = time.time()
sys.path.insert(0, str(Path(__file__).parent))
EXAMPLES = 16


def make_rows(path: Path, count: int, seed: int) -> None:
    """Chat rows of mixed length: log-normal, from a dozen tokens to several hundred."""
    rng = random.Random(seed)
    words = (
        "the sum of two numbers is larger than either when both are positive and one asks how many there are".split()
    )
    with path.open("w") as file:
        for _ in range(count):
            length = min(400, int(rng.lognormvariate(4.0, 0.9)) + 8)
            text = [rng.choice(words) for _ in range(length)]
            cut = max(2, length // 3)
            messages = [
                {"role": "user", "content": " ".join(text[:cut])},
                {"role": "assistant", "content": " ".join(text[cut:])},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def run_ft(args: argparse.Namespace) -> dict[str, Any]:
    from ft import SFT, AdamW, Batching, Constant, Data, LoRA, Model, Recipe, Save
    from ft.train.loop import train

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            model=Model(id=args.model, dtype=args.dtype, checkpointing=args.checkpointing),
            adapter=LoRA(r=16, alpha=32.0, targets=("all-linear",)),
            data=Data(train=args.rows, mask="all", max_tokens=1024, cache=None),
            method=SFT(),
            optim=AdamW(lr=1e-4),
            schedule=Constant(),
            batch=Batching(examples=EXAMPLES, tokens=args.tokens),
            save=Save(dir=Path(folder) / "run", every=0),
            steps=args.steps,
        )
        train(recipe)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    first, last = steps[0], steps[-1]
    return {
        "first_step_s": first["time"] - STARTED,
        "tokens_per_s": (last["tokens"] - first["tokens"]) / (last["time"] - first["time"]),
        "losses": [line["loss"] for line in steps],
    }


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen: list[tuple[float, float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((time.time(), float(state.num_input_tokens_seen), 0.0))

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=args.trl_batch,
            gradient_accumulation_steps=EXAMPLES // args.trl_batch,
            max_steps=args.steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=args.checkpointing,
            max_length=1024,
            include_num_input_tokens_seen="non_padding",
            model_init_kwargs={"dtype": getattr(torch, args.dtype)},
            packing=args.trl_packing,
        )
        trainer = SFTTrainer(
            model=args.model,
            args=config,
            train_dataset=load_dataset("json", data_files=args.rows, split="train", cache_dir=folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (t0, n0, _), (t1, n1, _) = seen[0], seen[-1]
    return {"first_step_s": t0 - STARTED, "tokens_per_s": (n1 - n0) / (t1 - t0), "losses": losses}


def worker(args: argparse.Namespace) -> None:
    result = {"ft": run_ft, "trl": run_trl}[args.worker](args)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(args.result).write_text(json.dumps(result))


def compare(args: argparse.Namespace) -> None:
    from common import in_turns, ratios, record

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.rows is None:
            args.rows = str(folder / "rows.jsonl")
            make_rows(Path(args.rows), EXAMPLES * args.steps, args.seed)
        runs = in_turns(__file__, ["--rows", args.rows], args.rounds, hidden=("losses",))
    summary: dict[str, Any] = {**ratios(runs, ("tokens_per_s", "first_step_s", "peak_mb"))}
    ours, theirs = (runs[who][0]["losses"] for who in ("ft", "trl"))
    summary["losses"] = {"ft": [ours[0], ours[-1]], "trl": [theirs[0], theirs[-1]]}
    print(f"loss first -> last: ft {ours[0]:.3f} -> {ours[-1]:.3f}, trl {theirs[0]:.3f} -> {theirs[-1]:.3f}")
    record("sft", {"args": {k: v for k, v in vars(args).items() if k not in ("rows", "result", "worker")}, **summary})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1024, help="ft's micro-batch, in positions")
    parser.add_argument("--trl-batch", type=int, default=4, help="TRL's micro-batch, in rows")
    parser.add_argument("--trl-packing", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", help="chat rows; by default made from the seed")
    parser.add_argument("--worker", choices=["ft", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    worker(args) if args.worker else compare(args)


if __name__ == "__main__":
    main()
