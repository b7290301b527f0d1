"""Estimators of KL(policy || reference) at each sampled token. Shapes: T packed tokens.

With d = logp - ref_logp, for tokens sampled from the policy (http://joschu.net/blog/kl-approx.html):

| kind | value | as a loss, its gradient is |
|---|---|---|
| k1 | d | the score alone: 0 on average, whatever the reference. To be read, or subtracted from rewards |
| abs | |d| | the sign of d times the score |
| k2 | d^2 / 2 | d times the score: on average the gradient of the reverse KL |
| k3 | exp(-d) - 1 + d | (1 - exp(-d)) times the score: on average the gradient of the FORWARD KL |
| k1+, abs+, k3+ | as without + | that of k2 (straight-through) |

Differentiated: ``logp_T``. Stopped: ``ref_logp_T``. The exponent -d is held to at most 20; beyond it k3 stands at
exp(20) - 21 with a gradient of 0, which keeps one absurd token from making a step non-finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.losses.elementwise import less, with_slope
from ft.losses.reduce import check_option, upcast

KINDS = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")
BOUND = 20.0
"""Log-ratios are held within this before exp: exp(20) = 4.9e8, far outside every clip range and finite."""


def estimate(logp_T: Tensor, ref_logp_T: Tensor, *, kind: str = "k3", ratio_T: Tensor | None = None) -> Tensor:
    """The estimate at each token, [T], float32 (float64 stays). Mask the inputs first: NaN in is NaN out.

    ``ratio_T``, the policy's probability over that of the policy that sampled, makes the estimate unbiased for tokens
    that are not the policy's own: the product is returned, and the gradient flows through both factors, so that for
    k3 it is the gradient of the corrected expectation (DeepSeek-V3.2, arXiv:2512.02556, section 3.1).
    """
    check_option("kl", kind, KINDS)
    d_T = upcast(logp_T) - upcast(ref_logp_T).detach()
    value_T = with_slope(d_T, *value_and_slope(d_T.detach(), kind))
    return value_T if ratio_T is None else value_T * ratio_T


def value_and_slope(d_T: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The estimate of ``d_T`` = logp - ref_logp, and what takes the place of its derivative by logp. No gradient."""
    if kind == "k2":
        return d_T.square().div_(2), d_T
    if kind in ("k1", "k1+"):
        return d_T.clone(), d_T if kind == "k1+" else torch.ones_like(d_T)
    if kind in ("abs", "abs+"):
        return d_T.abs(), d_T if kind == "abs+" else d_T.sign()
    minus_T = (-d_T).clamp_(max=BOUND)
    exp_T = minus_T.exp()
    value_T = exp_minus(minus_T, exp_T)
    if kind == "k3+":
        return value_T, d_T
    slope_T = less(minus_T, BOUND)
    return value_T, slope_T.addcmul_(slope_T, exp_T, value=-1)


def exp_minus(x_T: Tensor, exp_T: Tensor) -> Tensor:
    """expm1(x) - x, given exp(x): as tanh(x / 2) (exp(x) + 1) - x it is as exact for small x, in half the time."""
    tanh_T = (x_T / 2).tanh_()
    return tanh_T.addcmul_(tanh_T, exp_T).sub_(x_T)
