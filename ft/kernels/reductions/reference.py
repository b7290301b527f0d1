"""The reductions in plain torch: few operations over contiguous memory, no loop over sequences or prompts.

Shapes: T packed tokens, S sequences, P prompts (any number of leading dimensions), G samples of one prompt, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

BOUND = 20.0  # log-ratios are held to +-BOUND, as in ft.losses


@frozen(kw_only=True, eq=False)
class PolicySums:
    """Sums over trained tokens, all 0-d float32; only ``loss`` has a gradient. The greatest of no token is 0."""

    loss: Tensor
    tokens: Tensor
    ratio: Tensor
    approx_kl: Tensor  # k3 of the policy against the old one: r - 1 - d
    clip_low: Tensor  # tokens with A < 0 and r under the range
    clip_high: Tensor  # A > 0 and r over it
    clip_dual: Tensor  # A < 0 and r over dual_clip
    ratio_max: Tensor
    ratio_inverse_max: Tensor  # the least ratio is 1 over it


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- sums over sequences --------------------------------------------------------------------------------------------


def offsets(seq_T: Tensor, S: int) -> Tensor:
    """Where each sequence starts, and where the last one ends: (S + 1,). Nothing waits for the device."""
    return torch.searchsorted(seq_T, torch.arange(S + 1, device=seq_T.device, dtype=seq_T.dtype))


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T: Tensor, seq_T: Tensor, S: int) -> Tensor:
        ctx.save_for_backward(seq_T)
        ctx.dtype = x_T.dtype
        return torch.segment_reduce(wide(x_T).contiguous(), "sum", offsets=offsets(seq_T, S), axis=0, unsafe=True)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> Any:  # type: ignore[override]
        return spread(grad_S, ctx.saved_tensors[0]).to(ctx.dtype), None, None


def spread(grad_S: Tensor, seq_T: Tensor) -> Tensor:
    """Each token gets its sequence's gradient; filler gets 0."""
    return torch.cat([grad_S, grad_S.new_zeros(1, *grad_S.shape[1:])]).index_select(0, seq_T)


def segment_sum(x_T: Tensor, seq_T: Tensor, S: int) -> Tensor:
    if not S:
        return wide(x_T[:0])
    return _SegmentSum.apply(x_T, seq_T, S)  # type: ignore[return-value]


# ---- policy gradient ------------------------------------------------------------------------------------------------


class _WithSlope(torch.autograd.Function):
    """A sum that is known, and its gradient too."""

    @staticmethod
    def forward(ctx: Any, logp_T: Tensor, total: Tensor, slope_T: Tensor) -> Tensor:
        ctx.save_for_backward(slope_T)
        ctx.dtype = logp_T.dtype
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None, None


def with_slope(logp_T: Tensor, total: Tensor, slope_T: Tensor) -> Tensor:
    return _WithSlope.apply(logp_T, total, slope_T)  # type: ignore[return-value]


def policy_gradient_sums(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor,
    mask_T: Tensor,
    weight_T: Tensor | None,
    limits: tuple[float, float, float],
) -> PolicySums:
    """``limits``: the range of r, and the most that it counts where A < 0."""
    sums, slope_T = _policy_gradient(logp_T, old_logp_T, adv_T, mask_T, weight_T, limits)
    return attrs.evolve(sums, loss=with_slope(logp_T, sums.loss, slope_T))


