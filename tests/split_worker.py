"""One step's loss and gradient on this many ranks, for every way to split it. Run by torchrun; see test_split.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from safetensors.torch import save_file

from ft import SFT, dist
from ft.dist import World, whole
from ft.models.build import Built, build, plan_config
from ft.models.leak import check
from ft.recipe import NF4, LoRA, Model, Parallel
from ft.train import optim, step
from ft.types import Example

VOCAB = 96
Kind = Literal["packed", "padded"]
LAYOUTS: tuple[Kind, ...] = get_args(Kind)
LENGTHS = (30, 3, 17, 9, 2, 24, 12)
MODELS = {
    "full": (Model(id="-", family="llama", dtype="float32", tiny=True), None),
    "qlora": (
        Model(id="-", family="qwen3_5_moe_text", dtype="float32", quant=NF4(), tiny=True),
        LoRA(r=4, targets=("attention", "experts")),
    ),
}


def examples() -> list[Example]:
    """Seven ragged rows with ragged masks."""
    rng = np.random.default_rng(0)
    made = []
    for i, length in enumerate(LENGTHS):
        mask = rng.random(length) < 0.6
        mask[-1] = True
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        made.append(Example(tokens_L=tokens, mask_L=mask, source=f"row:{i}"))
    return made


def make(name: str, world: World) -> Built:
    model, adapter = MODELS[name]
    config = plan_config(model, None, vocab=VOCAB)
    built = build(model, adapter, config, None, world=world, parallel=Parallel(), seed=0, say=lambda _: None)
    for parameter_name, p in sorted(optim.trained(built.policy.scorer.model).items()):
        if "lora_B" in parameter_name or parameter_name.endswith("_B"):  # zero at first: then A has no gradient
            seed = torch.Generator().manual_seed(len(parameter_name))
            dist.copy_into(p, torch.randn(p.shape, generator=seed) * 0.05)
    return built


def gradient(built: Built, world: World, tokens: int, layout: Kind) -> dict[str, torch.Tensor]:
    """The step's loss, and every gradient gathered whole."""
    scorer = built.policy.scorer
    chosen, _ = check(scorer, requested=layout)
    policy = type(built.policy)(scorer=scorer, config=built.policy.config, layout=chosen)
    scorer.zero_grad(set_to_none=True)
    plan = step.plan(examples(), SFT(), policy, world, tokens=tokens)
    out = step.reduce(step.run(plan, SFT(), policy, world, backward=True), world)
    parameters = optim.trained(scorer.model)
    found = {f"grad/{name}": whole(p.grad).clone() for name, p in parameters.items() if p.grad is not None}
    assert len(found) == len(parameters)
    idle = sum(not batch.lengths for batch in plan.batches) / len(plan.batches)
    flags = dist.reduce_tree({"idle": idle, "batches": float(len(plan.batches))}, world, "max")
    return {"loss": out.loss, "norm": optim.grad_norm(list(parameters.values())), **flags, **found}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with dist.launched() as world:
        for name in MODELS:
            built = make(name, world)
            for tokens in (256, 64, 30):
                for layout in LAYOUTS:
                    found = gradient(built, world, tokens, layout)
                    if world.first:
                        path = folder / f"{name}-{world.size}-{tokens}-{layout}.safetensors"
                        save_file({k: v.detach().double().contiguous() for k, v in found.items()}, path)


if __name__ == "__main__":
    main()
