"""Routed experts, forward and backward: ft against transformers' implementations, with peft's LoRA where there is LoRA.

    python bench/experts.py [--rounds 5] [--threads N] [--only 'E64 T128'] [--dtype float32 bfloat16]

The module is Qwen3.5-MoE's, 512 wide, 256 inside, 8 experts per token. ``x limit`` divides by the time of dense
matrix products of as many FLOPs: gate-and-up and down over T * 8 rows, forward and for the input's gradient (and for
the weights' where they are trained). All contenders take turns in one process, so that a slow moment of the machine
strikes each; figures are medians over rounds. ``MB`` is how far one step raises the
process's peak memory. Outputs and input gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attrs import frozen
from common import measure, record
from torch import Tensor, nn

D, I, K, RANK = 512, 256, 8, 16


@frozen
class Setting:
    mode: str  # "lora": frozen base and LoRA of rank 16; "frozen": no LoRA; "trained"; "nf4": LoRA on a 4-bit base
    experts: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.mode} E{self.experts} T{self.tokens}"


SETTINGS = (
    Setting("lora", 32, 1024),
    Setting("lora", 64, 128),
    Setting("lora", 64, 1024),
    Setting("lora", 128, 512),
    Setting("nf4", 64, 128),
    Setting("nf4", 64, 1024),
    Setting("frozen", 64, 128),
    Setting("frozen", 64, 1024),
    Setting("trained", 32, 1024),
)


class Block(nn.Module):
    """An experts module under a parent, as peft wants it; routing is given."""

    def __init__(self, experts: int, dtype: torch.dtype, implementation: str):
        from transformers import AutoConfig
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

        super().__init__()
        config = AutoConfig.for_model(
            "qwen3_5_moe_text", hidden_size=D, moe_intermediate_size=I, num_experts=experts, num_experts_per_tok=K
        )
        config._experts_implementation = implementation
        self.experts: Any = Qwen3_5MoeExperts(config).to(dtype)
        rng = torch.Generator().manual_seed(0)
        for parameter in self.experts.parameters():
            parameter.data.normal_(std=0.04, generator=rng)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)


def ft_block(setting: Setting, dtype: torch.dtype) -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from ft.models import experts as ft_experts
    from ft.models import quant
    from ft.recipe import NF4

    ALL_EXPERTS_FUNCTIONS.register(ft_experts.NAME, ft_experts.forward)
    block = Block(setting.experts, dtype, ft_experts.NAME)
    block.experts.ft_impl, block.experts.ft_tile = "auto", None
    if setting.mode == "nf4":
        values = dict(block.experts.named_parameters())
        quant.apply(block, quant.plan(block, NF4()), NF4())
        for name, value in values.items():
            quant.store(block.experts, name, value.detach())
    block.requires_grad_(setting.mode == "trained")
    if setting.mode in ("lora", "nf4"):
        shapes = {name: ft_experts.stack_shape(block.experts, name) for name in ("gate_up_proj", "down_proj")}
        block.experts.ft_lora = ft_experts.ExpertLoRA(shapes, r=RANK, scaling=2.0, device="cpu")
        _scatter(block.experts.ft_lora)
    return block


def theirs_block(setting: Setting, dtype: torch.dtype, implementation: str) -> nn.Module:
    block = Block(setting.experts, dtype, implementation)
    if setting.mode != "lora":
        return block.requires_grad_(setting.mode == "trained")
    from peft import LoraConfig, inject_adapter_in_model

    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=names)
    return inject_adapter_in_model(config, block)


def _scatter(module: nn.Module) -> None:
    rng = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.04, generator=rng)


def same_adapters(ours: Any, theirs: Any) -> None:
    """Give peft's wrappers the values of ft's factors, in peft's layout."""
    lora: Any = ours.experts.ft_lora
    outer: Any = theirs.experts
    for name, wrapper in (("down_proj", outer), ("gate_up_proj", outer.base_layer)):
        A, B = getattr(lora, f"{name}_A").data, getattr(lora, f"{name}_B").data
        wrapper.lora_A.default.weight.data.copy_(A.flatten(0, 1))
        wrapper.lora_B.default.weight.data.copy_(B.permute(1, 2, 0).flatten(1))


