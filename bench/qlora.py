"""A whole training step of a small mixture of experts: ft with its base in NF4, and dense, against transformers + peft.

    python bench/qlora.py [--family qwen3_moe] [--hidden 512] [--rounds 3] [--steps 5] [--dtype float32]

8 layers of 64 experts, 8 a token; LoRA of rank 16 on attention and experts; forward, backward, clip, AdamW on the same
tokens. Both sides read the same random weights from a folder. Neither pads, and neither recomputes activations. peft's
adapter names the very weights that ft adapts, with ``target_parameters`` for the stacks of experts; transformers picks
its own implementation of experts and attention. bitsandbytes leaves stacks of experts dense, so "peft, 4-bit linears"
has only its attention in 4 bits.

Each run is a fresh process, in turns, and figures are medians: tokens/s leaves out each process's first step; memory is
the process's peak, and ``held`` what it stood at before the first step. ``ops`` counts the operators that reach a
device's kernels in one step (views, which launch nothing, left out). The first loss is that of the base: ft with a
dense base must give transformers' own, and is told beside it in NF4.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from common import record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CONTENDERS = ("ft, NF4", "ft, dense", "peft, dense", "peft, 4-bit linears")
VOCAB, RANK, ALPHA, LR, CLIP = 4096, 16, 32.0, 1e-4, 1.0
TARGETS = ("attention", "experts")


@frozen
class Side:
    """``step`` trains once on the tokens and returns the loss before it."""

    step: Callable[[], Tensor]


class Operators(TorchDispatchMode):
    """How often each operator ran; views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


# --- the model and the tokens ---------------------------------------------------------------------------------------


def save_model(args: argparse.Namespace, folder: Path) -> None:
    """Random weights of unit scale, as transformers saves them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": args.hidden, "intermediate_size": 2 * args.hidden,
        "moe_intermediate_size": args.hidden // 2, "num_hidden_layers": args.layers, "num_experts": args.experts,
        "num_experts_per_tok": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": args.hidden // 8,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if args.family == "qwen3_moe":
        sizes |= {"norm_topk_prob": True}
    else:
        sizes |= {"shared_expert_intermediate_size": args.hidden // 2, "linear_num_key_heads": 4,
                  "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64}  # fmt: skip
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(args.family, **sizes))
    model.to(getattr(torch, args.dtype)).save_pretrained(folder)


def make_tokens(args: argparse.Namespace) -> Tensor:
    """[S, L] tokens after the special ones."""
    rng = torch.Generator().manual_seed(args.seed)
    return torch.randint(3, VOCAB, (args.rows, args.length), generator=rng)


def ft_parts(args: argparse.Namespace, quant: bool) -> tuple[Any, Any]:
    """(Model, LoRA) of ft's recipe."""
    from ft import NF4, LoRA, Model

    model = Model(id=args.folder, dtype=args.dtype, quant=NF4() if quant else None, checkpointing=False)
    return model, LoRA(r=RANK, alpha=ALPHA, targets=TARGETS)


# --- sides ----------------------------------------------------------------------------------------------------------


def run_ft(args: argparse.Namespace, *, quant: bool) -> dict[str, Any]:
    from ft import SFT, AdamW, dist
    from ft.io.weights import resolve
    from ft.models.build import build, plan_config
    from ft.recipe import Parallel
    from ft.train import optim, step
    from ft.types import Example

    model, adapter = ft_parts(args, quant)
    folder = resolve(args.folder)
    method = SFT()
    tokens_SL = make_tokens(args).to(torch.int32).numpy()
    examples = [Example(tokens_L=row, mask_L=row >= 0) for row in tokens_SL]
    with dist.launched() as world:
        config = plan_config(model, folder, vocab=VOCAB)
        built = build(
            model, adapter, config, folder, world=world, parallel=Parallel(), seed=args.seed, say=lambda _: None
        )
        parameters = optim.trained(built.policy.scorer)
        recipe = AdamW(lr=LR, clip=CLIP, weight_decay=0.0)
        optimizer = optim.make(parameters, recipe)

        def train() -> Tensor:
            plan = step.plan(examples, method, built.policy, world, tokens=args.rows * args.length)
            out = step.run(plan, method, built.policy, world, backward=True)
            norm = optim.grad_norm(list(parameters.values()))
            optim.clip(list(parameters.values()), norm, recipe.clip)
            optim.update(optimizer, ~torch.isfinite(norm))
            return out.loss

        trained = sum(p.numel() for p in parameters.values())
        return {**measured(Side(train), args), "trained": trained, "layout": str(built.policy.layout)}


