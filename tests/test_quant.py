"""What is quantised, that it is quantised bit-exactly, and that the start-up table tells the truth."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from tiny_models import DENSE, FAMILIES, MOE, build, config, tokens
from torch import nn
from transformers import PreTrainedModel

from ft.errors import ModelError
from ft.io.weights import Memory
from ft.kernels import nf4
from ft.models import load, quant
from ft.recipe.parts import NF4, Model


def quantised_like(model: PreTrainedModel, how: NF4, dtype: str = "float32") -> PreTrainedModel:
    """The same weights, loaded into 4 bits."""
    ours = load.skeleton(model.config, Model(id="x", dtype=dtype))  # type: ignore[arg-type]
    quant.apply(ours, quant.plan(ours, how), how)
    load.fill(ours, Memory(tensors=dict(model.state_dict())))
    return ours


def rounded(model: PreTrainedModel, how: NF4) -> PreTrainedModel:
    """The plan's weights replaced by what 4 bits make of them, in place."""
    with torch.no_grad():
        for item in quant.plan(model, how):
            w = model.get_parameter(item.name)
            w.copy_(nf4.dequantise(nf4.quantise(w, block=how.block, double=how.double)))
    return model


@pytest.mark.parametrize("how", [NF4(), NF4(double=False), NF4(block=128)], ids=["double", "single", "block128"])
@pytest.mark.parametrize("family", DENSE)
def test_logits_are_those_of_the_rounded_weights(family: str, how: NF4) -> None:
    source = build(family)
    ours, theirs, x = quantised_like(source, how), rounded(source, how), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=x).logits, theirs(input_ids=x).logits)


@pytest.mark.parametrize("family", MOE)
def test_every_piece_is_the_rounded_weight(family: str) -> None:
    source = build(family)
    ours = quantised_like(source, NF4(), dtype="bfloat16")
    items = quant.plan(source, NF4())
    assert {i.kind for i in items} == {"linear", "experts"}
    for item in items:
        w = source.get_parameter(item.name).bfloat16()
        held = quant.nf4_of(ours.get_submodule(item.path), item.leaf)
        assert torch.equal(nf4.dequantise(held), nf4.dequantise(nf4.quantise(w)))
    quant.verify(ours, items)


SPARED = {"lm_head", "embed_tokens", "embeddings", "gate", "router", "shared_expert_gate", "wg", "indexer", "conv1d"}
SPARED |= {"moe_statics", "gate_up_proj_bias", "down_proj_bias", "out_proj"}  # out_proj: Mamba's, see quant


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_embeddings_norms_and_routers_stay_as_they_are(family: str) -> None:
    model = build(family)
    names = {i.name for i in quant.plan(model, NF4())}
    spared = [n for n, p in model.named_parameters() if p.ndim >= 2 and n not in names]
    for name in spared:  # every matrix that is left out is one of these
        assert not SPARED.isdisjoint(name.split(".")), name
    for name in names:
        assert not {"lm_head", "gate", "router", "shared_expert_gate", "wg"} & set(name.split(".")), name
    experts = [n for n, p in model.named_parameters() if p.ndim == 3 and "experts" in n.split(".")]
    assert set(experts) <= names and bool(experts) == (family in MOE)


def names_in(family: str, how: NF4) -> set[str]:
    return {i.name for i in quant.plan(build(family), how)}


def test_what_a_recipe_leaves_out() -> None:
    whole = names_in("qwen3_5_moe_text", NF4())
    assert {n for n in whole if ".experts." in n} == whole - names_in("qwen3_5_moe_text", NF4(experts=False))
    assert all(".experts." in n for n in names_in("qwen3_5_moe_text", NF4(linears=False)))
    fewer = names_in("qwen3_5_moe_text", NF4(skip=("q_proj", "experts.down_proj", "shared_expert.up_proj")))
    assert {n.split(".", 3)[3] for n in whole - fewer} == {
        "self_attn.q_proj.weight", "mlp.experts.down_proj", "mlp.shared_expert.up_proj.weight",
    }  # fmt: skip


def test_routers_by_name() -> None:
    routers = ("mlp.gate", "mlp.gate.wg", "mlp.router.gate", "router.proj", "mlp.shared_expert_gate", "attn.indexer.wk")
    others = ("mlp.gate_proj", "self_attn.output_gate", "experts.gate_up_proj", "mlp.shared_expert.gate_proj")
    assert all(quant.is_router(f"model.layers.0.{n}") for n in routers)
    assert not any(quant.is_router(f"model.layers.0.{n}") for n in others)


def test_blocks_must_not_straddle_experts() -> None:
    model = build("qwen3_moe", moe_intermediate_size=24)  # 24 x 64 = 1536 weights in an expert's down_proj
    quant.plan(model, NF4(block=512))
    with pytest.raises(ModelError, match=r"straddle experts\n  expected: experts of a multiple of 1024 weights"):
        quant.plan(model, NF4(block=1024))