def step(block: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
    block.zero_grad(set_to_none=True)
    hidden, index, weight = inputs
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = block(hidden, index, weight)
    out.backward(grad)
    assert hidden.grad is not None
    return out.detach(), hidden.grad


def limit(setting: Setting, dtype: torch.dtype) -> Callable[[], None]:
    """Dense products of the same FLOPs, without LoRA."""
    rows = setting.tokens * K
    x, h, a = (torch.randn(rows, n, dtype=dtype) for n in (D, 2 * I, I))
    up, down = torch.randn(2 * I, D, dtype=dtype), torch.randn(D, I, dtype=dtype)

    def run() -> None:
        _ = x @ up.t(), a @ down.t(), x @ down, h @ up
        if setting.mode == "trained":
            _ = h.t() @ x, x.t() @ a

    return run


def contenders(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    rng = torch.Generator().manual_seed(2)
    hidden = torch.randn(setting.tokens, D, generator=rng).to(dtype)
    index = torch.rand(setting.tokens, setting.experts, generator=rng).topk(K).indices
    weight = torch.rand(setting.tokens, K, generator=rng).to(dtype)
    grad = torch.randn(setting.tokens, D, generator=rng).to(dtype)
    inputs = hidden, index, weight
    ours = ft_block(setting, dtype)
    blocks = {"ft": ours}
    if setting.mode == "nf4":  # nobody else trains on 4-bit stacks: the yardstick is ft on 16 or 32-bit ones
        blocks["ft, dense base"] = ft_block(Setting("lora", setting.experts, setting.tokens), dtype)
    else:
        few = setting.tokens <= 128 and setting.mode == "frozen"  # batched_mm copies a matrix per routed row
        for implementation in ("grouped_mm", "eager", *(("batched_mm",) if few else ())):
            blocks[implementation] = theirs_block(setting, dtype, implementation)
            if setting.mode == "lora":
                same_adapters(ours, blocks[implementation])
        compare(blocks, inputs, grad, 1e-4 if dtype == torch.float32 else 3e-2)
    runs: dict[str, Callable[[], Any]] = {n: lambda b=b: step(b, inputs, grad) for n, b in blocks.items()}
    return {"limit": limit(setting, dtype), **runs}


def compare(blocks: dict[str, nn.Module], inputs: tuple[Tensor, ...], grad: Tensor, tolerance: float) -> None:
    ours = step(blocks["ft"], inputs, grad)
    for name, block in blocks.items():
        for mine, other in zip(ours, step(block, inputs, grad), strict=True):
            error = ((mine - other).norm() / other.norm()).item()
            assert error < tolerance, f"ft and {name} differ by {error}"


def extra_megabytes(run: Callable[[], Any]) -> float:
    """How far one run raises the process's memory at most."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier runs freed must not serve this one unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for setting in (s for s in SETTINGS if args.only in s.name):
        for dtype in args.dtype:
            runs = contenders(setting, getattr(torch, dtype))
            times = measure(runs, args.rounds)
            extra = {name: extra_megabytes(run) for name, run in runs.items()}
            bound = [median(o / b for o, b in zip(own, times["limit"], strict=True)) for own in times.values()]
            over = {name: median(own) for name, own in times.items()}
            print(f"{setting.name} {dtype}")
            for (name, seconds), ratio in zip(over.items(), bound, strict=True):
                print(f"  {name:>16}  {seconds * 1e3:9.1f} ms  {ratio:6.2f}x limit  {seconds / over['ft']:6.2f}x ft"
                      f"  {extra[name]:7.1f} MB")  # fmt: skip
            numbers = {"seconds": over, "extra_mb": extra, "threads": args.threads}
            record("experts", {"setting": setting.name, "dtype": dtype, **numbers})


if __name__ == "__main__":
    main()
