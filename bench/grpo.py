"""GRPO side by side: ft against TRL's GRPOTrainer on the same model, prompts, lengths and LoRA, in turns.

    python bench/grpo.py --rounds 3                      # SmolLM2: 8 prompts x 8 answers of 64 tokens each step
    python bench/grpo.py --random --steps 3 --tokens 16  # a random model of the same family: no weights needed
    python bench/grpo.py --overlap                       # a sampler that sleeps: generation beside training, ft alone

Each run is a fresh process. TRL samples with transformers' generate (use_vllm=False), ft with its embedded sampler;
nothing stops an answer before its last token, so that both draw and train the same number. Tokens are those drawn and
trained; tokens/s leaves out the first step. Memory is the process's peak. TRL runs as its defaults are, but for what
the recipe fixes (the number of prompts and answers of a step, their length, the LoRA, no checkpointing).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

STARTED = time.time()
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
TASKS = HERE.parent / "recipes" / "data" / "tasks.train.jsonl"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LR = 1e-5
WORDS = "the sum of two numbers is larger than either when both are positive and one asks how many there are".split()


def vowels(completions: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that varies and costs nothing: the share of vowels. ft gives texts, TRL lists of one message."""
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]


def make_prompts(args: argparse.Namespace, path: Path) -> None:
    rng = random.Random(args.seed)
    count = args.prompts * (args.steps + 1)
    if args.prompt_words:
        asked = [" ".join(rng.choices(WORDS, k=args.prompt_words)) for _ in range(count)]
    else:
        rows = [json.loads(line) for line in TASKS.read_text().splitlines()]
        asked = [_question(rng.choice(rows)) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in asked))


