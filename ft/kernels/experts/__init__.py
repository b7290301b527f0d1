"""Routed experts: y_t = sum_k w_tk * down_e(act(up_e(x_t))), e = index_tk, over stacks of expert matrices.

Each projection is x W_e^T + b_e + s (x A_e^T) B_e^T, the last term where LoRA adapts it. ``up`` holds gate and up
together where the experts are gated; ``act`` splits them, so that every layout of halves (concatenated, interleaved,
clamped, no gate at all) is the model's own function.

Shapes: T tokens, K experts per token, R routed rows (T*K, sorted by expert), E experts, D width of the experts' input
and output, I expert width, N and M in- and output width of one projection, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from attrs import frozen
from torch import Tensor

from ft.errors import RecipeError

if TYPE_CHECKING:
    from ft.kernels.nf4 import NF4Tensor

Impl = Literal["auto", "torch", "triton"]


@frozen(kw_only=True, eq=False)
class Stack:
    """One projection of every expert. ``weight`` is (E, M, N), or (E, N, M) where ``transposed``."""

    weight: Tensor | NF4Tensor
    bias_EM: Tensor | None = None
    transposed: bool = False


@frozen(kw_only=True, eq=False)
class Params:
    """The stacks of an experts module and the function between them: ``act(h_RM) -> a_RI``, row by row."""

    up: Stack
    down: Stack
    act: Callable[[Tensor], Tensor]


@frozen(kw_only=True, eq=False)
class Factors:
    """LoRA of one stack: expert e's update is ``scaling * B_e A_e``, never formed."""

    A_ErN: Tensor
    B_EMr: Tensor
    scaling: float


@frozen(kw_only=True, eq=False)
class LoRA:
    """LoRA of an experts module; None where a stack is not adapted."""

    up: Factors | None = None
    down: Factors | None = None


def experts(
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    params: Params,
    lora: LoRA | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """The experts' weighted sum, out_TD, in ``hidden_TD``'s dtype.

    Args:
        hidden_TD: any float type; computed in the weights' dtype (in its own where they are NF4).
        index_TK: int64, every entry in 0 .. E-1.
        weight_TK: routing weights, applied in float32.
        impl: "torch" (grouped products) is what there is; "auto" takes it.

    Gradients reach hidden_TD, weight_TK, LoRA's factors, and weights and biases that require them. Frozen weights get
    none, and NF4 ones are dequantised again in backward instead of kept. Once differentiable.
    """
    check_impl(impl)
    from ft.kernels.experts import torch as torch_impl

    return torch_impl.experts(hidden_TD, index_TK, weight_TK, params, lora or LoRA())


def check_impl(impl: Impl) -> None:
    """Raises: RecipeError, where the implementation asked for does not exist."""
    if impl == "triton":
        raise RecipeError(
            "routed experts have no Triton kernel", where="model.kernels", got="triton", fix="use auto or torch"
        )


__all__ = ["Factors", "Impl", "LoRA", "Params", "Stack", "check_impl", "experts"]
