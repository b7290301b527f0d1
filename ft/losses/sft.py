"""Supervised losses. Shapes: T packed tokens of a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

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
