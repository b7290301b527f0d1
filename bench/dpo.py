"""DPO side by side: ft against TRL's DPOTrainer on the same model, the same pairs and the same LoRA, in turns.

    python bench/dpo.py --rounds 3                                    # pairs of sums, two short answers each
    python bench/dpo.py --prompt-words 400 --answer-words 50          # long prompts, short answers
    python bench/dpo.py --answer-words 150 --prompt-words 150
    python bench/dpo.py --accuracy                                    # held-out preferences before and after, ft alone

Each run is a fresh process. Every step takes all pairs, so that both do the same work from the same weights. Tokens
are those of the pairs as they stand, each prompt counted twice and padding never; tokens/s leaves out the first step,
which is told apart as the time from the start of the process to its end. Memory is the process's peak. Pairs are
strings with the template already in them, so that both read the same tokens; the log-probs of the first step show it.
TRL runs as its defaults are, but for what the recipe fixes.
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
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
SUMS = HERE.parent / "recipes" / "data" / "pairs.jsonl"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BETA, LR = 0.1, 1e-4
WORDS = "the sum of two numbers is larger than either when both are positive and one asks how many there are".split()
METRICS = ("loss", "logps/chosen", "logps/rejected", "rewards/margins")


def make_pairs(args: argparse.Namespace, path: Path, tokenizer: Any) -> int:
    """Write ``args.pairs`` pairs of strings; the tokens in them, each prompt counted with both of its answers."""
    rng = random.Random(args.seed)
    if args.prompt_words:
        texts = [[_words(rng, n) for n in (args.prompt_words, *[args.answer_words] * 2)] for _ in range(args.pairs)]
    else:
        rows = rng.sample([json.loads(line) for line in SUMS.read_text().splitlines()], args.pairs)
        texts = [[row[name][-1]["content"] for name in ("prompt", "chosen", "rejected")] for row in rows]
    tokens = 0
    with path.open("w") as file:
        for asked, *answers in texts:
            turn = [{"role": "user", "content": asked}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            tokens += sum(len(tokenizer(prompt + answer)["input_ids"]) + 1 for answer in answers)
            file.write(json.dumps({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}) + "\n")
    return tokens


def _words(rng: random.Random, mean: int) -> str:
    """``mean`` words or so: log-normal."""
    return " ".join(rng.choices(WORDS, k=max(1, int(mean * rng.lognormvariate(-0.125, 0.5)))))


def make_model(folder: Path, tokenizer: Any) -> str:
    """A small random llama with the tokenizer's vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_ft(args: argparse.Namespace) -> dict[str, Any]:
    from ft import DPO, AdamW, Batching, Constant, Data, LoRA, Model, Recipe, Save
    from ft.train.loop import train

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            model=Model(id=args.model, dtype=args.dtype, checkpointing=args.checkpointing),
            adapter=LoRA(r=16, alpha=32.0, targets=("attention", "mlp")),
            data=Data(train=args.rows, max_tokens=args.tokens // 2, overlong="raise", cache=None),
            method=DPO(beta=BETA),
            optim=AdamW(lr=LR),
            schedule=Constant(),
            batch=Batching(examples=args.pairs, tokens=args.tokens),
            save=Save(dir=Path(folder) / "run", every=0),
            steps=args.steps,
        )
        train(recipe)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return _result([line["time"] for line in steps], steps)


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.time())

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=BETA,
            per_device_train_batch_size=args.trl_batch,
            gradient_accumulation_steps=args.pairs // args.trl_batch,
            max_steps=args.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=args.checkpointing,
            max_length=args.tokens // 2,
            model_init_kwargs={"dtype": getattr(torch, args.dtype)},
        )
        trainer = DPOTrainer(
            model=args.model,
            args=config,
            train_dataset=load_dataset("json", data_files=args.rows, split="train", cache_dir=folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return _result(ends, steps)


def _result(ends: list[float], steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "first_step_s": ends[0] - STARTED,
        "step_s": (ends[-1] - ends[0]) / (len(ends) - 1),
        **{name: [step[name] for step in steps] for name in METRICS},
    }


def worker(args: argparse.Namespace) -> None:
    result = {"ft": run_ft, "trl": run_trl}[args.worker](args)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(args.result).write_text(json.dumps(result))


def compare(args: argparse.Namespace) -> None:
    from common import in_turns
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), AutoTokenizer.from_pretrained(args.model)
        args.rows = str(folder / "pairs.jsonl")
        tokens = make_pairs(args, Path(args.rows), tokenizer)
        if args.random:
            args.model = make_model(folder / "model", tokenizer)
        runs = in_turns(__file__, ["--rows", args.rows, "--model", args.model], args.rounds, hidden=METRICS)
    for run in (*runs["ft"], *runs["trl"]):
        run["tokens_per_s"] = tokens / run["step_s"]
    report(args, runs, tokens)


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], tokens: int) -> None:
    """Medians and their ratios; stops where the first steps differ, since the two did not do the same work then."""
    from common import ratios, record

    print(f"\n{args.pairs} pairs of {tokens:,} tokens a step", end="")
    found = ratios(runs, ("tokens_per_s", "first_step_s", "peak_mb"))
    summary: dict[str, Any] = {"tokens": tokens, **found}
    ours, theirs = runs["ft"][0], runs["trl"][0]
    for key in METRICS:
        summary[key] = {who: [runs[who][0][key][0], runs[who][0][key][-1]] for who in runs}
        print(f"{key:16}" + ", ".join(f"{who} {a:.4f} -> {b:.4f}" for who, (a, b) in summary[key].items()))
    slack = 1e-3 if args.dtype == "float32" else 0.05
    for key in METRICS[:3]:
        a, b = ours[key][0], theirs[key][0]
        if abs(a - b) > slack * max(1.0, abs(b)):
            sys.exit(f"{key} of the first step differs: ft {a}, trl {b}")
    hidden = ("rows", "result", "worker", "accuracy")
    if not args.random:  # a rehearsal, whose numbers tell nothing
        record("dpo", {"args": {k: v for k, v in vars(args).items() if k not in hidden}, **summary})