def run_peft(args: argparse.Namespace, *, quant: bool) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    if quant:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, args.dtype),
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(args.folder, **options)
    modules, stacks = peft_targets(args)
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=modules, target_parameters=stacks)
    model: Any = get_peft_model(base, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    tokens_SL = make_tokens(args)

    def train() -> Tensor:
        loss = model(input_ids=tokens_SL, labels=tokens_SL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    trained = sum(p.numel() for p in parameters)
    return {**measured(Side(train), args), "trained": trained, "experts": str(base.config._experts_implementation)}


def peft_targets(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """peft's names of the modules and parameters that ft adapts."""
    from ft.io.weights import resolve
    from ft.models.build import plan_config, structure

    model, adapter = ft_parts(args, quant=False)
    config = plan_config(model, resolve(args.folder), vocab=VOCAB)
    attached = structure(model, adapter, config).attached
    assert attached is not None
    return list(attached.target_modules), list(attached.target_parameters)


def measured(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """Losses and seconds of the steps, then one more step whose operators are counted."""
    held, losses, seconds = peak_mb(), [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(float(side.step()))
        seconds.append(time.perf_counter() - start)
    peak = peak_mb()
    with Operators() as operators:
        side.step()
    return {
        "first_step_s": seconds[0],
        "tokens_per_s": args.rows * args.length / statistics.median(seconds[1:]),
        "held_mb": held,
        "peak_mb": peak,
        "ops": sum(operators.seen.values()),
        "most": operators.seen.most_common(8),
        "losses": losses,
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    side, base = args.worker.split(", ")
    result = {"ft": run_ft, "peft": run_peft}[side](args, quant=base != "dense")
    Path(args.result).write_text(json.dumps(result))


# --- in turns -------------------------------------------------------------------------------------------------------


def launch(who: str, args: argparse.Namespace, folder: Path) -> dict[str, Any] | str:
    """A worker's figures, or the last line of why it failed."""
    result = folder / "result.json"
    given = [w for name in ("family", "dtype", "hidden", "rows", "length", "steps", "threads", "seed")
             for w in (f"--{name}", str(getattr(args, name)))]  # fmt: skip
    command = [sys.executable, __file__, *given, "--worker", who, "--result", str(result)]
    done = subprocess.run([*command, "--folder", str(folder / "model")], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
    return json.loads(result.read_text())


def rounds(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every contender once a round. What fails the first time is named and left out; ft may not fail."""
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in CONTENDERS if args.only in who}
    for i in range(args.rounds):
        order = list(runs) if i % 2 == 0 else list(reversed(runs))
        for who in order:
            found = launch(who, args, folder)
            if isinstance(found, str):
                if who.startswith("ft"):
                    sys.exit(f"{who} failed: {found}")
                print(f"without {who}: {found}", flush=True)
                del runs[who]
                continue
            runs[who].append(found)
            print(f"round {i + 1} {who}: {found['tokens_per_s']:.0f} tokens/s, {found['peak_mb']:.0f} MB", flush=True)
    return runs


def compare_losses(runs: dict[str, list[dict[str, Any]]], dtype: str) -> None:
    """Dense bases must agree at the first step. In 16 bits routers of two implementations choose differently."""
    if "ft, dense" in runs and "peft, dense" in runs:
        ours, theirs = (runs[who][0]["losses"][0] for who in ("ft, dense", "peft, dense"))
        tolerance = 1e-4 if dtype == "float32" else 2e-2
        assert abs(ours - theirs) <= tolerance * abs(theirs), f"first losses differ: ft {ours}, peft {theirs}"
        trained = {runs[who][0]["trained"] for who in ("ft, dense", "peft, dense")}
        assert len(trained) == 1, f"the sides train different numbers of elements: {trained}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_moe", choices=["qwen3_moe", "qwen3_5_moe_text"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of a dense base")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of a process, the first one included")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, and record nothing")
    for hidden in ("worker", "result", "folder"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as name:
        save_model(args, Path(name) / "model")
        runs = rounds(args, Path(name))
    compare_losses(runs, args.dtype)
    table(runs, args)


def table(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    keys = ("tokens_per_s", "first_step_s", "held_mb", "peak_mb", "ops")
    figures = {who: {key: statistics.median(run[key] for run in done) for key in keys} for who, done in runs.items()}
    print(
        f"\n{'':22}{'tokens/s':>10}{'x peft':>8}{'first s':>9}{'held MB':>9}{'peak MB':>9}{'ops':>8}{'first loss':>12}"
    )
    speed = figures.get("peft, dense", {}).get("tokens_per_s")
    for who, found in figures.items():
        ratio = f"{found['tokens_per_s'] / speed:.2f}" if speed else ""
        print(
            f"{who:22}{found['tokens_per_s']:10.0f}{ratio:>8}{found['first_step_s']:9.2f}{found['held_mb']:9.0f}"
            f"{found['peak_mb']:9.0f}{found['ops']:8.0f}{runs[who][0]['losses'][0]:12.5f}"
        )
    if not args.dry:
        setting = {k: v for k, v in vars(args).items() if k not in ("worker", "result", "folder", "dry", "only")}
        losses = {who: [done[0]["losses"][0], done[0]["losses"][-1]] for who, done in runs.items()}
        record("qlora", {"args": setting, "figures": figures, "losses": losses})


if __name__ == "__main__":
    main()
