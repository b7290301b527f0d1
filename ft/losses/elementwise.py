"""Elementwise steps of policy losses in forms that processors run in vectors. Shapes: T tokens, N any one dimension.

Measured on one core, a select by a bool mask, a comparison that gives bool, and the gradients of clamp and minimum
take 5 to 50 times as long as a product. Hence: masks as bits, comparisons that give 1.0 and 0.0, and a value that
brings its own slope. Results are the same.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.losses.reduce import upcast


class Mask:
    """A bool mask in the forms that are asked for, each made once."""

    def __init__(self, mask_T: Tensor) -> None:
        self.mask_T = mask_T

    @cached_property
    def trained_T(self) -> Tensor:
        """1.0 where True and 0.0 elsewhere, float32."""
        return self.mask_T.float()

    def keep(self, x_N: Tensor) -> Tensor:
        """As ``ft.losses.reduce.keep``: upcast, and 0 with a gradient of 0 where the mask is False."""
        x_N = upcast(x_N)
        bits_N = self._bits64_T if x_N.dtype == torch.float64 else self._bits32_T
        return _And.apply(x_N, bits_N) if x_N.requires_grad else _and(x_N, bits_N)  # type: ignore[return-value]

    @cached_property
    def _bits32_T(self) -> Tensor:
        return self.mask_T.to(torch.int32).neg()

    @cached_property
    def _bits64_T(self) -> Tensor:
        return self.mask_T.to(torch.int64).neg()


def _and(x_N: Tensor, bits_N: Tensor) -> Tensor:
    return (x_N.view(bits_N.dtype) & bits_N).view(x_N.dtype)


class _And(torch.autograd.Function):
    """All bits of a number, or none, which is 0.0: NaN and infinity go too, as no product would have it."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, bits_N: Tensor) -> Tensor:
        ctx.save_for_backward(bits_N)
        return _and(x_N, bits_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _And.apply(grad_N, *ctx.saved_tensors), None  # type: ignore[return-value]


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, value_N: Tensor, slope_N: Tensor) -> Tensor:
        ctx.save_for_backward(slope_N)
        return value_N.clone() if value_N is x_N else value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_N * ctx.saved_tensors[0], None, None


def with_slope(x_N: Tensor, value_N: Tensor, slope_N: Tensor) -> Tensor:
    """``value_N``, whose derivative by ``x_N`` is ``slope_N``, elementwise. A second derivative is refused."""
    return _WithSlope.apply(x_N, value_N, slope_N)  # type: ignore[return-value]


def bounded(x_N: Tensor, bound: float) -> Tensor:
    """``x_N`` held to +-bound, with a gradient of 1 within and 0 at the bound and outside.

    As clamp, but for the gradient at the bound itself; clamp's backward takes twenty times as long.
    """
    return torch.nn.functional.hardtanh(x_N, -bound, bound)


def greater(x_N: Tensor, y: float) -> Tensor:
    """1.0 where x > y, 0.0 elsewhere, in the type of x."""
    return torch.gt(x_N.detach(), y, out=torch.empty_like(x_N, requires_grad=False))


def less(x_N: Tensor, y: float) -> Tensor:
    """1.0 where x < y, 0.0 elsewhere, in the type of x."""
    return torch.lt(x_N.detach(), y, out=torch.empty_like(x_N, requires_grad=False))
