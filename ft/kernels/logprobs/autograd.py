"""token_logps as an operation that autograd knows, whoever does the passes over the vocabulary.

Shapes: N positions, V vocabulary, D model width, r LoRA rank; R positions of a block and C tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from ft.kernels.logprobs.passes import Forward, Grads, Scores
from ft.kernels.logprobs.tiles import Head, Options


@frozen
class Passes:
    """An implementation: ``forward(hidden_ND, head, target_N, options, jacobian=)`` and ``backward(scores, hidden_ND,
    head, target_N, options, needs)``."""

    forward: Callable[..., Forward]
    backward: Callable[..., Grads]


def _no_autocast(device: torch.device) -> torch.autocast:
    """Types are chosen here, whatever surrounds the call."""
    return torch.autocast(device.type, enabled=False)


class _Frozen(torch.autograd.Function):
    """Only ``hidden`` needs a gradient: its Jacobian is formed in forward, and backward scales its rows."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head: Head, target_N: Tensor, options: Options, passes: Passes) -> Any:
        out = passes.forward(hidden_ND, head, target_N, options, jacobian=True)
        ctx.save_for_backward(out.jacobian_ND)
        ctx.dtype = hidden_ND.dtype
        if out.entropy_N is not None:
            ctx.mark_non_differentiable(out.entropy_N)
        return out.logp_N, out.entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> Any:  # type: ignore[override]
        (jacobian_ND,) = ctx.saved_tensors
        return (grad_N[:, None] * jacobian_ND).to(ctx.dtype), None, None, None, None


class _Trained(torch.autograd.Function):
    """The head, its bias or its LoRA is trained: backward goes over the vocabulary again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        A_rD: Tensor | None,
        B_Vr: Tensor | None,
        s: float,
        target_N: Tensor,
        options: Options,
        passes: Passes,
    ) -> Any:
        head = Head(weight_VD=weight_VD, bias_V=bias_V, A_rD=A_rD, B_Vr=B_Vr, s=s)
        out = passes.forward(hidden_ND, head, target_N, options, jacobian=False)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, A_rD, B_Vr, target_N, out.logp_N, out.lse_N)
        ctx.s, ctx.options, ctx.passes = s, options, passes
        if out.entropy_N is not None:
            ctx.mark_non_differentiable(out.entropy_N)
        return out.logp_N, out.entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> Any:  # type: ignore[override]
        hidden_ND, weight_VD, bias_V, A_rD, B_Vr, target_N, logp_N, lse_N = ctx.saved_tensors
        head = Head(weight_VD=weight_VD, bias_V=bias_V, A_rD=A_rD, B_Vr=B_Vr, s=ctx.s)
        scores = Scores(grad_N=grad_N * ctx.options.slope, logp_N=logp_N, lse_N=lse_N)
        with _no_autocast(hidden_ND.device):
            grads = ctx.passes.backward(scores, hidden_ND, head, target_N, ctx.options, ctx.needs_input_grad[:5])
        return *grads, None, None, None, None


def token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    A_rD: Tensor | None,
    B_Vr: Tensor | None,
    s: float,
    options: Options,
    passes: Passes,
) -> tuple[Tensor, Tensor | None]:
    """See ``ft.kernels.logprobs.token_logps``; which pass goes first follows from what needs a gradient."""
    trained = any(t is not None and t.requires_grad for t in (weight_VD, bias_V, A_rD, B_Vr))
    with _no_autocast(hidden_ND.device):
        if torch.is_grad_enabled() and trained:
            return _Trained.apply(hidden_ND, weight_VD, bias_V, A_rD, B_Vr, s, target_N, options, passes)  # type: ignore
        head = Head(weight_VD=weight_VD, bias_V=bias_V, A_rD=A_rD, B_Vr=B_Vr, s=s)
        if torch.is_grad_enabled() and hidden_ND.requires_grad:
            return _Frozen.apply(hidden_ND, head, target_N, options, passes)  # type: ignore
        with torch.no_grad():
            out = passes.forward(hidden_ND, head, target_N, options, jacobian=False)
        return out.logp_N, out.entropy_N
