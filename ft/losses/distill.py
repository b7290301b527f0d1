"""Distillation: divergences between a student's and a teacher's next-token distributions.

Shapes: N trained positions, V vocabulary, K kept entries of a vocabulary, T packed tokens, D student width, E teacher
width. The student is differentiated, the teacher never. Sums are float32 (float64 stays), whatever the inputs.

With s and t the two distributions, m = (1 - beta) s + beta t, the generalised Jensen-Shannon divergence is

    beta KL(t | m) + (1 - beta) KL(s | m)     0 < beta < 1
    KL(t | s)                                 beta = 0, forward KL: covers the teacher's modes
    KL(s | t)                                 beta = 1, reverse KL: settles on one of them

Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD, arXiv 2306.13649). The two ends are KL itself,
as there, and not the limits of the first line, which are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, log1p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.losses.reduce import Count, check_number, check_same, detached, keep, share, upcast
from ft.types import LossOutput

TILE = 2**24  # entries of the logits worked on in float32 at a time: 64 MiB


def generalized_jsd(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    tokens: Count | None = None,
    tile: int = TILE,
) -> LossOutput:
    """Mean over positions of the generalised JSD between ``softmax(student / temperature)`` and the teacher's.

    Args:
        student_NV, teacher_NV: logits or log-probs (the same here) over one vocabulary, any float types. An entry of
            -inf has probability 0 and adds nothing where its partner is 0 as well.
        mask_N: bool, True where the position is trained; all by default. Other rows may hold anything.
        tokens: the denominator, by default the positions of this call.
        tile: entries in float32 at a time. It changes memory alone: the gradient is made together with the value, tile
            by tile and in the student's type, and is all that is kept. There is no second derivative.

    There is no factor temperature^2: multiply the loss if it is meant. An all-masked call is 0 with zero gradients.
    """
    mask_N = _check_rows("generalized_jsd", student_NV, teacher_NV, mask_N)
    _check_options("generalized_jsd", beta, temperature, tile)
    return _mean(_JSD.apply(student_NV, teacher_NV.detach(), mask_N, beta, temperature, tile), mask_N, tokens)


def linear_jsd(
    student_ND: Tensor,
    head_VD: Tensor,
    teacher_NE: Tensor,
    teacher_head_VE: Tensor,
    mask_N: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    tokens: Count | None = None,
    tile: int = TILE,
) -> LossOutput:
    """``generalized_jsd`` of logits student_ND @ head_VD.T and teacher_NE @ teacher_head_VE.T that never exist at
    once: both are made for ``tile // V`` positions at a time, and their gradient is carried on to ``student_ND`` and
    ``head_VD`` (where these want one) at once. The two widths may differ, the vocabularies may not.
    """
    _check_options("linear_jsd", beta, temperature, tile)
    shapes = [tuple(x.shape) for x in (student_ND, head_VD, teacher_NE, teacher_head_VE)]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1] or shapes[2][1] != shapes[3][1]:
        raise ValueError(f"linear_jsd: expected [N, D], [V, D], [N, E], [V, E], got {shapes}")
    if shapes[0][0] != shapes[2][0] or shapes[1][0] != shapes[3][0]:
        raise ValueError(f"linear_jsd: expected the same positions and one vocabulary, got {shapes}")
    mask_N = _check_mask("linear_jsd", mask_N, student_ND)
    total = _LinearJSD.apply(
        student_ND, head_VD, teacher_NE.detach(), teacher_head_VE.detach(), mask_N, beta, temperature, tile
    )
    return _mean(total, mask_N, tokens)


def topk_jsd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    mask_N: Tensor | None = None,
    *,
    beta: float = 0.0,
    tail: bool = True,
    tokens: Count | None = None,
) -> LossOutput:
    """Generalised JSD where only K entries of the teacher's distribution are known, as with stored log-probs.

    Args:
        student_NK, teacher_NK: log-probs, normalised over the whole vocabulary, of the same K entries.
        tail: put all other entries into one more, of probability 1 - sum; the result never exceeds that of the full
            distributions. Otherwise both are normalised anew over the K entries, and what the student thinks of the
            rest is not trained.

    The tail's probability is at least 1e-7 of the whole, below which log(1 - x) has no digits in float32.
    """
    mask_N = _check_rows("topk_jsd", student_NK, teacher_NK, mask_N)
    _check_options("topk_jsd", beta, 1.0, TILE)
    student_NK, teacher_NK = keep(student_NK, mask_N[:, None]), keep(teacher_NK.detach(), mask_N[:, None])
    if tail:
        student_NK, teacher_NK = _with_tail(student_NK), _with_tail(teacher_NK)
    return _mean(_JSD.apply(student_NK, teacher_NK, mask_N, beta, 1.0, TILE), mask_N, tokens)


def sampled_kl(logp_T: Tensor, teacher_logp_T: Tensor, mask_T: Tensor, *, tokens: Count | None = None) -> LossOutput:
    """Reverse KL on the student's own samples: value mean of d = logp - teacher, gradient that of sg(d) logp.

    The gradient of the value itself would be noise (the expected gradient of log-probs is 0); this one has the gradient
    of KL(s | t) per token as its expectation. Only the sampled tokens' log-probs are needed.
    """
    check_same("sampled_kl", logp_T=logp_T, teacher_logp_T=teacher_logp_T, mask_T=mask_T)
    lp_T = keep(logp_T, mask_T)
    gap_T = (lp_T - keep(teacher_logp_T, mask_T)).detach()
    loss = share((gap_T * (1 + lp_T - lp_T.detach())).sum(), mask_T.sum() if tokens is None else tokens)
    return LossOutput(loss=loss, sums=detached({"distill": loss}))


class _JSD(torch.autograd.Function):
    """Sum over the positions of the mask. Its gradient by the student's logits is all that is kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor, beta: float, temperature: float, tile: int
    ) -> Tensor:
        grad_NV = torch.empty_like(student_NV) if ctx.needs_input_grad[0] else None
        total = mask_N.new_zeros((), dtype=_wide(student_NV))
        for part in _tiles(student_NV.shape, tile):
            jsd_N, slope_NV = _divergence(student_NV[part], teacher_NV[part], mask_N[part], beta, temperature)
            total += jsd_N.sum()
            if grad_NV is not None:
                grad_NV[part] = slope_NV
        ctx.save_for_backward(grad_NV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_NV,) = ctx.saved_tensors
        return _scaled(grad_NV, grads[0]), None, None, None, None, None