def accuracy(args: argparse.Namespace) -> None:
    """Train recipes/smollm2_dpo.py; how often held-out pairs have the chosen answer likelier, before and after.

    Scored by transformers and peft from the exported adapter, so that the number does not rest on our own forward.
    """
    import torch
    from attrs import evolve
    from common import record
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ft.recipe import load
    from ft.train.loop import train

    recipe = load(HERE.parent / "recipes" / "smollm2_dpo.py")
    held_out = [json.loads(line) for line in SUMS.read_text().splitlines()][512:]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        if args.random:
            args.model = make_model(Path(folder) / "model", AutoTokenizer.from_pretrained(args.model))
        train(
            evolve(
                recipe,
                model=evolve(recipe.model, id=args.model),
                save=evolve(recipe.save, dir=place),
                epochs=args.epochs,
            )
        )
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        before = [_margin(base, tokenizer, row) for row in held_out]
        adapter = next(path.parent for path in sorted(place.rglob("adapter_config.json")) if "final" in str(path))
        tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
        after = [_margin(tuned, tokenizer, row) for row in held_out]
    n = len(held_out)
    found = {
        "pairs": n,
        "chosen_likelier": {"before": sum(m > 0 for m in before) / n, "after": sum(m > 0 for m in after) / n},
        "reward_accuracy": sum(b > a for a, b in zip(before, after, strict=True)) / n,
        "logged": [v for line in lines for k, v in line.items() if k == "eval/rewards/accuracies"],
    }
    print(json.dumps(found, indent=2))
    if not args.random:
        record("dpo", {"args": {"accuracy": True, "model": args.model, "epochs": args.epochs}, **found})


def _margin(model: Any, tokenizer: Any, row: dict[str, Any]) -> float:
    """log p(chosen) - log p(rejected), nats, end of turn included."""
    import torch

    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    start, scores = len(tokenizer(prompt)["input_ids"]), []
    for side in ("chosen", "rejected"):
        ids = tokenizer(prompt + row[side][-1]["content"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logp_LV = model(ids).logits[0, :-1].float().log_softmax(-1)
        scores.append(float(logp_LV.gather(-1, ids[0, 1:, None])[start - 1 :].sum()))
    return scores[0] - scores[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--random", action="store_true", help="a small random llama instead; --model gives the tokenizer"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a step")
    parser.add_argument("--prompt-words", type=int, default=0, help="made-up prompts of about so many words; 0: sums")
    parser.add_argument("--answer-words", type=int, default=50, help="length of answers to made-up prompts")
    parser.add_argument("--tokens", type=int, default=2048, help="ft's micro-batch, in positions; answers get half")
    parser.add_argument("--trl-batch", type=int, default=4, help="TRL's micro-batch, in pairs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accuracy", action="store_true", help="held-out preference accuracy before and after")
    parser.add_argument("--epochs", type=float, default=1.0, help="of --accuracy")
    parser.add_argument("--worker", choices=["ft", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pairs % args.trl_batch:
        parser.error("--pairs must be a multiple of --trl-batch")
    (worker if args.worker else accuracy if args.accuracy else compare)(args)


if __name__ == "__main__":
    main()
