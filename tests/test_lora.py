"""LoRA: targets, peft as the oracle for logits, gradients and files, and what attaching leaves behind."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build, config, model_class, tokens
from torch import Tensor

from ft.errors import ModelError, RecipeError
from ft.io.adapter import load_adapter, save_adapter
from ft.kernels.nf4 import dequantise
from ft.models import lora as loras
from ft.models import quant as quantisation
from ft.models.experts import expert_modules, use_ft_experts
from ft.models.targets import GROUPS, adaptable, resolve, shortest
from ft.recipe import NF4, LoRA

ALL = ("all-linear",)


def adapted(family: str, lora: LoRA, *, seed: int = 7) -> tuple[Any, loras.Attached]:
    """A tiny model on ft's experts with adapters whose A and B are both random."""
    model = build(family)
    use_ft_experts(model)
    attached = loras.attach(model, lora)
    scatter(model, seed)
    return model, attached


def scatter(model: Any, seed: int = 7) -> None:
    """Random A and B."""
    rng = torch.Generator().manual_seed(seed)
    state = loras.adapter_state(model)
    loras.load_state(model, {name: torch.randn(t.shape, generator=rng) * 0.2 for name, t in state.items()})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 9), use_cache=False).logits


def peft_model(family: str, folder: Path, **options: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing and unexpected names
        return PeftModel.from_pretrained(build(family), folder, **options)


# --- targets ---------------------------------------------------------------------------------------------------------


def ends(names: tuple[str, ...], layer: int) -> list[str]:
    return [n.split(f"layers.{layer}.")[1] for n in names if f"layers.{layer}." in n]


def test_groups_of_a_hybrid_model_by_hand():
    found = resolve(build("qwen3_5_moe_text"), [g for g in GROUPS if g != "mlp"])
    delta = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
    assert sorted(ends(found["attention"], 0)) == sorted(f"linear_attn.{n}" for n in delta)
    assert ends(found["attention"], 1) == [f"self_attn.{n}_proj" for n in "qkvo"]
    assert ends(found["experts"], 1) == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert ends(found["shared_experts"], 0) == [f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")]
    assert set(found["all-linear"]) == {n for g in ("attention", "experts", "shared_experts") for n in found[g]}


def test_groups_of_mamba_by_hand():
    found = resolve(build("nemotron_h"), GROUPS)
    assert found["attention"] == ("model.layers.0.mixer.in_proj", *(f"model.layers.2.mixer.{n}_proj" for n in "qkvo"))
    assert found["mlp"] == ("model.layers.3.mixer.up_proj", "model.layers.3.mixer.down_proj")
    assert ends(found["experts"], 1) == ["mixer.experts.up_proj", "mixer.experts.down_proj"]
    latent = {f"model.layers.1.mixer.fc{i}_latent_proj" for i in (1, 2)}
    assert latent == set(found["all-linear"]) - {n for g in GROUPS[:4] for n in found[g]}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_group_holds_a_router_or_the_head(family: str):
    names = {name for group in GROUPS for name in _maybe(build(family), group)}
    assert names
    for part in ("router", "mlp.gate", "lm_head", "shared_expert_gate", "indexer", "wg"):
        assert not [n for n in names if f"{part}." in f"{n}." or n.endswith(part)], part


def _maybe(model: Any, group: str) -> tuple[str, ...]:
    return tuple(n for n, g in adaptable(model).names().items() if g and group in (g, "all-linear"))


def test_names_match_ends_and_routers_only_when_they_are_named():
    model = build("gemma4_text")
    assert len(resolve(model, ["q_proj"])["q_proj"]) == 2
    assert len(resolve(model, ["mlp.down_proj"])["mlp.down_proj"]) == 2
    assert len(resolve(model, ["down_proj"])["down_proj"]) == 4  # and the stacks of the experts
    assert len(resolve(model, ["router.proj"])["router.proj"]) == 2
    with pytest.raises(ModelError, match="'proj' matches nothing"):
        resolve(model, ["proj"])


def test_a_target_that_matches_nothing_lists_what_there_is():
    with pytest.raises(ModelError) as caught:
        resolve(build("qwen3_moe"), ["attention", "q_porj"])
    assert caught.value.where == "adapter.targets" and "did you mean 'q_proj'" in caught.value.fix
    assert "attention (8), experts (4)" in caught.value.expected and "self_attn.q_proj" in caught.value.expected
    with pytest.raises(ModelError, match="'mlp' matches nothing"):  # every layer is routed
        resolve(build("qwen3_moe"), ["mlp"])


def test_shortest_ends_match_nothing_else():
    universe = ["a.0.x.q", "a.1.x.q", "a.0.y.q", "a.1.y.q", "a.0.z", "a.1.z"]
    assert shortest(["a.0.x.q", "a.1.x.q"], universe) == ["x.q"]
    assert shortest(["a.0.z", "a.1.z", "a.0.y.q"], universe) == ["0.y.q", "z"]
    assert shortest([], universe) == []


# --- peft is the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_ours_and_gives_the_same_logits(family: str, tmp_path: Path):
    # peft 0.21 cannot load what it saves for laguna's shared experts: it renames shared_experts a second time.
    targets = ("attention", "mlp", "experts") if family == "laguna" else ALL
    model, attached = adapted(family, LoRA(r=4, alpha=8.0, targets=targets))
    save_adapter(tmp_path / "a", loras.adapter_state(model), loras.adapter_config(attached, "somewhere/base"))
    theirs = peft_model(family, tmp_path / "a")
    assert torch.allclose(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - logits(build(family))).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "mixtral"])
