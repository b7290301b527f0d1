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

from math import log, log1p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ft.losses.reduce import Count, check_number, check_same, detached, keep, share
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
        tile: entries in float32 at a time. It changes memory alone: nothing but the inputs is kept for the backward
            pass, which makes the distributions again, tile by tile. There is no second derivative.

    There is no factor temperature^2: multiply the loss if it is meant. An all-masked call is 0 with zero gradients.
    """
    mask_N = _check_rows("generalized_jsd", student_NV, teacher_NV, mask_N)
    _check_options("generalized_jsd", beta, temperature, tile)
    jsd_N = _JSD.apply(student_NV, teacher_NV.detach(), mask_N, beta, temperature, tile)
    return _mean(jsd_N, mask_N, tokens)


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
    once: both are made for ``tile // V`` positions at a time, and again in the backward pass.

    Gradients go to ``student_ND`` and ``head_VD``. The two widths may differ, the vocabularies may not.
    """
    _check_options("linear_jsd", beta, temperature, tile)
    shapes = [tuple(x.shape) for x in (student_ND, head_VD, teacher_NE, teacher_head_VE)]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1] or shapes[2][1] != shapes[3][1]:
        raise ValueError(f"linear_jsd: expected [N, D], [V, D], [N, E], [V, E], got {shapes}")
    if shapes[0][0] != shapes[2][0] or shapes[1][0] != shapes[3][0]:
        raise ValueError(f"linear_jsd: expected the same positions and one vocabulary, got {shapes}")
    mask_N = _check_mask("linear_jsd", mask_N, student_ND)
    rows = max(1, tile // max(1, head_VD.shape[0]))
    # masked rows are zeroed before the product: a NaN there would reach the head's gradient as 0 * NaN
    student_ND = torch.where(mask_N[:, None], student_ND, 0.0)
    teacher_NE, teacher_head_VE = teacher_NE.detach(), teacher_head_VE.detach()

    def part(hidden_ND: Tensor, teacher_NE: Tensor, mask_N: Tensor, head_VD: Tensor) -> Tensor:
        logits_NV, teacher_NV = hidden_ND @ head_VD.mT, teacher_NE @ teacher_head_VE.mT
        return _JSD.apply(logits_NV, teacher_NV, mask_N, beta, temperature, tile)

    tiles = zip(student_ND.split(rows), teacher_NE.split(rows), mask_N.split(rows), strict=True)
    parts = [checkpoint(part, *tile_, head_VD, use_reentrant=False, preserve_rng_state=False) for tile_ in tiles]
    return _mean(torch.cat(parts), mask_N, tokens)


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
    """Divergence per position, 0 where masked, and its gradient by the student's logits, both in tiles of rows."""

    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor, beta: float, temperature: float, tile: int
    ) -> Tensor:
        rows = max(1, tile // max(1, student_NV.shape[1]))
        parts = []
        for s_NV, t_NV, m_N in zip(student_NV.split(rows), teacher_NV.split(rows), mask_N.split(rows), strict=True):
            logs = _logs(s_NV, m_N, temperature), _logs(t_NV, m_N, temperature)
            parts.append(torch.where(m_N, _divergence(*logs, beta), 0.0))
        ctx.save_for_backward(student_NV, teacher_NV, mask_N)
        ctx.options = beta, temperature, rows
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        student_NV, teacher_NV, mask_N = ctx.saved_tensors
        beta, temperature, rows = ctx.options
        grad_NV = torch.empty_like(student_NV)
        parts = (x.split(rows) for x in (student_NV, teacher_NV, mask_N, grads[0], grad_NV))
        for s_NV, t_NV, m_N, grad_N, out_NV in zip(*parts, strict=True):
            logs = _logs(s_NV, m_N, temperature), _logs(t_NV, m_N, temperature)
            scale_N1 = torch.where(m_N, grad_N / temperature, 0.0)[:, None]
            out_NV.copy_(_slope(*logs, beta).mul_(scale_N1))
        return grad_NV, None, None, None, None, None


def _logs(x_NV: Tensor, mask_N: Tensor, temperature: float) -> Tensor:
    """log softmax; masked rows are uniform, whatever they hold."""
    return (keep(x_NV, mask_N[:, None]) / temperature).log_softmax(-1)


def _mixture(s_NV: Tensor, t_NV: Tensor, beta: float) -> Tensor:
    """log((1 - beta) s + beta t) of log-probs."""
    return torch.logaddexp(s_NV + log1p(-beta), t_NV + log(beta))


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p | q) per row of log-probs; an entry of probability 0 in p adds 0 (and not 0 * inf)."""
    gap_NV = torch.where(p_NV == -torch.inf, 0.0, p_NV - q_NV)
    return (p_NV.exp() * gap_NV).sum(-1)


def _divergence(s_NV: Tensor, t_NV: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return _kl(s_NV, t_NV) if beta else _kl(t_NV, s_NV)
    m_NV = _mixture(s_NV, t_NV, beta)
    return beta * _kl(t_NV, m_NV) + (1 - beta) * _kl(s_NV, m_NV)


def _slope(s_NV: Tensor, t_NV: Tensor, beta: float) -> Tensor:
    """Derivative of ``_divergence`` by the student's logits, times the temperature.

    dJ/ds_v is (1 - beta) log(s_v / m_v) up to a constant (log(s_v / t_v) for beta = 1); through the softmax that is
    s_v (g_v - sum_u s_u g_u). For beta = 0 it is s - t.
    """
    if beta == 0:
        return s_NV.exp() - t_NV.exp()
    target_NV = t_NV if beta == 1 else _mixture(s_NV, t_NV, beta)
    g_NV = torch.where(s_NV == -torch.inf, 0.0, s_NV - target_NV)
    s_NV = s_NV.exp()
    factor = 1.0 if beta == 1 else 1.0 - beta
    return factor * s_NV * (g_NV - (s_NV * g_NV).sum(-1, keepdim=True))


def _with_tail(logp_NK: Tensor) -> Tensor:
    """The log-probs and, as one more entry, the log of what they leave of 1."""
    rest_N1 = (-logp_NK.logsumexp(-1, keepdim=True).clamp(max=-1e-7).expm1()).log()
    return torch.cat([logp_NK, rest_N1], dim=-1)


def _mean(jsd_N: Tensor, mask_N: Tensor, tokens: Count | None) -> LossOutput:
    loss = share(jsd_N.sum(), mask_N.sum() if tokens is None else tokens)
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
