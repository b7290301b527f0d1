"""Models whose MLPs and experts run in tiles of tokens: the same loss and gradients, adapters included."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from test_methods import PAIRS, one_step, world

from ft import DPO, NF4, LoRA, Model, dist
from ft.dist import World
from ft.errors import ModelError
from ft.models import tiles
from ft.models.build import Built, build, plan_config
from ft.recipe import Parallel
from ft.train import optim

__all__ = ["world"]  # the fixture
CASES = {
    "llama": (Model(id="-", family="llama", dtype="float32", tiny=True), ("attention", "mlp")),
    "qwen3_5_moe_text": (
        Model(id="-", family="qwen3_5_moe_text", dtype="float32", tiny=True, quant=NF4()),
        ("attention", "shared_experts", "experts"),
    ),
}


def made(world: World, name: str, tile: int | None) -> Built:
    model, targets = CASES[name]
    model = evolve(model, tile=tile)
    config = plan_config(model, None, vocab=96)
    adapter = LoRA(r=4, targets=targets)
    built = build(model, adapter, config, None, world=world, parallel=Parallel(), seed=0, say=lambda _: None)
    for i, (key, p) in enumerate(optim.trained(built.policy.scorer.model).items()):
        if key.endswith("_B") or "lora_B" in key:
            dist.copy_into(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return built


@pytest.mark.parametrize("name", CASES)
def test_tiles_change_neither_loss_nor_gradients(world: World, name: str) -> None:
    whole, whole_grads, _ = one_step(DPO(), made(world, name, None), world, examples=PAIRS)
    tiled, tiled_grads, _ = one_step(DPO(), made(world, name, 7), world, examples=PAIRS)
    torch.testing.assert_close(tiled.loss, whole.loss, rtol=1e-5, atol=1e-6)
    assert tiled_grads.keys() == whole_grads.keys()
    for key, grad in whole_grads.items():
        torch.testing.assert_close(tiled_grads[key], grad, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_block_sees_no_more_than_a_tile(world: World, name: str) -> None:
    built = made(world, name, 7)
    net, seen = built.policy.scorer.model, []
    blocks = tiles.mlps(net)
    assert blocks
    for block in blocks.values():
        last = next(getattr(block, leaf) for leaf in tiles.LAST if hasattr(block, leaf))
        last.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // args[0].shape[-1]))
    one_step(DPO(), built, world, examples=PAIRS)
    assert seen and max(seen) == 7


def test_a_model_without_mlps_says_so() -> None:
    with pytest.raises(ModelError, match=r"model\.tile: no MLP was found"):
        tiles.apply(torch.nn.Linear(2, 2), 8)
