"""The whole thing, twice, on a machine without a GPU: `make demo`.

1. The flagship recipe rehearsed on a shrunken model of its architecture: it trains on chat rows, is interrupted,
   resumes, and leaves an adapter that peft loads with equal logits.
2. SmolLM2-135M-Instruct learns to add two numbers with LoRA: held-out loss, and exact answers in real generation,
   before and after.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import torch
from common import record

from ft import LoRA
from ft.data.formats import Conversation, convert
from ft.data.render import prompt
from ft.dist import launched
from ft.io.weights import Memory
from ft.kernels.nf4 import dequantise
from ft.models import load
from ft.models.build import Built, build, plan_config
from ft.models.generating import generating
from ft.models.quant import nf4_of, quantised
from ft.recipe import Recipe, override, rehearse
from ft.recipe import load as load_recipe
from ft.recipe.online import Sampling
from ft.rollout.embedded import continue_all

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "demo"
FLAGSHIP, SUMS = ROOT / "recipes" / "qwen35_moe_qlora.py", ROOT / "recipes" / "smollm2_lora.py"


def ft(*words: str, until: int | None = None, folder: Path | None = None) -> int:
    """Run the command line; with ``until``, press Ctrl+C once that step is in the run's metrics."""
    print(f"\n$ ft {' '.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "ft", *words], cwd=ROOT)
    while until is not None and folder is not None and process.poll() is None:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and f'"step":{until},' in metrics.read_text():
            print("^C", flush=True)
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    return process.wait()


def policy(recipe: Recipe, world: Any, adapter: Path | None) -> tuple[Built, Any]:
    """The recipe's policy with a saved adapter (or none yet), and its tokenizer."""
    from ft.train.setup import tokenizer_of

    tokenizer, folder = tokenizer_of(recipe, lambda _: None)
    config = plan_config(recipe.model, folder, vocab=len(tokenizer))
    lora = attrs.evolve(recipe.adapter, init=adapter) if isinstance(recipe.adapter, LoRA) else None
    built = build(
        recipe.model, lora, config, folder, world=world, parallel=recipe.parallel, seed=recipe.seed, say=lambda _: None
    )
    built.policy.scorer.use_attention(built.policy.scorer.own_attention)
    return built, tokenizer


def dense_base(built: Built, folder: Path) -> None:
    """The frozen base, dequantised, as a folder that transformers loads."""
    slots = load.slots(built.policy.scorer)
    tensors = {
        name: dequantise(nf4_of(slot.owner, slot.leaf))
        if slot.leaf in quantised(slot.owner)
        else getattr(slot.owner, slot.leaf).detach()
        for name, slot in slots.items()
    }
    recipe_model = attrs.evolve(load_recipe(FLAGSHIP).model, quant=None, dtype="float32")
    net = load.skeleton(built.policy.config, recipe_model)
    load.fill(net, Memory(tensors=tensors))
    net.save_pretrained(folder)


def flagship() -> dict[str, float]:
    folder = RUNS / "flagship-tiny"
    words = [
        "run",
        "recipes/qwen35_moe_qlora.py",
        "--tiny",
        f"save.dir={RUNS / 'flagship'}",
        "save.every=5",
        "optim.lr=1e-2",
    ]
    status = ft(*words, until=7, folder=folder)
    assert status == 130, f"interrupted, so the status should be 130, not {status}"
    assert ft(*words, "--resume") == 0
    recipe = rehearse(load_recipe(FLAGSHIP))
    with launched() as world:
        built, tokenizer = policy(recipe, world, folder / "final")
        dense_base(built, folder / "base")
        net = built.policy.scorer.model.eval()
        ids = torch.tensor([tokenizer.encode("What is 2 + 2? Answer with the result only.")])
        with torch.no_grad():
            ours = net(input_ids=ids).logits
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, folder / "final").eval()(input_ids=ids).logits
    gap, moved = float((ours - theirs).abs().max()), float((before - theirs).abs().max())
    print(f"\nlogits under peft differ from ours by at most {gap:.1e}; the adapter itself moved them by {moved:.1e}")
    assert gap < 1e-5 < moved
    return {"peft_gap": gap, "adapter_moved": moved}


def answers(built: Built, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[float, float, str]:
    """Share of whole answers that are exact, share whose last number is right, and one answer to look at."""
    prompts = []
    for row in rows:
        value = convert({"messages": row["messages"]}, source="eval", format="messages")
        assert isinstance(value, Conversation)
        prompts.append(prompt(attrs.evolve(value, messages=value.messages[:-1]), tokenizer))
    greedy = Sampling(max_tokens=24, greedy=True)
    with generating(built.policy):
        found = continue_all(
            built.policy.scorer.model, prompts, 1, None, sampling=greedy, stop=[tokenizer.eos_token_id]
        )
    texts = [tokenizer.decode(c.tokens_L, skip_special_tokens=True).strip() for c in found]
    exact = [text == row["answer"] for text, row in zip(texts, rows, strict=True)]
    last = [(re.findall(r"-?\d+", text) or [""])[-1] == row["answer"] for text, row in zip(texts, rows, strict=True)]
    shown = f"{rows[0]['messages'][0]['content']!r} -> {texts[0]!r}"
    return sum(exact) / len(rows), sum(last) / len(rows), shown


def sums(count: int, words: list[str]) -> dict[str, float]:
    recipe = override(load_recipe(SUMS), words)
    folder = RUNS / "sums"
    rows = [json.loads(line) for line in (ROOT / recipe.data.eval[0].path).read_text().splitlines()][:count]
    numbers: dict[str, float] = {}
    with launched() as world:
        built, tokenizer = policy(recipe, world, None)
        before = answers(built, tokenizer, rows)
        print(f"\nbefore: {before[0]:.0%} exact, {before[1]:.0%} with the right last number; {before[2]}")
        del built
    began = time.time()
    assert ft("run", "recipes/smollm2_lora.py", f"save.dir={folder}", *words) == 0
    numbers["train_s"] = time.time() - began
    with launched() as world:
        built, tokenizer = policy(recipe, world, folder / "final")
        after = answers(built, tokenizer, rows)
        print(f"\nafter: {after[0]:.0%} exact, {after[1]:.0%} with the right last number; {after[2]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    print(f"held-out loss: {losses[0]:.3f} before, {losses[-1]:.3f} after; {numbers['train_s']:.0f} s of training")
    assert after[0] > before[0] and losses[-1] < losses[0]
    return {
        **numbers,
        "exact_before": before[0],
        "exact_after": after[0],
        "last_before": before[1],
        "last_after": after[1],
        "loss_before": losses[0],
        "loss_after": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["flagship", "sums"])
    parser.add_argument("--rows", type=int, default=64, help="held-out questions to answer")
    parser.add_argument("overrides", nargs="*", help="for the second recipe, as in optim.lr=1e-3")
    args = parser.parse_args()
    shutil.rmtree(RUNS, ignore_errors=True)
    began, numbers = time.time(), {}
    if args.only != "sums":
        numbers |= flagship()
    if args.only != "flagship":
        numbers |= sums(args.rows, args.overrides)
    numbers["seconds"] = time.time() - began
    print(f"\nall of it: {numbers['seconds']:.0f} s")
    record("demo", numbers)


if __name__ == "__main__":
    main()
