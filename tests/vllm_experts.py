"""Run by a Python that has vLLM: what its own loader makes of adapters of routed experts.

``python vllm_experts.py CASES.json OUT.safetensors``. A case names an adapter's folder, an experts module as vLLM calls
it, the stored names of its projections (gate, down, up; up is null where there is no gate), E experts, widths H and I,
and whether vLLM holds gate and up as one ("stacked"). Written are B A of each expert, as its kernels would read them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


def experts_module(case: dict[str, Any]) -> Any:
    """vLLM's wrapper of an experts module, without the module: its buffers and the code that fills them."""
    kind = FusedMoE3DWithLoRA if case["stacked"] else FusedMoEWithLoRA
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    made.moe_config = SimpleNamespace(
        num_local_experts=case["E"], num_experts=case["E"], hidden_dim=case["H"],
        intermediate_size_per_partition=case["I"],
        moe_parallel_config=SimpleNamespace(ep_rank=0, use_ep=False, tp_size=1),
    )  # fmt: skip
    made.tp_size, made.tp_rank, made.device = 1, 0, "cpu"
    made.enable_moe_shared_loras = False
    made._w13_slices = 1 if case["stacked"] or case["names"][2] is None else 2
    limits = SimpleNamespace(
        max_loras=1, fully_sharded_loras=False, enable_moe_shared_loras=False, max_lora_rank=8, lora_dtype=torch.float32
    )
    made.create_lora_weights(1, limits, SimpleNamespace(architectures=[case["architecture"]]))
    return made


def manager(case: dict[str, Any], module: Any) -> Any:
    """Stands in for vLLM's manager of adapters, of a model with this one experts module."""
    made = LoRAModelManager.__new__(LoRAModelManager)
    names = RoutedExperts.build_expert_params_mapping(
        *case["names"], num_experts=case["E"], routed_experts_prefix="", is_gated=case["names"][2] is not None
    )
    parent = case["module"].rpartition(".")[0]
    packed = [] if case["stacked"] else [f"{parent}.{name.rstrip('.')}" for _, name, _, _ in names]
    vars(made).update(
        packed_modules={case["module"]: packed} if packed else {}, modules={case["module"]: module},
        is_pooling_model=False, _enable_moe_shared_loras=False, _enable_mixed_moe_lora_format=False,
        _is_3d_moe_model=case["stacked"], _is_non_gated_moe=case["names"][2] is None, _use_ep=False,
    )  # fmt: skip
    return made


def deltas(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    module = experts_module(case)
    helper = PEFTHelper.from_local_dir(case["adapter"], None)
    expected = {"experts"} | {
        f"experts.{e}.{name}" for e in range(case["E"]) for name in case["names"] if name is not None
    }
    read = LoRAModel.from_local_checkpoint(case["adapter"], expected, helper, device="cpu", dtype=torch.float32)
    LoRAModelManager._create_merged_loras_inplace(manager(case, module), read)
    found = read.loras[case["module"]]
    module.set_lora(0, found.lora_a, found.lora_b)
    A, B = module.w13_lora_a_stacked, module.w13_lora_b_stacked
    made = {f"w13.{i}": b[0] @ a[0] for i, (a, b) in enumerate(zip(A, B, strict=True))}
    return made | {"w2": module.w2_lora_b_stacked[0][0] @ module.w2_lora_a_stacked[0][0]}


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    save_file({f"{i}.{k}": v.contiguous() for i, c in enumerate(cases) for k, v in deltas(c).items()}, sys.argv[2])