def test_pieces_are_frozen_integers_that_shard_by_rows() -> None:
    how = NF4()
    model = load.skeleton(config("qwen3_moe"), Model(id="x"))
    quant.apply(model, quant.plan(model, how), how)
    experts = dict(model.get_submodule("model.layers.0.mlp.experts").named_parameters())
    assert {n: (tuple(p.shape), p.dtype) for n, p in experts.items()} == {
        "gate_up_proj": ((8, 64 * 64 // 2), torch.uint8),
        "gate_up_proj_absmax": ((8, 64), torch.uint8),
        "gate_up_proj_absmax2": ((2,), torch.int32),  # 512 scales in blocks of 256
        "gate_up_proj_offset": ((1,), torch.int32),
        "down_proj": ((8, 64 * 32 // 2), torch.uint8),
        "down_proj_absmax": ((8, 32), torch.uint8),
        "down_proj_absmax2": ((1,), torch.int32),
        "down_proj_offset": ((1,), torch.int32),
    }
    assert all(p.is_meta and not p.requires_grad for p in experts.values())


def test_casting_a_model_does_not_touch_the_scales() -> None:
    model = quantised_like(build("llama"), NF4(double=False))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    before = nf4.dequantise(quant.nf4_of(layer, "weight"))
    model.bfloat16()
    assert torch.equal(nf4.dequantise(quant.nf4_of(layer, "weight")), before)


def test_odd_shapes() -> None:
    for out, inner in ((3, 5), (4, 7), (5, 64), (1, 2)):
        net: Any = nn.Sequential(nn.Linear(inner, out))
        w = net[0].weight.detach().clone()
        quant.apply(net, quant.plan(net, NF4()), NF4())
        quant.store(net[0], "weight", w)
        assert torch.equal(nf4.dequantise(quant.nf4_of(net[0], "weight")), nf4.dequantise(nf4.quantise(w)))


def test_peft_takes_a_quantised_layer_for_a_linear_one() -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import Linear

    model: Any = quantised_like(build("llama"), NF4())
    x = tokens(1, 7)
    with torch.no_grad():
        before = model(input_ids=x).logits
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=4), model)
    adapted: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(adapted, Linear) and isinstance(adapted.base_layer, quant.NF4Linear)
    factors = [p for n, p in adapted.named_parameters() if "lora_" in n]
    assert len(factors) == 2 and all(p.dtype == torch.float32 for p in factors)
    assert torch.equal(model(input_ids=x).logits, before)  # B is zero
    model(input_ids=x).logits.sum().backward()
    assert factors[1].grad is not None and bool(factors[1].grad.any())
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


# --- the start-up table ---------------------------------------------------------------------------------------------


def test_the_table_adds_up_and_counts_by_hand() -> None:
    model = quantised_like(build("qwen3_moe"), NF4(), dtype="bfloat16")
    rows = {(r.kind, r.dtype): r for r in quant.table(model)}
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    assert sum(r.bytes for r in rows.values()) == sum(t.numel() * t.element_size() for t in tensors.values())
    experts = rows["experts", "nf4"]
    assert (experts.tensors, experts.elements, experts.trained) == (4, 2 * 8 * (64 * 64 + 64 * 32), False)
    # per layer: half a byte a weight, a byte for 64, four for 64 x 256, and an offset for each of the two stacks
    assert experts.bytes == 2 * (8 * 6144 // 2 + 8 * 6144 // 64 + 4 * (2 + 1) + 4 * 2)
    assert rows["embeddings", "bfloat16"].bytes == 128 * 64 * 2
    assert rows["head", "bfloat16"].elements == 128 * 64
    assert rows["routers", "bfloat16"].elements == 2 * 8 * 64
    assert rows["buffers", "float32"].tensors == 2  # inv_freq, and its original
    assert {r.kind for r in rows.values()} == {
        "experts",
        "linears",
        "embeddings",
        "head",
        "routers",
        "norms",
        "buffers",
    }


def test_a_tied_head_counts_once() -> None:
    rows = quant.table(build("qwen2"))
    assert sum(r.elements for r in rows if r.kind in ("embeddings", "head")) == 128 * 64


def test_piece_bytes_is_what_the_kernel_holds() -> None:
    for shape in ((64, 64), (3, 5), (8, 64, 32), (5, 7, 9)):
        for double in (True, False):
            held = quant.Held(shape=shape, dtype=torch.bfloat16, block=64, double=double)
            w = torch.randn(prod(shape)).view(shape).bfloat16()
            assert quant.piece_bytes(held) == nf4.nbytes(nf4.quantise(w, double=double))


def test_experts_left_in_sixteen_bits_are_noticed() -> None:
    source, linears_only = build("qwen3_moe"), NF4(experts=False)
    items = quant.plan(source, NF4())
    with pytest.raises(ModelError, match=r"not model\.layers\.0\.mlp\.experts\.gate_up_proj, .*\.down_proj"):
        quant.verify(quantised_like(source, linears_only), items)
    whole = quantised_like(source, NF4())
    quant.verify(nn.ModuleDict({"policy": whole}), items)
    with pytest.raises(ModelError, match="or others are"):
        quant.verify(whole, items[1:])


def test_weights_that_are_not_finite_are_refused() -> None:
    source = build("llama")
    with torch.no_grad():
        source.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        quantised_like(source, NF4())
