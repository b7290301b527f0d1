"""ft's routed experts behind transformers' experts interface: one function for every stacked experts module.

transformers marks such modules with flags (has_gate, has_bias, is_transposed, ...) and calls the function that the
config names with (module, hidden_TD, index_TK, weight_TK). LoRA of the experts is a submodule, ``ft_lora``, that
holds A (E, r, N) and B (E, M, r) per adapted stack, so that dimension 0 can be sharded as the weights' is.

Shapes: T tokens, K experts per token, E experts, D model width, M and N out- and input width of a stack, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ft.errors import ModelError
from ft.kernels.experts import Factors, Impl, LoRA, Params, Stack, check_impl, experts
from ft.kernels.experts.rows import Gated
from ft.kernels.tiled import tiled
from ft.models.quant import nf4_of, quantised

NAME = "ft"  # what config._experts_implementation says


def use_ft_experts(model: Any, impl: Impl = "auto") -> None:
    """Let every experts module of a transformers model run ft's kernel. Does nothing to a model without experts."""
    modules = expert_modules(model)
    for name, module in modules.items():
        _check(name, module)
        module.ft_impl, module.ft_tile = impl, None
    if not modules:
        return
    check_impl(impl)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    model.set_experts_implementation(NAME)
    deaf = [name for name, module in modules.items() if module.config._experts_implementation != NAME]
    if deaf:
        raise ModelError("transformers does not let this model choose its experts' implementation", where=deaf[0])


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """Stacked experts modules by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "_apply_gate") and hasattr(m, "is_transposed")}


def stack_names(module: Any) -> tuple[str, str]:
    """The names of a module's two stacks, in the order of their definition."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def stack_shape(module: Any, name: str) -> tuple[int, int, int]:
    """(E, M, N) of a stack, whatever its layout and storage: y = x W^T with W (M, N)."""
    held = quantised(module).get(name)
    E, M, N = tuple(held.shape if held else getattr(module, name).shape)
    return (E, N, M) if module.is_transposed else (E, M, N)


class ExpertLoRA(nn.Module):
    """A and B of one experts module, float32: ``<stack>_A`` (E, r, N) and ``<stack>_B`` (E, M, r)."""

    def __init__(self, shapes: dict[str, tuple[int, int, int]], *, r: int, scaling: float, device: torch.device | str):
        super().__init__()
        self.stacks, self.r, self.scaling, self.enabled = tuple(shapes), r, scaling, True
        for name, (E, M, N) in shapes.items():
            self.register_parameter(f"{name}_A", _parameter((E, r, N), device))
            self.register_parameter(f"{name}_B", _parameter((E, M, r), device))

    def factors(self, stack: str) -> Factors | None:
        """What the kernel takes for this stack; None where it is not adapted or adapters are off."""
        if stack not in self.stacks or not self.enabled:
            return None
        return Factors(A_ErN=getattr(self, f"{stack}_A"), B_EMr=getattr(self, f"{stack}_B"), scaling=self.scaling)


def _parameter(shape: tuple[int, ...], device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))


def forward(module: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What transformers calls: out_TD of one experts module, its LoRA included."""
    up, down = stack_names(module)
    act = _activation(module)
    params = Params(up=_stack(module, up), down=_stack(module, down), act=act)
    lora: ExpertLoRA | None = getattr(module, "ft_lora", None)
    factors = LoRA() if lora is None else LoRA(up=lora.factors(up), down=lora.factors(down))
    run = partial(experts, params=params, lora=factors, impl=module.ft_impl)
    if module.ft_tile is None:
        return run(hidden_TD, index_TK, weight_TK)
    return tiled(run, hidden_TD, index_TK, weight_TK, tile=module.ft_tile)


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    """Between up and down: the model's own function, or ours of the same values where that one is a plain gate."""
    if not module.has_gate:
        return module.act_fn  # type: ignore[no-any-return]
    from transformers import activations
    from transformers.integrations import moe

    plain = type(module)._apply_gate is getattr(moe, "_default_apply_gate", None)
    if plain and type(module.act_fn) in (activations.SiLUActivation, nn.SiLU):
        return Gated("silu")
    return Gated("gelu_tanh") if plain and type(module.act_fn) is activations.GELUTanh else module._apply_gate


def _stack(module: Any, name: str) -> Stack:
    return Stack(
        weight=nf4_of(module, name) if name in quantised(module) else getattr(module, name),
        bias_EM=getattr(module, f"{name}_bias") if module.has_bias else None,
        transposed=module.is_transposed,
    )


def _check(name: str, module: Any) -> None:
    for flag in ("has_post_expert_norm", "_is_expert_parallel"):
        if getattr(module, flag, False):
            raise ModelError(f"experts with {flag.strip('_')} are not supported", where=name, got=type(module).__name__)
