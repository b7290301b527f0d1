"""Adapters and models as vLLM reads them: merged by their stored names, and through vLLM's own loader.

Shapes: E experts, M and N out- and input width of a weight, r LoRA rank.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build
from torch import Tensor
from transformers import AutoModelForCausalLM

from ft.errors import RecipeError
from ft.io import served
from ft.io.adapter import save_adapter
from ft.io.convert import Read, Stack
from ft.io.weights import Memory, open_weights, write_weights
from ft.models import load
from ft.models import lora as loras
from ft.models.experts import expert_modules, use_ft_experts
from ft.recipe import LoRA

HERE = Path(__file__).parent
SCALING = 2.0
LORA = LoRA(r=2, alpha=4.0, targets=("attention", "experts"))
KEY = "base_model.model."


def test_factors_of_experts_by_hand():
    """Two experts, r = 1, gate and up of one row each: B's columns are experts, its rows gate then up."""
    stack = Stack(rows=(("e.0.g.weight", "e.0.u.weight"), ("e.1.g.weight", "e.1.u.weight")), sizes=(1, 1), dim=0)
    down = Stack(rows=(("e.0.d.weight",), ("e.1.d.weight",)), sizes=(2,), dim=0)
    state = {
        f"{KEY}x.base_layer.lora_A.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        f"{KEY}x.base_layer.lora_B.weight": torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
        f"{KEY}x.lora_A.weight": torch.tensor([[9.0], [10.0]]),
        f"{KEY}x.lora_B.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    found = served.adapter(state, {"x.gate_up_proj": stack, "x.down_proj": down})
    plain = {name.removeprefix(KEY).removesuffix(".weight"): tensor.tolist() for name, tensor in found.items()}
    assert plain == {
        "e.0.g.lora_A": [[1.0, 2.0]], "e.0.g.lora_B": [[5.0]], "e.0.u.lora_A": [[1.0, 2.0]], "e.0.u.lora_B": [[7.0]],
        "e.1.g.lora_A": [[3.0, 4.0]], "e.1.g.lora_B": [[6.0]], "e.1.u.lora_A": [[3.0, 4.0]], "e.1.u.lora_B": [[8.0]],
        "e.0.d.lora_A": [[9.0]], "e.0.d.lora_B": [[1.0], [3.0]],
        "e.1.d.lora_A": [[10.0]], "e.1.d.lora_B": [[2.0], [4.0]],
    }  # fmt: skip


def test_names_are_the_folders():
    state = {f"{KEY}model.q.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
    state |= {f"{KEY}model.experts{i}.lora_{f}.weight": torch.ones(2, 2) for f in "AB" for i in ("", ".base_layer")}
    ops = {
        "model.q.weight": Read(source="model.language_model.q.weight"),
        "model.experts.gate_up_proj": Read(source="model.language_model.experts.gate_up_proj"),
        "model.experts.down_proj": Read(source="model.language_model.experts.down_proj"),
    }
    found = served.adapter(state, ops)
    assert found.keys() == {name.replace(f"{KEY}model.", f"{KEY}model.language_model.") for name in state}
    assert served.adapter_config({"r": 2, "target_parameters": ["x"]}, found) == {
        "r": 2, "target_modules": ["base_layer", "experts", "q"], "target_parameters": None,
    }  # fmt: skip


def test_one_stack_alone_is_refused():
    state = {f"{KEY}x.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
    with pytest.raises(RecipeError, match="only where all their projections have one"):
        served.adapter(state, {"x.up_proj": Read(source="x.up_proj"), "x.down_proj": Read(source="x.down_proj")})


class Tiny:
    """A tiny model in a folder, adapted, with factors other than zero; and what is sent of them."""

    def __init__(self, family: str, folder: Path):
        self.net, self.folder = build(family), folder
        self.net.save_pretrained(folder / "base")
        use_ft_experts(self.net)
        attached = loras.attach(self.net, LORA)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in loras.factors(self.net).values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.plan = load.plan(self.net, open_weights(folder / "base"))
        self.sent = served.adapter(loras.adapter_state(self.net), self.plan.ops)
        self.config = served.adapter_config(loras.adapter_config(attached, "base"), self.sent)

    def delta(self, e: int, stack: str) -> Tensor:
        """What the adapter adds to expert e of the last experts module, (M, N)."""
        lora: Any = list(expert_modules(self.net).values())[-1].ft_lora
        return SCALING * getattr(lora, f"{stack}_B")[e].detach() @ getattr(lora, f"{stack}_A")[e].detach()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "nemotron_h", "deepseek_v3", "ernie4_5_moe"])
def test_added_to_stored_weights_of_the_same_names_they_make_the_same_model(family: str, tmp_path: Path):
    """The oracle is transformers, which loads the sum of the folder's weights and B A under the same name."""
    tiny, stored = Tiny(family, tmp_path), load_file(tmp_path / "base" / "model.safetensors")
    names = {key.removesuffix(".lora_A.weight").removeprefix(KEY) for key in tiny.sent if ".lora_A" in key}
    for name in names:
        A, B = (tiny.sent[f"{KEY}{name}.lora_{factor}.weight"] for factor in "AB")
        stored[f"{name}.weight"] += SCALING * B @ A
    save_file(stored, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        adapted, base = tiny.net(ids).logits, build(family)(ids).logits
        torch.testing.assert_close(merged(ids).logits, adapted, atol=2e-5, rtol=1e-4)
    assert (adapted - base).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h", "deepseek_v3", "gemma4_text", "gpt_oss"])
def test_a_whole_model_is_written_as_its_folder_was(family: str, tmp_path: Path):
    """Byte for byte the folder that transformers wrote, and tensors of another tower with it."""
    net = build(family)
    net.save_pretrained(tmp_path / "base")
    source = Memory(tensors={**load_file(tmp_path / "base" / "model.safetensors"), "mtp.fc.weight": torch.ones(2)})
    plan = load.plan(net, source)
    tensors = {name: getattr(slot.owner, slot.leaf).detach() for name, slot in load.slots(net).items()}
    write_weights(tmp_path / "again", served.model(tensors, plan, source))
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == source.tensors.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in source.tensors.items())


# Stored names of gate, down and up projections, and the architecture's name.
LAYOUTS: dict[str, tuple[tuple[str, str, str | None], str]] = {
    "qwen3_moe": (("gate_proj", "down_proj", "up_proj"), "Qwen3MoeForCausalLM"),
    "mixtral": (("w1", "w2", "w3"), "MixtralForCausalLM"),
    "nemotron_h": (("up_proj", "down_proj", None), "NemotronHForCausalLM"),
    "gpt_oss": (("w1", "w2", "w3"), "GptOssForCausalLM"),
}


@pytest.mark.timeout(300)
@pytest.mark.skipif(not os.environ.get("FT_VLLM_PYTHON"), reason="FT_VLLM_PYTHON names no Python with vLLM")
def test_vllms_own_loader_finds_every_experts_factors(tmp_path: Path):
    made = {family: Tiny(family, tmp_path / family) for family in LAYOUTS}
    cases = []
    for family, tiny in made.items():
        inside = {key: tensor for key, tensor in tiny.sent.items() if ".experts." in key}
        save_adapter(tmp_path / family / "adapter", inside, tiny.config)
        module = list(inside)[-1].removeprefix(KEY).partition(".experts")[0] + ".experts"
        M, N = tiny.delta(0, "down_proj").shape
        cases.append({
            "adapter": str(tmp_path / family / "adapter"), "module": module, "names": LAYOUTS[family][0], "E": 8,
            "H": M, "I": N, "stacked": family == "gpt_oss", "architecture": LAYOUTS[family][1],
        })  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [os.environ["FT_VLLM_PYTHON"], str(HERE / "vllm_experts.py"), tmp_path / "cases.json", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "out")
    for i, (family, tiny) in enumerate(made.items()):
        up = "up_proj" if family == "nemotron_h" else "gate_up_proj"
        halves = [found[name] for name in (f"{i}.w13.0", f"{i}.w13.1") if name in found]
        for e in range(8):
            both = torch.cat([half[e] for half in (halves[:1] if family == "nemotron_h" else halves)])
            torch.testing.assert_close(both, tiny.delta(e, up))
            torch.testing.assert_close(found[f"{i}.w2"][e], tiny.delta(e, "down_proj"))
