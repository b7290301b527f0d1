"""What routed experts refuse, in words: shapes and types that do not belong together. Reads no tensor's values.

Shapes as in the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.experts import Factors, LoRA, Params, Stack


def check(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, params: Params, lora: LoRA) -> None:
    """Raises: ModelError, naming the argument that does not fit the others."""
    _expect(hidden_TD.ndim == 2 and hidden_TD.is_floating_point(), "hidden_TD", "(T, D) floats", hidden_TD)
    T, D = hidden_TD.shape
    _expect(index_TK.ndim == 2 and len(index_TK) == T, "index_TK", f"({T}, K)", index_TK)
    _expect(index_TK.dtype == torch.int64, "index_TK", "int64", index_TK)
    _expect(weight_TK.shape == index_TK.shape, "weight_TK", f"{tuple(index_TK.shape)}", weight_TK)
    _expect(weight_TK.is_floating_point(), "weight_TK", "floats", weight_TK)
    E = params.up.weight.shape[0]
    _check_stack("up", params.up, lora.up, E, D)
    _check_stack("down", params.down, lora.down, E, None)
    if params.up.weight.dtype != params.down.weight.dtype:
        raise ModelError("the stacks of experts differ in type", got=f"{params.up.weight.dtype}, "
                         f"{params.down.weight.dtype}", where="params")  # fmt: skip


def _check_stack(name: str, stack: Stack, lora: Factors | None, E: int, N: int | None) -> None:
    shape = tuple(stack.weight.shape)
    axes = "(E, N, M)" if stack.transposed else "(E, M, N)"
    if len(shape) != 3 or shape[0] != E or (N is not None and shape[1 if stack.transposed else 2] != N):
        wanted = f"{axes} with E = {E}" + (f", N = {N}" if N is not None else "")
        raise ModelError("a stack of experts has the wrong shape", where=name, expected=wanted, got=f"{shape}")
    _, M, N = shape if not stack.transposed else (E, shape[2], shape[1])
    if stack.bias_EM is not None:
        _expect(tuple(stack.bias_EM.shape) == (E, M), f"{name}.bias_EM", f"({E}, {M})", stack.bias_EM)
    if lora is not None:
        r = lora.A_ErN.shape[1] if lora.A_ErN.ndim == 3 else 0
        _expect(tuple(lora.A_ErN.shape) == (E, r, N) and r > 0, f"lora.{name}.A_ErN", f"({E}, r, {N})", lora.A_ErN)
        _expect(tuple(lora.B_EMr.shape) == (E, M, r), f"lora.{name}.B_EMr", f"({E}, {M}, {r})", lora.B_EMr)


def _expect(holds: bool, where: str, expected: str, got: Tensor) -> None:
    if not holds:
        found = f"{tuple(got.shape)} of {got.dtype}"
        raise ModelError("an argument of the routed experts does not fit", where=where, expected=expected, got=found)
