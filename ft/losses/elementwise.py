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
    """A bool mask in the forms that are asked for. Nothing here has a gradient."""

    def __init__(self, mask_T: Tensor) -> None:
        self.mask_T = mask_T

    @property
    def trained_T(self) -> Tensor:
        """1.0 where True and 0.0 elsewhere, float32."""
        return self.mask_T.view(torch.int8).float()

    def keep(self, x_T: Tensor) -> Tensor:
        """``x_T`` upcast, and 0 where the mask is False, NaN and infinity too, as no product would have it."""
        x_T = upcast(x_T.detach())
        return torch.bitwise_and(_bits(x_T), self._all_or_none_T).view(x_T.dtype)

    def keep_(self, x_T: Tensor) -> Tensor:
        """The same in the place of ``x_T``, float32 or float64."""
        _bits(x_T).bitwise_and_(self._all_or_none_T)
        return x_T

    @cached_property
    def _all_or_none_T(self) -> Tensor:
        """-1, all of whose bits are set however wide it is made, or 0."""
        return self.mask_T.view(torch.int8).neg()


def _bits(x_T: Tensor) -> Tensor:
    return x_T.view(torch.int64 if x_T.dtype == torch.float64 else torch.int32)


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, value: Tensor, slope_N: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope_N, scale)
        return value.clone() if value is x_N else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        slope_N, scale = ctx.saved_tensors
        return (grad if scale is None else grad * scale) * slope_N, None, None, None


def with_slope(x_N: Tensor, value: Tensor, slope_N: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """``value``, [N] or a sum 0-d, whose derivative by ``x_N`` is ``slope_N``, times ``scale`` (0-d) where given.

    A second derivative is refused.
    """
    return _WithSlope.apply(x_N, value, slope_N, scale)  # type: ignore[return-value]


def greater(x_N: Tensor, y: float) -> Tensor:
    """1.0 where x > y, 0.0 elsewhere, in the type of x."""
    return torch.gt(x_N.detach(), y, out=torch.empty_like(x_N, requires_grad=False))


def less(x_N: Tensor, y: float) -> Tensor:
    """1.0 where x < y, 0.0 elsewhere, in the type of x."""
    return torch.lt(x_N.detach(), y, out=torch.empty_like(x_N, requires_grad=False))