def _question(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def random_model(args: argparse.Namespace, folder: Path) -> str:
    """A llama of random weights and of SmolLM2's shape, shrunk, with a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ft.data.tokenizer import byte_tokenizer

    tokenizer: Any = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_ft(args: argparse.Namespace) -> dict[str, Any]:
    from ft import GRPO, AdamW, Batching, Constant, Data, Embedded, LoRA, Model, Recipe, Sampling, Save
    from ft.train import online
    from ft.train.loop import train

    os.environ["PYTHONPATH"] = str(HERE)  # the processes that score import this file by its name
    reward = import_module("grpo").vowels
    online.stop_ids = lambda tokenizer, folder: frozenset()  # answers of one length, as TRL is told below
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            model=Model(id=args.model, dtype="float32", checkpointing=False),
            adapter=LoRA(r=16, alpha=32.0, targets=("attention", "mlp")),
            data=Data(train=args.rows, max_tokens=1024, cache=None),
            method=GRPO(rewards=reward, group=args.group, sampling=Sampling(max_tokens=args.tokens)),
            sampler=Embedded(rows=args.sample_rows),
            optim=AdamW(lr=LR),
            schedule=Constant(),
            batch=Batching(examples=args.prompts, tokens=args.batch_tokens),
            save=Save(dir=Path(folder) / "run", every=0),
            steps=args.steps,
        )
        train(recipe)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {
        **_rates(args, [line["time"] for line in steps], [line["length"] for line in steps]),
        "generate_s": statistics.mean(line["generate_s"] for line in steps[1:]),
        "entropy": [line["entropy"] for line in steps],
    }


def _rates(args: argparse.Namespace, times: Sequence[float], lengths: Sequence[float]) -> dict[str, Any]:
    drawn = sum(lengths[1:]) * args.prompts * args.group
    return {
        "first_step_s": times[0] - STARTED,
        "tokens_per_s": drawn / (times[-1] - times[0]),
        "length": statistics.mean(lengths),
    }


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    times: list[float] = []
    reward: Any = vowels

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.time())

    rows = args.prompts * args.group
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.trl_rows,
            gradient_accumulation_steps=rows // args.trl_rows,
            num_generations=args.group,
            max_completion_length=args.tokens,
            generation_kwargs={"min_new_tokens": args.tokens},
            max_steps=args.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": torch.float32},
        )
        trainer = GRPOTrainer(
            model=args.model,
            reward_funcs=reward,
            args=config,
            train_dataset=load_dataset("json", data_files=args.rows, split="train", cache_dir=folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        **_rates(args, times, [entry["completions/mean_length"] for entry in log]),
        "entropy": [entry["entropy"] for entry in log],
    }


def worker(args: argparse.Namespace) -> None:
    result = {"ft": run_ft, "trl": run_trl}[args.worker](args)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(args.result).write_text(json.dumps(result))


def compare(args: argparse.Namespace) -> None:
    from common import in_turns, ratios, record

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.rows = str(folder / "rows.jsonl")
        make_prompts(args, Path(args.rows))
        if args.random:
            args.model = random_model(args, folder / "model")
        given = ["--rows", args.rows, "--model", args.model]
        runs = in_turns(__file__, given, args.rounds, hidden=("entropy",))
    summary = ratios(runs, ("tokens_per_s", "first_step_s", "peak_mb", "length"))
    first = {who: runs[who][0]["entropy"][0] for who in runs}
    print(f"entropy of the first step: ft {first['ft']:.3f}, trl {first['trl']:.3f}")
    given = {k: v for k, v in vars(args).items() if k not in ("rows", "result", "worker")}
    record("grpo", {"args": given, **summary, "entropy": first})


# Overlap --------------------------------------------------------------------------------------------------------------


def overlap(args: argparse.Namespace) -> None:
    """Steps of a sampler that takes ``--generate`` seconds beside training that takes ``--train`` seconds."""
    from common import record

    from ft import dist

    rows = []
    with dist.launched() as world:
        for generate, trains in ((args.generate, args.train), (args.train, args.generate), (args.train, args.train)):
            apart, ahead = (statistics.median(_steps(by, generate, trains, world, args.steps)) for by in (0, 1))
            most = max(generate, trains)
            rows.append({"generate": generate, "train": trains, "apart": apart, "ahead": ahead, "ratio": ahead / most})
            print(f"generate {generate:.2f} s, train {trains:.2f} s: a step takes {apart:.3f} s in turns, "
                  f"{ahead:.3f} s ahead by 1, {ahead / most:.2f} x the larger")  # fmt: skip
    record("grpo", {"overlap": rows})


def _steps(by: int, generate: float, trains: float, world: Any, steps: int) -> list[float]:
    """Seconds of each step but the first, which has nothing that was drawn before it."""
    from ft import GRPO, Ahead
    from ft.rollout.ahead import AheadSampler
    from ft.types import Context

    sleeper: Any = Sleeper(generate)
    sampler: Any = AheadSampler(sampler=sleeper, world=world) if by else sleeper
    ctx = Context(data=Asked(), examples=2, seed=0, sampler=sampler, judge=Even())
    method: Any = Ahead(GRPO(rewards=vowels, group=2), by=by) if by else GRPO(rewards=vowels, group=2)
    times = []
    for now in range(steps + 1):
        began = time.perf_counter()
        method.examples(now, ctx)
        time.sleep(trains)
        times.append(time.perf_counter() - began)
    if by:
        sampler.close()
    return times[1:]


class Sleeper:
    """A sampler that takes its time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def sync(self, step: int) -> None: ...

    def ask(self, prompts: Sequence[Any], n: int, step: int) -> Any:
        import numpy as np

        from ft.rollout.shared import Answer

        time.sleep(self.seconds)
        return [
            [Answer(np.full(k + 1, 7, np.int32), np.zeros(k + 1, np.float32), True) for k in range(n)] for _ in prompts
        ]

    def rollout(self, prompts: Sequence[Any], n: int, step: int) -> Any:
        from ft.types import Rollout

        return [
            [Rollout(prompt=p, tokens_L=a.tokens_L, logp_L=a.logp_L, finish="stop", policy_step=step) for a in group]
            for p, group in zip(prompts, self.ask(prompts, n, step), strict=True)
        ]


class Even:
    """Scores by length, in no time."""

    def score(self, rollouts: Sequence[Any]) -> Any:
        from attrs import evolve

        return [evolve(r, reward=float(len(r.tokens_L))) for r in rollouts]


class Asked:
    """Prompts of three tokens."""

    def draw(self, step: int, n: int, seed: int) -> Any:
        import numpy as np

        from ft.types import Example

        return [Example(tokens_L=np.arange(3, dtype=np.int32), mask_L=np.zeros(3, bool), group=i) for i in range(n)]

    def row(self, index: int) -> Any:
        return self.draw(0, 1, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--random", action="store_true", help="a small random model in its place")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--prompt-words", type=int, default=0, help="of made-up prompts; 0 takes the tasks")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="ft's micro-batch, in positions")
    parser.add_argument("--sample-rows", type=int, default=64, help="answers that ft samples at a time")
    parser.add_argument("--trl-rows", type=int, default=8, help="TRL's micro-batch, in answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--generate", type=float, default=0.4, help="seconds, with --overlap")
    parser.add_argument("--train", type=float, default=0.2, help="seconds, with --overlap")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["ft", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
    elif args.overlap:
        overlap(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
