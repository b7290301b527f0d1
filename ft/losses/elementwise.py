"""Elementwise steps of policy losses in forms that processors run in vectors. Shapes: T tokens, N any one dimension.

Measured on one core, a select by a bool mask, a comparison that gives bool, and the gradients of clamp and minimum
take 4 to 50 times as long as a product. Hence: selects that are the gradients of activations, which run in vectors,
comparisons that give 1.0 and 0.0, and a value that brings its own slope. Results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.losses.reduce import upcast


class Mask:
    """A bool mask as numbers. Nothing here has a gradient."""

    def __init__(self, mask_T: Tensor) -> None:
        self.mask_T = mask_T

    @cached_property
    def trained_T(self) -> Tensor:
        """1.0 where True and 0.0 elsewhere, float32. Shared: not to be changed in place."""
        return self.mask_T.view(torch.int8).float()

    def keep(self, x_T: Tensor) -> Tensor:
        """``x_T`` upcast, and 0 where the mask is False, NaN and infinity too, as no product would have it."""
        return where_over(upcast(x_T.detach()), self.trained_T, 0.5)

    def keep_(self, x_T: Tensor) -> Tensor:
        """The same in the place of ``x_T``, float32 or float64."""
        return torch.ops.aten.threshold_backward.grad_input(x_T, self.trained_T, 0.5, grad_input=x_T)


Lay = Callable[[Tensor], Tensor]
"""From slopes by what a few share, to the slope of each."""


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_N: Tensor, value: Tensor, slope_N: Tensor, scale: Tensor | float | None, lay: Lay | None
    ) -> Tensor:
        ctx.save_for_backward(slope_N)
        ctx.scale, ctx.lay = scale, lay
        return value.clone() if value is x_N else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (slope_N,) = ctx.saved_tensors
        slope_N = (grad if ctx.scale is None else grad * ctx.scale) * slope_N
        return slope_N if ctx.lay is None else ctx.lay(slope_N), None, None, None, None


def with_slope(
    x_N: Tensor, value: Tensor, slope_N: Tensor, *, scale: Tensor | float | None = None, lay: Lay | None = None
) -> Tensor:
    """``value``, [N] or a sum 0-d, whose derivative by ``x_N`` is ``slope_N``, times ``scale`` (one number) if given.

    With ``lay``, the derivative is what that makes, linearly, of a slope with fewer places: nothing of x's size is then
    made or kept before the backward. A second derivative is refused.
    """
    return _WithSlope.apply(x_N, value, slope_N, scale, lay)  # type: ignore[return-value]


def greater(x_N: Tensor, y: Tensor | float) -> Tensor:
    """1.0 where x > y, 0.0 elsewhere, in the type of x."""
    return torch.gt(x_N.detach(), y, out=torch.empty_like(x_N, requires_grad=False))


def less(x_N: Tensor, y: float) -> Tensor:
    """1.0 where x < y, 0.0 elsewhere, in the type of x."""
    return torch.lt(x_N.detach(), y, out=torch.empty_like(x_N, requires_grad=False))


def where_over(x_N: Tensor, y_N: Tensor, least: float) -> Tensor:
    """x where y > least, 0 elsewhere, whatever stands there: the gradient of a threshold. No gradient."""
    return torch.ops.aten.threshold_backward(x_N, y_N, least)


def where_within(x_N: Tensor, y_N: Tensor, bound: float) -> Tensor:
    """x where -bound < y < bound, 0 elsewhere: the gradient of a clamp. No gradient."""
    return torch.ops.aten.hardtanh_backward(x_N, y_N, -bound, bound)