class _LinearJSD(torch.autograd.Function):
    """The same sum from hidden states; kept for backward are the gradients by the states and the head."""

    @staticmethod
    def forward(
        ctx: Any, student_ND: Tensor, head_VD: Tensor, teacher_NE: Tensor, teacher_head_VE: Tensor, mask_N: Tensor,
        beta: float, temperature: float, tile: int,
    ) -> Tensor:  # fmt: skip
        wide = _wide(student_ND)
        grad_ND = torch.empty_like(student_ND) if ctx.needs_input_grad[0] else None
        grad_VD = torch.zeros_like(head_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        total = mask_N.new_zeros((), dtype=wide)
        for part in _tiles((len(student_ND), len(head_VD)), tile):
            # zeroed before the product: a masked NaN would reach the head's gradient as 0 * NaN
            hidden_ND = torch.where(mask_N[part, None], student_ND[part], 0.0)
            logits = hidden_ND @ head_VD.mT, teacher_NE[part] @ teacher_head_VE.mT
            jsd_N, slope_NV = _divergence(*logits, mask_N[part], beta, temperature)
            total += jsd_N.sum()
            slope_NV = slope_NV.to(head_VD.dtype)
            if grad_ND is not None:
                grad_ND[part] = slope_NV @ head_VD
            if grad_VD is not None:
                grad_VD += slope_NV.mT @ hidden_ND
        ctx.save_for_backward(grad_ND, None if grad_VD is None else grad_VD.to(head_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_ND, grad_VD = ctx.saved_tensors
        return _scaled(grad_ND, grads[0]), _scaled(grad_VD, grads[0]), *[None] * 6


def _tiles(shape: Sequence[int], tile: int) -> list[slice]:
    """Slices of rows, of at most ``tile`` entries each (one row at least)."""
    rows = max(1, tile // max(1, shape[1]))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scaled(x_NV: Tensor | None, by: Tensor) -> Tensor | None:
    """``x * by``, multiplied in the type of ``by``: 1/tokens rounded to bfloat16 would be off for all alike."""
    if x_NV is None or x_NV.dtype == by.dtype:
        return None if x_NV is None else x_NV * by
    out_NV = torch.empty_like(x_NV)
    for part in _tiles(x_NV.shape, TILE):
        out_NV[part] = x_NV[part].to(by.dtype) * by
    return out_NV


def _logs(x_NV: Tensor, temperature: float) -> Tensor:
    """log softmax in a tensor of its own; an entry of probability 0 gets a finite log, so that 0 times it is 0."""
    x_NV = upcast(x_NV)
    logs_NV = (x_NV if temperature == 1 else x_NV / temperature).log_softmax(-1)
    return logs_NV.clamp_(min=torch.finfo(logs_NV.dtype).min / 8)


def _divergence(
    student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The divergence of each position and its derivative by the student's logits; both 0 where masked.

    By s_v the derivative is, up to a constant, (1 - beta) g_v with g = log(s / m), and for beta = 1 g = log(s / t);
    through the softmax that is s_v (g_v - sum_u s_u g_u). For beta = 0 it is s - t.
    """
    log_s_NV, log_t_NV = _logs(student_NV, temperature), _logs(teacher_NV, temperature)
    if beta == 0:
        s_NV, t_NV = log_s_NV.exp(), log_t_NV.exp()
        value_N = (log_t_NV.sub_(log_s_NV)).mul_(t_NV).sum(-1)
        slope_NV = s_NV.sub_(t_NV)
    else:
        log_m_NV = log_t_NV if beta == 1 else torch.logaddexp(log_s_NV + log1p(-beta), log_t_NV + log(beta))
        weight, s_NV = 1.0 if beta == 1 else 1.0 - beta, log_s_NV.exp()
        g_NV = log_s_NV.sub_(log_m_NV)
        kl_N = (s_NV * g_NV).sum(-1)
        value_N = weight * kl_N
        if beta < 1:
            value_N = value_N + beta * (log_t_NV.exp() * log_t_NV.sub_(log_m_NV)).sum(-1)
        slope_NV = g_NV.sub_(kl_N[:, None]).mul_(s_NV).mul_(weight)
    if temperature != 1:
        slope_NV = slope_NV.div_(temperature)
    return torch.where(mask_N, value_N, 0.0), slope_NV.masked_fill_(~mask_N[:, None], 0.0)


def _with_tail(logp_NK: Tensor) -> Tensor:
    """The log-probs and, as one more entry, the log of what they leave of 1."""
    rest_N1 = (-logp_NK.logsumexp(-1, keepdim=True).clamp(max=-1e-7).expm1()).log()
    return torch.cat([logp_NK, rest_N1], dim=-1)


def _mean(total: Tensor, mask_N: Tensor, tokens: Count | None) -> LossOutput:
    loss = share(total, mask_N.sum() if tokens is None else tokens)
    return LossOutput(loss=loss, sums=detached({"distill": loss}))


def _check_rows(what: str, student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor | None) -> Tensor:
    if student_NV.ndim != 2 or student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"{what}: expected student and teacher of one shape [N, V], got {tuple(student_NV.shape)} and "
            f"{tuple(teacher_NV.shape)}; flatten leading dimensions, and cut padding of either vocabulary"
        )
    return _check_mask(what, mask_N, student_NV)


def _check_mask(what: str, mask_N: Tensor | None, rows_NV: Tensor) -> Tensor:
    if mask_N is None:
        return torch.ones(rows_NV.shape[0], dtype=torch.bool, device=rows_NV.device)
    if mask_N.dtype != torch.bool or mask_N.shape != rows_NV.shape[:1]:
        raise ValueError(f"{what}: expected mask_N bool [{rows_NV.shape[0]}], got {mask_N.dtype} {list(mask_N.shape)}")
    return mask_N


def _check_options(what: str, beta: float, temperature: float, tile: int) -> None:
    check_number(f"{what}(beta=)", beta, 0.0, 1.0)
    check_number(f"{what}(temperature=)", temperature, 0.0, open_low=True)
    check_number(f"{what}(tile=)", tile, 1)
