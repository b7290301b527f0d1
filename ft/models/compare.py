"""A number made of two models' logits, which never exist for more than a tile of positions.

It is computed inside the policy's forward, where FSDP holds its head whole. Shapes: N trained positions, V vocabulary,
D width of the policy, E width of the other model, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2**24  # entries of either model's logits at a time

Term = Callable[[Tensor, Tensor], Tensor]  # (own_NV, other_NV) -> their sum over N, 0-d


@frozen(kw_only=True, eq=False)
class Head:
    """An output layer: logits are softcap * tanh(x / softcap), x = scale * (hidden @ (W + s B A).T + bias)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None  # A [r, D], B [V, r], s
    scale: float = 1.0
    softcap: float | None = None


def logits(hidden_ND: Tensor, head: Head) -> Tensor:
    """logits_NV, float32 at least; products take the wider of the two types."""
    dtype = torch.promote_types(hidden_ND.dtype, head.weight_VD.dtype)
    hidden_ND = hidden_ND.to(dtype)
    z_NV = hidden_ND @ head.weight_VD.to(dtype).mT
    if head.lora is not None:
        A_rD, B_Vr, s = head.lora
        z_NV = z_NV + s * (hidden_ND @ A_rD.to(dtype).mT) @ B_Vr.to(dtype).mT
    if head.bias_V is not None:
        z_NV = z_NV + head.bias_V
    z_NV = z_NV.to(torch.promote_types(dtype, torch.float32)) * head.scale
    return z_NV if head.softcap is None else head.softcap * torch.tanh(z_NV / head.softcap)


def compared(term: Term, hidden_ND: Tensor, own: Head, other_NE: Tensor, other: Head, *, tile: int = TILE) -> Tensor:
    """``term(logits(hidden_ND, own), logits(other_NE, other))``, a sum over positions, made tile by tile.

    Differentiable by ``hidden_ND`` and the tensors of ``own``, once: the gradient is made together with the value, and
    is all that is kept for backward. Where one head is longer (rows that pad the vocabulary), both are cut to the
    shorter. N = 0 gives 0, with a graph.
    """
    V = min(len(own.weight_VD), len(other.weight_VD))
    A_rD, B_Vr, _ = own.lora or (None, None, 1.0)
    trained = (hidden_ND, own.weight_VD, own.bias_V, A_rD, B_Vr)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in trained)
    plan = _Plan(term=term, own=own, other_NE=other_NE.detach(), other=_cut(other, V), V=V, tile=tile, wanted=wanted)
    return _Tiled.apply(plan, *trained)


@frozen(kw_only=True, eq=False)
class _Plan:
    term: Term
    own: Head  # its options alone are read: its tensors come as arguments
    other_NE: Tensor
    other: Head
    V: int
    tile: int
    wanted: tuple[bool, ...]

    def value(self, hidden_ND: Tensor, at: slice, leaves: list[Tensor | None]) -> Tensor:
        weight_VD, bias_V, A_rD, B_Vr = leaves
        assert weight_VD is not None
        lora = None if A_rD is None or B_Vr is None or self.own.lora is None else (A_rD, B_Vr, self.own.lora[2])
        own = _cut(evolve(self.own, weight_VD=weight_VD, bias_V=bias_V, lora=lora), self.V)
        with torch.no_grad():
            other_NV = logits(self.other_NE[at], self.other)
        return self.term(logits(hidden_ND, own), other_NV)


def _cut(head: Head, V: int) -> Head:
    if len(head.weight_VD) == V:
        return head
    bias_V = None if head.bias_V is None else head.bias_V[:V]
    lora = None if head.lora is None else (head.lora[0], head.lora[1][:V], head.lora[2])
    return evolve(head, weight_VD=head.weight_VD[:V], bias_V=bias_V, lora=lora)


class _Tiled(torch.autograd.Function):
    """Value and gradient of each tile at once; gradients of the head are summed in float32."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden_ND: Tensor, *head: Tensor | None) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        total = hidden_ND.new_zeros((), dtype=wide)
        leaves = [
            None if t is None else t.detach().requires_grad_(w) for t, w in zip(head, plan.wanted[1:], strict=True)
        ]
        grad_ND = torch.zeros_like(hidden_ND) if plan.wanted[0] else None
        sums = [torch.zeros_like(t, dtype=wide) if t is not None and t.requires_grad else None for t in leaves]
        rows = max(1, plan.tile // plan.V)
        for start in range(0, len(hidden_ND), rows):
            at = slice(start, start + rows)
            part_ND = hidden_ND[at].detach().requires_grad_(plan.wanted[0])
            with torch.set_grad_enabled(any(plan.wanted)):
                value = plan.value(part_ND, at, leaves)
            total += value.detach()
            asked = [t for t in (part_ND, *leaves) if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(value, asked) if asked else ())
            if grad_ND is not None:
                grad_ND[at] = next(found)
            for total_grad in sums:
                if total_grad is not None:
                    total_grad += next(found)
        ctx.save_for_backward(
            grad_ND, *(s if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, leaves, strict=True))
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        by = grads[0]  # of a wide type: 1 / tokens must not be rounded to 16 bits
        return None, *(None if t is None else (t.to(by.dtype) * by).to(t.dtype) for t in ctx.saved_tensors)
