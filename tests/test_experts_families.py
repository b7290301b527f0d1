"""Every family's experts, adapted and in 4 bits, against transformers' loop over dense weights; and routing that stays.

The oracle is transformers' eager experts on weights W + s B A (peft's result), differentiated to A, B, the embeddings
and the routers by autograd; on 4-bit experts W is what they dequantise to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from test_experts import logits_and_grads
from tiny_models import MOE, build, tokens
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointError

from ft.kernels.nf4 import dequantise
from ft.models import lora as loras
from ft.models import quant
from ft.models.build import recompute
from ft.models.experts import ExpertLoRA, expert_modules, use_ft_experts
from ft.recipe import NF4, LoRA

FOUR_BITS = NF4(linears=False)


def in_four_bits(model: Any, dense: Any) -> None:
    """Hold the experts of ``model`` in NF4, and give ``dense`` what they dequantise to."""
    items = quant.plan(model, FOUR_BITS)
    quant.apply(model, items, FOUR_BITS)
    with torch.no_grad():
        for item in items:
            weight, owner = dense.get_parameter(item.name), model.get_submodule(item.path)
            quant.store(owner, item.leaf, weight)
            weight.copy_(dequantise(quant.nf4_of(owner, item.leaf)))


def merged(model: Any, factors: Mapping[str, Tensor], adapted: Any) -> dict[str, Tensor]:
    """Each stack of ``model`` plus its dense update, by name."""
    stacks = {}
    for name, module in expert_modules(model).items():
        lora: ExpertLoRA = adapted.get_submodule(name).ft_lora
        for stack in lora.stacks:
            A_ErN, B_EMr = (factors[f"{name}.ft_lora.{stack}_{f}"] for f in "AB")
            delta = lora.scaling * B_EMr @ A_ErN
            weight = getattr(module, stack)
            stacks[f"{name}.{stack}"] = weight + (delta.mT if module.is_transposed else delta)
    return stacks


def others(model: Any) -> dict[str, Tensor]:
    """Parameters below and beside the experts, which gradients reach through them."""
    found = {n: p for n, p in model.named_parameters() if quant.is_router(n.rpartition(".")[0])}
    found = {n: p for n, p in found.items() if p.is_floating_point() and "e_score" not in n and "expert_bias" not in n}
    return found | {"embeddings": model.get_input_embeddings().weight}


def outcome(logits: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = logits.log_softmax(-1)[..., 3].sum() / 10
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return {"logits": logits.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("family", MOE)
def test_adapted_experts_equal_merged_weights_in_transformers_loop(family: str, nf4: bool):
    ours, theirs = build(family), build(family)
    if nf4:
        in_four_bits(ours, theirs)
    use_ft_experts(ours)
    loras.attach(ours, LoRA(r=4, alpha=8.0, targets=("experts",)))
    generator = torch.Generator().manual_seed(3)
    factors = {n: p for n, p in ours.named_parameters() if ".ft_lora." in n}
    with torch.no_grad():
        for factor in factors.values():
            factor.normal_(std=0.1, generator=generator)
    theirs.set_experts_implementation("eager")
    inputs = {"input_ids": tokens(2, 17), "use_cache": False}
    results = []
    for model, stacks in ((ours, {}), (theirs, merged(theirs, factors, ours))):
        wanted = {n: p.requires_grad_() for n, p in others(model).items()} | factors
        results.append(outcome(functional_call(model, stacks, (), inputs).logits, wanted))
    got, expected = results
    assert got.keys() == expected.keys() and len(factors) >= 4
    assert all(expected[name].abs().max() > 0 for name in factors)
    for name, value in expected.items():
        near = 1e-5 * max(1.0, value.abs().max().item())
        assert torch.allclose(got[name], value, rtol=1e-5, atol=near), (name, (got[name] - value).abs().max())


# --- layers that are recomputed --------------------------------------------------------------------------------------


def routings(model: Any, between: Callable[[], None], seen: list[list[Tensor]]) -> None:
    """Appends what each experts module is told, in forward and, after ``between``, again in backward."""
    for module in expert_modules(model).values():
        told: list[Tensor] = []
        module.register_forward_pre_hook(lambda _, args, told=told: told.append(args[1].clone()))
        seen.append(told)
    out = model(input_ids=tokens(2, 17), use_cache=False).logits
    between()
    out.log_softmax(-1)[..., 3].sum().backward()


def disturb(model: Any) -> None:
    """Other routers, as if they rounded differently: what a replay would choose by."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if quant.is_router(name.rpartition(".")[0]):
                parameter.data = parameter + torch.randn_like(parameter)


@pytest.mark.parametrize("family", MOE)
def test_a_replay_cannot_route_otherwise(family: str):
    model = build(family).train()
    use_ft_experts(model)
    recompute(model)
    seen: list[list[Tensor]] = []
    routings(model, lambda: disturb(model), seen)
    assert seen
    for told in seen:
        assert len(told) == 2 and torch.equal(told[0], told[1])


def test_a_replay_would_route_otherwise_without_it():
    model: Any = build("qwen3_moe").train()
    use_ft_experts(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    seen: list[list[Tensor]] = []
    with pytest.raises(CheckpointError, match="different metadata"):  # other experts, so other shapes
        routings(model, lambda: disturb(model), seen)
    assert not torch.equal(*seen[-1])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gemma4_text", "gpt_oss"])
def test_recomputed_layers_give_the_same_gradients(family: str):
    model = build(family).train()
    use_ft_experts(model)
    expected = logits_and_grads(model, None)
    recompute(model)
    got = logits_and_grads(model, None)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