@torch.no_grad()
def _policy_gradient(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor,
    mask_T: Tensor,
    weight_T: Tensor | None,
    limits: tuple[float, float, float],
) -> tuple[PolicySums, Tensor]:
    low, high, dual = limits
    raw_T, adv_T, *weight = _kept(
        mask_T, wide(logp_T) - wide(old_logp_T), adv_T, *([] if weight_T is None else [weight_T])
    )
    drift_T, weighted_T = raw_T.clamp(-BOUND, BOUND), adv_T * weight[0] if weight else adv_T
    ratio_T, trained_T = drift_T.exp(), mask_T.to(drift_T.dtype)
    # 1.0 or 0.0: selecting by bool takes a processor ten times as long as a product.
    negative_T, positive_T = _compared(torch.lt, adv_T, 0.0), _compared(torch.gt, adv_T, 0.0)
    below_T = _compared(torch.lt, ratio_T, low).mul_(negative_T)
    above_T = _compared(torch.gt, ratio_T, high).mul_(positive_T)
    beyond_T = _compared(torch.gt, ratio_T, dual).mul_(negative_T)
    free_T = ratio_T * (1 - below_T - above_T - beyond_T)
    counted_T = free_T + low * below_T
    for limit, hit_T in ((high, above_T), (dual, beyond_T)):
        if limit < math.inf:
            counted_T.add_(hit_T, alpha=limit)
    sums = PolicySums(
        loss=-torch.dot(weighted_T, counted_T),
        tokens=trained_T.sum(),
        ratio=torch.dot(ratio_T, trained_T),
        approx_kl=(drift_T.double().expm1() - drift_T).sum().to(drift_T.dtype),  # near 0 float32 keeps no digit
        clip_low=below_T.sum(),
        clip_high=above_T.sum(),
        clip_dual=beyond_T.sum(),
        ratio_max=_greatest(ratio_T * trained_T),
        ratio_inverse_max=_greatest((-drift_T).exp() * trained_T),
    )
    return sums, -weighted_T * free_T * _compared(torch.le, raw_T.abs(), BOUND)


def _kept(mask_T: Tensor, *xs: Tensor) -> list[Tensor]:
    """Each upcast, and 0 where the mask is False, whatever stands there: all bits of a number, or none."""
    ints = {torch.float32: torch.int32, torch.float64: torch.int64}
    found = [wide(x).contiguous() for x in xs]
    bits = {ints[x.dtype]: mask_T.to(ints[x.dtype]).neg() for x in found}
    return [(x.view(ints[x.dtype]) & bits[ints[x.dtype]]).view(x.dtype) for x in found]


def _compared(by: Callable[..., Tensor], x_T: Tensor, y: float) -> Tensor:
    return by(x_T, y, out=torch.empty_like(x_T))


def _greatest(x_T: Tensor) -> Tensor:
    return x_T.amax() if x_T.numel() else x_T.new_zeros(())


# ---- similarity -----------------------------------------------------------------------------------------------------


Products = tuple[Tensor, Tensor, Tensor, Tensor]
"""Per sample: phi . ref, |phi|^2, sum over the other samples of phi . phi_k, |ref|^2."""


def similarity(gen_PGD: Tensor, ref_PD: Tensor, valid_PG: Tensor | None) -> tuple[Tensor, Tensor]:
    return from_products(_products(gen_PGD, ref_PD, valid_PG), valid_PG)


def _products(gen_PGD: Tensor, ref_PD: Tensor, valid_PG: Tensor | None) -> Products:
    gen_PGD, ref_PGD = wide(gen_PGD), wide(ref_PD if ref_PD.ndim == gen_PGD.ndim else ref_PD[..., None, :])
    if valid_PG is not None:
        gen_PGD = torch.where(valid_PG[..., None], gen_PGD, 0.0)
        ref_PGD = torch.where(valid_PG[..., None], ref_PGD, 0.0)
    cross_PG = (gen_PGD * ref_PGD).sum(-1)
    others_PGD = gen_PGD.sum(-2, keepdim=True) - gen_PGD
    return cross_PG, gen_PGD.square().sum(-1), (gen_PGD * others_PGD).sum(-1), ref_PGD.square().sum(-1)


def from_products(products: Products, valid_PG: Tensor | None) -> tuple[Tensor, Tensor]:
    """(alignment_PG, diversity_PG)"""
    cross_PG, square_PG, others_PG, ref_square_PG = products
    real_PG = (square_PG > 0) & (ref_square_PG > 0)
    lengths_PG = torch.where(real_PG, square_PG, 1.0).sqrt() * torch.where(real_PG, ref_square_PG, 1.0).sqrt()
    alignment_PG = 2 * torch.where(real_PG, cross_PG, 0.0) / lengths_PG
    if valid_PG is None:
        return alignment_PG, others_PG * (2 / max(square_PG.shape[-1] - 1, 1))
    return alignment_PG, 2 * others_PG / (valid_PG.sum(-1, keepdim=True) - 1).clamp(min=1)
