"""Supervised losses. Shapes: T packed tokens of a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ft.losses.reduce import Count, detached, keep, share
from ft.types import LossOutput


def nll(logp_T: Tensor, mask_T: Tensor, *, tokens: Tensor | float | None = None) -> LossOutput:
    """Negative log-likelihood: sum over trained tokens of -logp, divided by ``tokens``.

    Args:
        logp_T: log-prob of each target token, any float type; reduced in float32.
        mask_T: bool, True where the token is trained.
        tokens: the denominator; by default this call's own number of trained tokens. A loop that splits a step
            over micro-batches or ranks passes the step's global count, and adds up the shares.

    An all-masked call is an exact 0 with a gradient of zeros, whatever stands in ``logp_T``.
    """
    logp_T = torch.where(mask_T, logp_T.float(), 0.0)
    denominator = torch.as_tensor(mask_T.sum() if tokens is None else tokens, device=logp_T.device).clamp(min=1)
    loss = (-logp_T.sum() / denominator).float()
    return LossOutput(loss=loss, sums={"nll": loss.detach()})


def dft(logp_T: Tensor, mask_T: Tensor, *, tokens: Count | None = None) -> LossOutput:
    """Dynamic fine-tuning: sum over trained tokens of -sg(exp(logp)) * logp, divided by ``tokens``.

    Each token's gradient is that of ``nll`` times the token's own probability, which takes out the 1/p that makes
    unlikely tokens dominate. The weight carries no gradient, and the mean is over tokens, not over weights. Arguments,
    denominator and the all-masked call are those of ``nll``; float64 stays float64.

    Source: Wu et al., "On the Generalization of SFT" (arXiv 2508.05629).
    """
    logp_T = keep(logp_T, mask_T)
    prob_T = logp_T.detach().clamp(max=0).exp()  # a log-prob above 0 is rounding
    nll_sum, dft_sum = -logp_T.detach().sum(), -(prob_T * logp_T).sum()
    count = mask_T.sum() if tokens is None else tokens
    loss = share(dft_sum, count)
    return LossOutput(loss=loss, sums=detached({"dft": loss, "nll": share(nll_sum, count)}))
