"""What both torch engines share: a projection's operands, told apart by what autograd may differentiate.

Shapes as in the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import frozen
from torch import Tensor

from ft.kernels.experts import Factors, Stack
from ft.kernels.nf4 import NF4Tensor

Weights = Tensor | NF4Tensor
Act = Callable[[Tensor], Tensor]
Tensors = Sequence[Tensor | None]  # four: weight, bias_EM, A_ErN, B_EMr
Needs = Sequence[bool]  # which of those want a gradient


@frozen(kw_only=True, eq=False)
class Kind:
    """What autograd need not see of one projection."""

    quantised: NF4Tensor | None  # the weight, where it is NF4
    transposed: bool
    scaling: float


def split(stack: Stack, lora: Factors | None) -> tuple[Kind, Tensors]:
    """A projection as what autograd need not see and the four tensors that it may differentiate."""
    quantised = stack.weight if isinstance(stack.weight, NF4Tensor) else None
    weight = stack.weight if isinstance(stack.weight, Tensor) else None
    kind = Kind(quantised=quantised, transposed=stack.transposed, scaling=lora.scaling if lora else 0.0)
    return kind, (weight, stack.bias_EM, *((lora.A_ErN, lora.B_EMr) if lora else (None, None)))


def weights(kind: Kind, weight: Tensor | None) -> Weights:
    """The stack of a projection, whichever way it is held."""
    found = kind.quantised if weight is None else weight
    assert found is not None
    return found


def width(stack: Stack) -> int:
    """M, the output width of a projection."""
    return stack.weight.shape[2 if stack.transposed else 1]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over experts are made in: float32, or float64 for float64."""
    return torch.promote_types(torch.float32, dtype)