@pytest.mark.parametrize("lora", [LoRA(r=1, targets=("experts",)), LoRA(r=16, rslora=True, targets=("experts",))])
def test_peft_agrees_on_ranks_and_rslora(family: str, lora: LoRA, tmp_path: Path):
    model, attached = adapted(family, lora)
    save_adapter(tmp_path / "a", loras.adapter_state(model), loras.adapter_config(attached, "somewhere/base"))
    assert torch.allclose(logits(peft_model(family, tmp_path / "a")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("stack", ["down_proj", "first"])
def test_one_stack_alone_is_not_nested(family: str, stack: str, tmp_path: Path):
    name = stack if stack != "first" else "experts.up_proj" if family == "nemotron_h" else "gate_up_proj"
    name = f"experts.{name}" if name == "down_proj" else name
    model, attached = adapted(family, LoRA(r=2, targets=(name, "o_proj")))
    state = loras.adapter_state(model)
    assert not [key for key in state if "base_layer" in key] and any("experts.lora_A" in key for key in state)
    save_adapter(tmp_path / "a", state, loras.adapter_config(attached, "somewhere/base"))
    assert torch.allclose(logits(peft_model(family, tmp_path / "a")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3_5_moe_text", "gpt_oss", "nemotron_h", "olmoe"])
def test_an_adapter_made_by_peft_loads_into_ours_with_its_gradients(family: str, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    first = "up_proj" if family == "nemotron_h" else "gate_up_proj"
    made = LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM",
        target_parameters=[f"experts.{first}", "experts.down_proj"],
    )  # fmt: skip
    theirs = get_peft_model(build(family), made)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(str(tmp_path / "a"))

    ours = build(family)
    use_ft_experts(ours)
    loras.attach(ours, LoRA(r=4, alpha=12.0, targets=("q_proj", "o_proj", "experts")))
    tensors, written = load_adapter(tmp_path / "a")
    loras.load_state(ours, tensors, written)
    assert torch.allclose(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    for name, tensor in loras.adapter_state(ours).items():  # and out again, bit for bit
        assert torch.equal(tensor, tensors[name]), name

    for model in (ours, theirs):
        model(input_ids=tokens(2, 9), use_cache=False).logits.log_softmax(-1)[..., 5].mean().backward()
    expected: dict[str, Any] = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    got = grads_in_peft_names(ours)
    assert len(got) == len(expected)
    for name, grad in got.items():
        theirs_grad = expected[name.replace(".weight", ".default.weight")]
        assert (grad - theirs_grad).abs().max() <= 1e-5 * theirs_grad.abs().max().clamp(min=0.1), name


@torch.no_grad()
def grads_in_peft_names(model: Any) -> dict[str, Tensor]:
    """The adapters' gradients; overwrites the adapters with them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.grad)
    return loras.adapter_state(model)


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "gpt_oss", "nemotron_h"])
def test_adapters_on_a_4_bit_base_equal_those_on_its_dequantised_weights(family: str):
    quant, plain = build(family), build(family)
    items = quantisation.plan(quant, NF4())
    assert {item.kind for item in items} == {"linear", "experts"}
    quantisation.apply(quant, items, NF4())
    with torch.no_grad():
        for item in items:
            dense = plain.get_submodule(item.path).get_parameter(item.leaf)
            owner = quant.get_submodule(item.path)
            quantisation.store(owner, item.leaf, dense)
            dense.copy_(dequantise(quantisation.nf4_of(owner, item.leaf)))
    outs = []
    for model in (quant, plain):
        loras.attach(model, LoRA(r=4, targets=ALL))
        scatter(model)
        out = model(input_ids=tokens(2, 9), use_cache=False).logits
        out.log_softmax(-1)[..., 5].mean().backward()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        outs.append({"logits": out.detach(), **grads_in_peft_names(model)})
    assert outs[0].keys() == outs[1].keys()
    for name, value in outs[1].items():
        assert torch.allclose(outs[0][name], value, rtol=1e-4, atol=1e-6), name


# --- what attaching leaves behind ------------------------------------------------------------------------------------


def test_only_adapters_are_trained_and_they_are_float32():
    model = build("qwen3_5_moe_text").bfloat16()
    use_ft_experts(model)
    attached = loras.attach(model, LoRA(r=4, targets=("attention", "experts")))
    loras.init(model, 0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (len(attached.linears) + len(attached.stacks)) == 2 * (9 + 4)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}
    assert all(("lora_" in n) or ("ft_lora" in n) for n in trained)
    model(input_ids=tokens(1, 5), use_cache=False).logits.float().square().mean().backward()
    assert all((p.grad != 0).any() for n, p in trained.items() if n.endswith(("_B", "lora_B.default.weight")))


def test_adapters_attach_on_the_meta_device_and_equal_those_attached_later():
    lora = LoRA(r=4, targets=ALL)
    with torch.device("meta"):
        empty = model_class("qwen3_5_moe_text")(config("qwen3_5_moe_text"))
    use_ft_experts(empty)
    on_meta = loras.attach(empty, lora)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    loras.init(empty, 3)

    model = build("qwen3_5_moe_text")
    before = logits(model)
    assert loras.attach(model, lora) == on_meta
    loras.init(model, 3)
    first, second = loras.adapter_state(empty), loras.adapter_state(model)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert torch.allclose(logits(model), before, rtol=1e-5, atol=1e-5)


def test_init_depends_on_seed_and_name_alone():
    states = []
    for targets, seed in ((("experts",), 0), (ALL, 0), (ALL, 1)):
        model = build("olmoe")
        loras.attach(model, LoRA(r=8, targets=targets))
        loras.init(model, seed)
        states.append(loras.adapter_state(model))
    few, many, other = states
    assert few.keys() < many.keys() and all(torch.equal(few[n], many[n]) for n in few)
    for name, tensor in many.items():
        if "lora_B" in name:
            assert (tensor == 0).all()
        else:  # uniform within 1 / sqrt(64) or 1 / sqrt(32), as peft's kaiming_uniform with a = sqrt(5)
            bound = tensor.shape[1] ** -0.5
            assert 0.97 * bound < tensor.abs().max() <= bound and tensor.mean().abs() < 0.1 * bound
            assert not torch.equal(tensor, other[name])
    assert len({t.flatten()[0].item() for n, t in many.items() if "lora_A" in n}) == len(many) // 2


def test_disabled_adapters_leave_the_base_and_the_switch_is_restored():
    model, _ = adapted("qwen3_5_moe_text", LoRA(r=4, targets=ALL))
    on = logits(model)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), loras.disabled(model):
        assert torch.allclose(logits(model), logits(build("qwen3_5_moe_text")), rtol=1e-5, atol=1e-5)
        assert [p.requires_grad for p in model.parameters()] == trained
        raise KeyboardInterrupt
    assert torch.equal(logits(model), on)


def test_dropout_is_for_linears_only():
    with pytest.raises(RecipeError, match="LoRA on experts has no dropout") as caught:
        loras.attach(build("olmoe"), LoRA(dropout=0.1, targets=("attention", "experts")))
    assert caught.value.where == "adapter.dropout"
    model = build("olmoe")
    attached = loras.attach(model, LoRA(r=2, dropout=0.5, targets=("attention",)))
    assert loras.adapter_config(attached, "x")["lora_dropout"] == 0.5
    loras.init(model, 0)
    loras.load_state(model, {n: torch.ones_like(t) for n, t in loras.adapter_state(model).items()})
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


def test_config_says_what_peft_needs():
    _, attached = adapted("qwen3_5_moe_text", LoRA(r=4, alpha=8.0, rslora=True, targets=ALL))
    said = loras.adapter_config(attached, "owner/base")
    assert said["peft_type"] == "LORA" and said["task_type"] == "CAUSAL_LM" and said["inference_mode"] is True
    assert (said["r"], said["lora_alpha"], said["use_rslora"]) == (4, 8, True)
    assert said["base_model_name_or_path"] == "owner/base"
    qkvo = [f"{n}_proj" for n in "qkvo"]
    delta = ["in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj"]
    assert said["target_modules"] == sorted(qkvo + delta)
    # peft would turn modules called gate_proj into stacks of experts, so they are named as parameters
    shared = [f"{n}_proj.weight" for n in ("down", "gate", "up")]
    assert said["target_parameters"] == ["down_proj", *shared[:1], *shared[1:2], "gate_up_proj", *shared[2:]]


# --- loading ---------------------------------------------------------------------------------------------------------


def test_loading_what_does_not_fit_is_an_error_that_lists_it():
    model, _ = adapted("qwen3_moe", LoRA(r=4, targets=("q_proj", "experts")))
    state = loras.adapter_state(model)
    moved = {n.replace("layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"): t for n, t in state.items()}
    with pytest.raises(ModelError) as caught:
        loras.load_state(model, moved)
    assert "layers.1.self_attn.q_proj.lora_A" in caught.value.expected
    assert "layers.1.self_attn.k_proj.lora_B" in caught.value.got

    other, _ = adapted("qwen3_moe", LoRA(r=2, targets=("q_proj", "experts")))
    with pytest.raises(ModelError, match=r"adapter\.r") as caught:
        loras.load_state(model, loras.adapter_state(other))
    assert caught.value.expected == "(4, 64)" and caught.value.got == "(2, 64)"


def test_loading_checks_scaling_and_stack():
    model, _ = adapted("qwen3_moe", LoRA(r=4, alpha=8.0, targets=("experts.down_proj",)))
    state, fine = loras.adapter_state(model), {"r": 4, "lora_alpha": 8, "target_parameters": ["experts.down_proj"]}
    loras.load_state(model, state, fine)
    with pytest.raises(ModelError, match=r"adapter\.alpha=16"):
        loras.load_state(model, state, fine | {"lora_alpha": 16})
    with pytest.raises(ModelError, match="another stack"):
        loras.load_state(model, state, fine | {"target_parameters": ["experts.gate_up_proj"]})


def test_a_second_adapter_is_refused():
    model, _ = adapted("olmoe", LoRA(targets=("experts",)))
    with pytest.raises(ModelError, match="adapters already"):
        loras.attach(model, LoRA(targets=("attention",)))


def test_attaching_to_experts_makes_them_ft_experts():
    """LoRA of experts is read by ft's kernel alone: another implementation would train what it does not use."""
    model = build("olmoe")
    assert all(m.config._experts_implementation != "ft" for m in expert_modules(model).values())
    loras.attach(model, LoRA(targets=("experts",)))
    assert all(m.config._experts_implementation == "ft" for m in expert_modules(model).values())


# --- importing peft --------------------------------------------------------------------------------------------------

NOISY = """
import logging

logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no module")
logger.warning("the library is too old")
"""


def test_one_remark_of_bitsandbytes_is_left_out_while_peft_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """What it says of a kernel that nothing here calls, and nothing else; later it may say that too."""
    (tmp_path / "peft.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)  # put back afterwards
    del sys.modules["peft"]
    caplog.set_level(logging.WARNING, "bitsandbytes.backends.cpu.ops")  # whatever other tests silence
    assert loras.import_peft().logger is logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert caplog.messages == ["the library is too old"]
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("gemm_4bit_forward is slow here")
    assert caplog.messages[1:] == ["gemm_4bit_forward is slow here"]


# --- sharded ---------------------------------------------------------------------------------------------------------


def test_two_ranks_hold_shards_of_the_same_adapters(tmp_path: Path):
    """FSDP2 over gloo: attached on meta, sharded, filled: the whole state, logits and gradients are one process's."""
    lora = LoRA(r=4, targets=("experts",))  # without linears, so that no rank imports peft
    model = build("olmoe")
    loras.attach(model, lora)
    loras.init(model, 5)
    started = loras.adapter_state(model)
    scatter(model)
    mean_loss(model, both=True).backward()
    expected = {"logits": logits(model), **grads_in_peft_names(model)}
    torch.save(build("olmoe").state_dict(), tmp_path / "base")
    torch.multiprocessing.spawn(_rank, (tmp_path, lora), nprocs=2)
    got = torch.load(tmp_path / "got", weights_only=True)
    assert got["started"].keys() == started.keys()
    assert all(torch.equal(got["started"][n], started[n]) for n in started)
    assert got["sharded"] == [4, 4]  # of 8 experts, A and B
    del got["started"], got["sharded"]
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6), name


def mean_loss(model: Any, *, both: bool, rank: int = 0) -> Tensor:
    rows = tokens(2, 9) if both else tokens(2, 9)[rank : rank + 1]
    return model(input_ids=rows, use_cache=False).logits.log_softmax(-1)[..., 5].mean()


def _rank(rank: int, folder: Path, lora: LoRA) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    try:
        with torch.device("meta"):
            model = model_class("olmoe")(config("olmoe")).eval()
        loras.attach(model, lora)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model.to_empty(device="cpu")
        _fill(model, torch.load(folder / "base", weights_only=True))
        loras.init(model, 5)
        started = loras.adapter_state(model)
        experts = model.model.layers[0].mlp.experts.ft_lora
        sharded = [p.to_local().shape[0] for p in (experts.down_proj_A, experts.down_proj_B)]
        with loras.disabled(model):
            logits(model)  # the first use of every parameter
        scatter(model)
        mean_loss(model, both=False, rank=rank).backward()
        got = {"logits": logits(model), **grads_in_peft_names(model), "started": started, "sharded": sharded}
        if rank == 0:
            torch.save(got, folder / "got")
    finally:
        dist.destroy_process_group()


def _fill(model: Any, base: dict[str, Tensor]) -> None:
    from torch.distributed.tensor import distribute_tensor

    for name, parameter in model.named_parameters():
        if name in base:
            whole = distribute_tensor(base[name], parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.data.to_local().copy_(whole.to_local())
    fresh = build("olmoe")
    for (_, buffer), (_, value) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
        buffer.copy_(value)
