"""The experts module that transformers ships, with peft's LoRA on its stacks, holding the tensors of a problem.

Shapes: T tokens, K experts per token, E experts, D model width, M and N out- and input width of a stack, r LoRA rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ft.commands.kernels.contest import Results, Run, differentiate
from ft.kernels.experts import LoRA
from ft.kernels.experts.cases import Problem

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class Block(nn.Module):
    """An experts module under a parent, as peft wants it; routing is given."""

    def __init__(self, problem: Problem, implementation: str):
        from transformers import AutoConfig
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

        super().__init__()
        up, down = problem.params.up.weight, problem.params.down.weight
        assert isinstance(up, Tensor) and isinstance(down, Tensor)
        E, D, I = down.shape
        config = AutoConfig.for_model(
            "qwen3_5_moe_text", hidden_size=D, moe_intermediate_size=I, num_experts=E,
            num_experts_per_tok=problem.index_TK.shape[1],
        )  # fmt: skip
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.experts: Any = Qwen3_5MoeExperts(config)
        for name, weight in (("gate_up_proj", up), ("down_proj", down)):
            setattr(self.experts, name, nn.Parameter(weight.detach(), requires_grad=weight.requires_grad))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)


def transformers_experts(problem: Problem, implementation: str) -> Run:
    """Forward and backward of one of transformers' implementations, and of peft's LoRA where the problem has one."""
    block: nn.Module = Block(problem, implementation)
    if problem.lora is not None:
        block = adapted(block, problem.lora)
    hidden_TD = problem.hidden_TD.detach().requires_grad_()
    weight_TK = problem.weight_TK.detach().to(hidden_TD.dtype).requires_grad_()
    leaves = {"hidden": hidden_TD, "weight": weight_TK}
    leaves |= {f"their {name}": p for name, p in block.named_parameters() if p.requires_grad}

    def run() -> Results:
        found = differentiate(block(hidden_TD, problem.index_TK, weight_TK), leaves)
        return {name: value for name, value in found.items() if "their" not in name}

    return run


def adapted(block: nn.Module, lora: LoRA) -> nn.Module:
    """peft's wrappers on both stacks, with the values of the factors in peft's layout: A expert-major, B rank-major."""
    from peft import LoraConfig, inject_adapter_in_model

    assert lora.up is not None and lora.down is not None
    r = lora.up.A_ErN.shape[1]
    config = LoraConfig(
        r=r,
        lora_alpha=lora.up.scaling * r,  # type: ignore[arg-type]  # an int by annotation, a factor in use
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    outer: Any = inject_adapter_in_model(config, block)
    for factors, wrapper in ((lora.down, outer.experts), (lora.up, outer.experts.base_layer)):
        wrapper.lora_A.default.weight.data = factors.A_ErN.detach().flatten(0, 1).clone()
        wrapper.lora_B.default.weight.data = factors.B_EMr.detach().permute(1, 2, 0).flatten(1).clone()
    return outer
