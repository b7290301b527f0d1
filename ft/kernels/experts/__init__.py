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
from ft.kernels import launch
from ft.kernels.launch import Impl

if TYPE_CHECKING:
    from ft.kernels.nf4 import NF4Tensor


@frozen(kw_only=True, eq=False)
class Stack:
    """One projection of every expert.

    ``weight`` is (E, M, N), or (E, N, M) where ``transposed``; a float tensor of any strides, or NF4 of that shape.
    """

    weight: Tensor | NF4Tensor
    bias_EM: Tensor | None = None
    transposed: bool = False


@frozen(kw_only=True, eq=False)
class Params:
    """The stacks of an experts module and the function between them: ``act(h_RM) -> a_RI``, row by row.

    The families' layouts: [gate; up] halves with SiLU or GELU (M = 2I); gpt_oss, transposed, with biases, gate and up
    interleaved and clamped; nemotron_h without a gate (M = I). D is the latent width where the model has one.
    ``ft.kernels.experts.rows.Gated`` is an ``act`` whose derivative need not be found by autograd.
    """

    up: Stack
    down: Stack
    act: Callable[[Tensor], Tensor]


@frozen(kw_only=True, eq=False)
class Factors:
    """LoRA of one stack: expert e's update is ``scaling * B_e A_e``, never formed.

    Any float type (float32 masters are converted to the products' type); any rank. Not transposed where the stack is.
    """

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
    keep: bool = False,
) -> Tensor:
    """The experts' weighted sum, out_TD, in ``hidden_TD``'s dtype.

    Args:
        hidden_TD: any float type; computed in the weights' dtype (in its own where they are NF4).
        index_TK: int64, every entry in 0 .. E-1. On a CPU others are refused; elsewhere looking would wait for it.
        weight_TK: routing weights, applied in float32.
        impl: "torch" runs anywhere; "triton" wants a GPU (or Triton's interpreter); "auto" is Triton on a GPU for
            floats of 16 and 32 bits, and torch elsewhere.
        keep: hold NF4 weights dequantised from forward to backward, instead of dequantising again. Torch only, since
            the Triton products never make them.

    Gradients reach hidden_TD, weight_TK, LoRA's factors, and weights and biases that require them. Frozen weights get
    none. Once differentiable.

    Raises:
        ModelError: shapes or types that do not belong together, or an index that is out of range.
        RecipeError: Triton asked for where it cannot run.
    """
    from ft.kernels.experts.check import check

    check(hidden_TD, index_TK, weight_TK, params, lora or LoRA())
    if choose(impl, hidden_TD, params, keep=keep) == "triton":
        from ft.kernels.experts import triton

        return triton.experts(hidden_TD, index_TK, weight_TK, params, lora)
    from ft.kernels.experts import torch as torch_impl

    return torch_impl.experts(hidden_TD, index_TK, weight_TK, params, lora or LoRA(), keep=keep)


def choose(impl: Impl, hidden_TD: Tensor, params: Params, *, keep: bool = False) -> Literal["torch", "triton"]:
    """The implementation that ``experts`` takes.

    Raises:
        RecipeError: Triton asked for where it cannot run.
    """
    if keep and impl == "triton":
        raise RecipeError(
            "the Triton experts have no dequantised weights to keep", where="keep", fix="leave out keep, or use torch"
        )
    if impl == "auto" and (keep or max(hidden_TD.dtype.itemsize, params.up.weight.dtype.itemsize) > 4):
        return "torch"
    return launch.check(impl, hidden_TD)


def check_impl(impl: Impl) -> None:
    """Raises: RecipeError, where the implementation asked for cannot exist on this machine."""
    launch.check(impl)


__all__ = ["Factors", "Impl", "LoRA", "Params", "Stack", "check_impl", "choose", "experts"]
