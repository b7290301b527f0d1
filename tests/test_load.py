"""Models loaded by us equal those loaded by transformers, bit for bit, for every promised family."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build, config, model_class, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel, Qwen3_5MoeForConditionalGeneration

from ft.errors import MissingFileError, ModelError
from ft.io.weights import SINGLE, Memory, open_weights
from ft.models import load, quant
from ft.models.tiny import config_by_family
from ft.recipe.parts import NF4, Model


def recipe(dtype: str = "float32", **over: object) -> Model:
    return Model(id="x", **{"dtype": dtype, **over})  # type: ignore[arg-type]


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, ties under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def same(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    assert not [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])]


def loaded(folder: Path, dtype: str = "float32") -> tuple[PreTrainedModel, load.Filled]:
    model = load.skeleton(load.config_of(folder), recipe(dtype))
    return model, load.fill(model, open_weights(folder), where=str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_from_pretrained(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        theirs = model_class(family).from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
        ours, _ = loaded(tmp_path, dtype)
        same(ours, theirs)
    x = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=x).logits, theirs(input_ids=x).logits)


def test_the_layout_on_disk_is_reported(tmp_path: Path) -> None:
    expected = {"qwen3_moe": "per_expert", "mixtral": "per_expert", "gpt_oss": "fused", "llama": "plain"}
    for family, layout in expected.items():
        build(family).save_pretrained(tmp_path / family)
        assert loaded(tmp_path / family)[1].layout == layout


def test_experts_stored_as_stacks_load_where_the_family_stores_them_one_by_one(tmp_path: Path) -> None:
    model = build("qwen3_5_moe_text")
    model.config.save_pretrained(tmp_path)
    save_file(dict(model.state_dict()), tmp_path / SINGLE)  # runtime names: what the hub has for this family
    ours, report = loaded(tmp_path)
    same(ours, model)
    assert report.layout == "fused"


def vision_language(folder: Path) -> PreTrainedModel:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = config("qwen3_5_moe_text").to_dict()
    root: Any = AutoConfig.for_model("qwen3_5_moe", text_config=text, vision_config=vision, **dict.fromkeys(ids, 3))
    torch.manual_seed(0)
    model = Qwen3_5MoeForConditionalGeneration(root).eval()
    model.save_pretrained(folder)
    stored = load_file(folder / SINGLE) | {"mtp.layers.0.mlp.gate.weight": torch.zeros(8, 64)}
    save_file(stored, folder / SINGLE)
    return model


def test_the_text_tower_of_a_vision_language_model(tmp_path: Path) -> None:
    whole = vision_language(tmp_path)
    ours, report = loaded(tmp_path)
    assert ours.config.model_type == "qwen3_5_moe_text"
    assert {n.split(".")[0] for n in report.dropped} == {"model", "mtp"}
    assert all(n.startswith(("model.visual.", "mtp.")) for n in report.dropped)
    x = tokens(2, 9) + 1  # clear of the image tokens
    with torch.no_grad():
        assert torch.equal(ours(input_ids=x).logits, whole(input_ids=x).logits)


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    model = build("deepseek_v3", num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    extra = {"model.layers.2.eh_proj.weight": torch.zeros(64, 128)}  # behind the model's two layers
    save_file(load_file(tmp_path / SINGLE) | extra, tmp_path / SINGLE)
    ours, report = loaded(tmp_path)
    same(ours, model)
    assert report.dropped == tuple(extra)


@pytest.mark.skipif("inkling2_text" not in CONFIG_MAPPING, reason="this transformers does not know the family")
def test_a_family_whose_operations_only_transformers_knows(tmp_path: Path) -> None:
    """Its gate and up rows are stored interleaved."""
    tiny_config = config_by_family("inkling2_text", 64)
    torch.manual_seed(0)
    model = load.causal_class(tiny_config)._from_config(tiny_config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    ours, _ = loaded(tmp_path)
    same(ours, model)


# --- what does not fit ----------------------------------------------------------------------------------------------


def edit(folder: Path, *, drop: str = "", add: dict[str, torch.Tensor] | None = None) -> None:
    stored = {n: t for n, t in load_file(folder / SINGLE).items() if not drop or drop not in n}
    save_file(stored | (add or {}), folder / SINGLE)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    edit(tmp_path, drop="layers.1.mlp.experts.3.up_proj")
    with pytest.raises(ModelError, match=r"no model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        loaded(tmp_path)
    edit(tmp_path, drop="layers.0.self_attn.q_norm")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight"):
        loaded(tmp_path)


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    edit(tmp_path, add={"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(ModelError, match=r"no place for: 1\n  got: model\.layers\.0\.self_attn\.q_proj\.bias"):
        loaded(tmp_path)


def test_a_stored_head_must_agree_with_the_tie(tmp_path: Path) -> None:
    model = build("qwen2")  # ties its embeddings
    model.save_pretrained(tmp_path)
    embed = load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    edit(tmp_path, add={"lm_head.weight": embed.clone()})
    ours, _ = loaded(tmp_path)
    same(ours, model)
    edit(tmp_path, add={"lm_head.weight": embed + 1})
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        loaded(tmp_path)


def test_a_tied_model_that_stores_the_head_only(tmp_path: Path) -> None:
    model = build("qwen2")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / SINGLE)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / SINGLE)
    ours, _ = loaded(tmp_path)
    same(ours, model)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gemma4_text"])
def test_ties_stay_tied(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    ours, _ = loaded(tmp_path)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight  # type: ignore[union-attr]


# --- configs --------------------------------------------------------------------------------------------------------


def write_config(folder: Path, **facts: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **facts}))
    return folder


def test_a_config_cannot_choose_code(tmp_path: Path) -> None:
    hostile = {
        "_attn_implementation_internal": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "_experts_implementation_internal": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "hidden_size": 64,
    }
    found = load.config_of(write_config(tmp_path, **hostile))
    assert found.hidden_size == 64 and not hasattr(found, "auto_map")
    assert "someone" not in json.dumps({k: str(v) for k, v in vars(found).items()})


def test_bad_configs(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        load.config_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not a model's config"):
        load.config_of(tmp_path)
    with pytest.raises(ModelError, match="no model type 'unheard_of'"):
        load.config_of(write_config(tmp_path, model_type="unheard_of"))
    with pytest.raises(ModelError, match="already quantised"):
        load.config_of(write_config(tmp_path, quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ModelError, match="no causal language model"):
        load.skeleton(AutoConfig.for_model("vit"), recipe())


def test_an_attention_the_model_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be built as asked"):
        load.skeleton(config("gpt_oss"), recipe(attention="sdpa"))
    with pytest.raises(ModelError, match="FlashAttention2"):
        load.skeleton(config("llama"), recipe(attention="flash_attention_2"))
    assert load.skeleton(config("llama"), recipe(attention="eager")).config._attn_implementation == "eager"


def test_the_skeleton_holds_no_memory_but_computed_buffers() -> None:
    model = load.skeleton(config("qwen3_5_moe_text"), recipe("bfloat16"))
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert model.config.use_cache is False and not model.training


# --- random weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3_5_moe_text", "nemotron_h", "gemma4_text", "minimax"])
def test_random_weights_are_the_familys_own(family: str) -> None:
    model = load.skeleton(config(family), recipe())
    load.fill_random(model, 0)
    same(model, build(family, scatter=False, seed=0))


def test_random_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = load.skeleton(config("llama"), recipe("bfloat16"))
        load.fill_random(model, seed)
        return model.get_parameter("model.layers.0.mlp.up_proj.weight")

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = drawn(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, drawn(1)) and not torch.equal(first, drawn(2))


# --- wrappers, progress ---------------------------------------------------------------------------------------------


def test_wrapped_and_adapted_modules_are_filled_under_their_own_names() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    source = build("llama")
    model = load.skeleton(config("llama"), recipe())
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "up_proj"], r=4), model)
    outer = nn.ModuleDict({"policy": model})
    load.materialise(outer, "cpu")
    adapters = {n: p.detach().fill_(3.0) for n, p in outer.named_parameters() if "lora_" in n}
    seen: list[str] = []
    report = load.fill(outer, Memory(tensors=dict(source.state_dict())), progress=seen.append)
    assert len(seen) == report.tensors == len(source.state_dict())
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").base_layer.weight,  # type: ignore[union-attr]
                       source.get_parameter("model.layers.0.self_attn.q_proj.weight"))  # fmt: skip
    assert adapters and all(bool((p == 3.0).all()) for p in adapters.values())


# --- sharded over ranks, and memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nf4", [None, NF4(), NF4(double=False)])
def test_each_of_three_ranks_keeps_its_rows(nf4: NF4 | None, tmp_path: Path) -> None:
    """The group is fake: had loading sent anything, the values would be wrong."""
    build("qwen3_5_moe_text").save_pretrained(tmp_path)

    def skeleton() -> PreTrainedModel:
        model = load.skeleton(load.config_of(tmp_path), recipe())
        if nf4 is not None:
            quant.apply(model, quant.plan(model, nf4), nf4)
        return model

    def fills(model: nn.Module) -> Iterator[None]:
        load.fill(model, open_weights(tmp_path))
        yield
        load.fill_random(model, 1)
        yield

    for rank in range(3):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        try:
            mesh = init_device_mesh("cpu", (3,))
            whole, ours = skeleton(), skeleton()
            for layer in ours.get_submodule("model.layers").children():
                fully_shard(layer, mesh=mesh)
            fully_shard(ours, mesh=mesh)
            for _ in zip(fills(whole), fills(ours), strict=True):
                for name, p in ours.named_parameters():
                    rows = whole.get_parameter(name).chunk(3)
                    mine = rows[rank] if rank < len(rows) else whole.get_parameter(name)[:0]
                    assert isinstance(p, DTensor) and torch.equal(p.to_local(), mine), name
                for (_, a), (_, b) in zip(ours.named_buffers(), whole.named_buffers(), strict=True):
                    assert torch.equal(a, b)
        finally:
            dist.destroy_process_group()


class Live(TorchDispatchMode):
    """Bytes of the storages that tensor operations made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.add(out.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("nf4", [None, NF4()])
def test_peak_memory_is_the_model_and_one_tensor(nf4: NF4 | None, tmp_path: Path) -> None:
    over = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 6}
    build("qwen3_moe", scatter=False, **over).save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    model = load.skeleton(load.config_of(tmp_path), recipe("bfloat16"))
    if nf4 is not None:
        quant.apply(model, quant.plan(model, nf4), nf4)
    with Live() as live:
        load.fill(model, weights)
    final = sum(t.numel() * t.element_size() for t in model.parameters())
    largest, expert = 8 * 256 * 128 * 4, 128 * 128 * 4  # a gate_up_proj in the float32 of the file, and a part of it
    work = largest // 2 + 6_000_000 if nf4 else 0  # quantising casts to bfloat16, then goes by small pieces
    assert weights.total_bytes() > 10_000_000
    assert final + largest <= live.peak <= final + largest + expert + work
