"""A linear layer on a frozen NF4 weight, which is dense only while it is multiplied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.launch import Impl, check
from ft.kernels.nf4.format import NF4Tensor
from ft.kernels.nf4.ops import dequantise


def linear(x: Tensor, q: NF4Tensor, bias: Tensor | None = None, *, keep: bool = False, impl: Impl = "auto") -> Tensor:
    """``x @ dequantise(q).T + bias`` in x's type (autocast's, where it is on), with gradients to ``x`` and ``bias``.

    The dense weight is made in forward and again in backward; ``keep`` holds it in between, which saves the second
    time at 4 times the memory of the quantised weight (in 16 bits). By Triton, an input of few rows meets the 4-bit
    weight directly.

    Raises:
        ModelError: the weight is not a matrix, or does not fit the input.
        RecipeError: an ``impl`` that cannot run here.
    """
    if len(q.shape) != 2 or x.shape[-1] != q.shape[1]:
        raise ModelError(
            "a quantised weight does not fit its input",
            expected=f"(..., {x.shape[-1]}) times a weight of (any, {x.shape[-1]})",
            got=f"a weight of {q.shape}",
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    impl = "triton" if check(impl, x, q.packed) == "triton" else impl  # "auto" stays, and may dequantise in C
    return _Linear.apply(x, bias, q, keep, impl)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """Saves the quantised weight, or the dense one where ``keep``; neither gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, q: NF4Tensor, keep: bool, impl: Impl) -> Tensor:
        ctx.impl, ctx.rest = impl, {"shape": q.shape, "dtype": q.dtype, "block": q.block}
        keep = keep and ctx.needs_input_grad[0]
        if not keep:
            ctx.save_for_backward(q.packed, q.absmax, q.absmax2, q.offset)
            if _direct(x, q, impl):
                from ft.kernels.nf4 import triton

                return triton.forward(x, q, bias)
        w = dequantise(q, x.dtype, impl=impl)
        if keep:
            ctx.save_for_backward(w)
        return F.linear(x, w, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = _grad_x(ctx, grad_y) if ctx.needs_input_grad[0] else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, None


def _grad_x(ctx: Any, grad_y: Tensor) -> Tensor:
    saved = ctx.saved_tensors  # asked once: activation checkpointing unpacks at the first look
    if len(saved) == 1:
        return grad_y @ saved[0]
    packed, absmax, absmax2, offset = saved
    q = NF4Tensor(packed=packed, absmax=absmax, absmax2=absmax2, offset=offset, **ctx.rest)
    if _direct(grad_y, q, ctx.impl):
        from ft.kernels.nf4 import triton

        return triton.backward(grad_y, q)
    return grad_y @ dequantise(q, grad_y.dtype, impl=ctx.impl)


def _direct(x: Tensor, q: NF4Tensor, impl: Impl) -> bool:
    """Whether Triton multiplies by the 4-bit weight as it is."""
    if impl != "triton":
        return False
    from ft.kernels.nf4 import triton

    return triton.products(x, q)
