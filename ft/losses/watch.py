"""How far a policy has moved from the one that its ratios are taken to: to be logged, and no part of a loss.

Shapes: T packed tokens, S sequences, N places of the ratio, which are the one or the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ft.losses.kl import exp_minus
from ft.losses.reduce import Count, share
from ft.losses.terms import hold, log_ratios


class Drift(NamedTuple):
    """Numbers to log, named and reduced as those of a ``LossOutput``: sums add up over parts, maxes do not."""

    sums: dict[str, Tensor]
    maxes: dict[str, Tensor]


@torch.no_grad()
def drift(
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    mask_T: Tensor,
    *,
    seq_T: Tensor | None = None,
    cu_S1: Tensor | None = None,
    level: str = "token",
    tokens: Count | None = None,
) -> Drift:
    """What policy-gradient losses do not need but who trains by them wants to see. With d = logp - old_logp and r the
    ratio exp(d), raised to ``level``, over the trained tokens t:

        approx_kl = sum_t (exp(d_t) - 1 - d_t) / tokens      the k3 estimate of KL(old || policy), whatever the level
        ratio = sum_t r_t / tokens
        ratio_max = max_t r_t,  ratio_inverse_max = max_t 1 / r_t      (so the least ratio is 1 / ratio_inverse_max)

    Differentiated: nothing.

    Args:
        logp_T, old_logp_T, mask_T, seq_T, cu_S1: as given to the loss (see ``grpo``). ``old_logp_T`` None: r is 1.
        level: of r, as of the loss: ``"token"`` (and for ``gmpo``, ``vespo`` and ``dppo``, whose ratios are tokens'),
            ``"sequence"`` (``luspo``), ``"sequence_token"``, or ``"sequence_sum"`` (``rloo``).
        tokens: the step's number of trained tokens, by default this call's own.

    Returns:
        ``sums`` approx_kl and ratio, ``maxes`` ratio_max and ratio_inverse_max, all 0 where nothing is trained.
        Log-ratios are held to +-20 before exp. Whatever stands at untrained places, NaN included, is never seen.
        http://joschu.net/blog/kl-approx.html
    """
    mask, sequences, d_T, raised_S = log_ratios("drift", logp_T, old_logp_T, mask_T, seq_T, cu_S1, level)
    hold(d_T)
    if raised_S is None or sequences is None:
        count_N = here_N = mask.trained_T.to(d_T.dtype)
        ratio_N = d_T.exp()
        k3_T = exp_minus(d_T, ratio_N)  # exp(d) - 1 has no digits left near d = 0; with exp(d) at hand, the fastest
    else:
        count_N = sequences.trained_S.to(d_T.dtype)
        here_N = count_N.clamp(max=1)
        ratio_N = raised_S.exp()
        k3_T = torch.expm1(d_T).sub_(d_T)
    approx_kl = k3_T.sum()
    del k3_T
    inverse_max = _max(here_N / ratio_N)
    ratio_N.mul_(here_N)
    totals = torch.stack([approx_kl, torch.dot(ratio_N, count_N)])
    approx_kl, ratio = share(totals, count_N.sum() if tokens is None else tokens).unbind()
    maxes = {"ratio_max": _max(ratio_N), "ratio_inverse_max": inverse_max}
    return Drift({"approx_kl": approx_kl, "ratio": ratio}, maxes)


def _max(x_N: Tensor) -> Tensor:
    return x_N.amax() if x_N.numel() else x_N.new_zeros(())
