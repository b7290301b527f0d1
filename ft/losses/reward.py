"""Losses of models that give rewards. Shapes: P pairs, N judged steps (or positions), C classes; s = sigmoid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.losses.reduce import Count, check_number, check_same, detached, masked_sum, mean_share, pair_sums, share, upcast
from ft.types import LossOutput


def bradley_terry(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    margin: Tensor | None = None,
    centring: float = 0.0,
    units: Count | None = None,
) -> LossOutput:
    """Reward of pairs: -log s(chosen - rejected - margin) + centring (chosen + rejected)^2, averaged over pairs.

    Args:
        chosen_P, rejected_P: the head's scalar for either answer.
        margin: how much better the chosen one is [P], stopped (Llama 2, 2307.09288 equation 2).
        centring: keeps rewards near zero, which the first term leaves free (2312.09244); its authors use 0.01.
        units: the denominator, by default P; a loop that splits a step passes the step's number of pairs.

    Differentiated: both rewards. Reduced in float32; P = 0 gives 0 with a graph. ``sums``: rewards/chosen,
    rewards/rejected, rewards/margins, rewards/accuracies (before ``margin``). Source: Bradley and Terry 1952;
    2203.02155 equation 1.
    """
    check_same("bradley_terry", chosen_P=chosen_P, rejected_P=rejected_P, margin=margin)
    check_number("bradley_terry: centring", centring, 0.0)
    units = chosen_P.shape[0] if units is None else units
    chosen_P, rejected_P = upcast(chosen_P), upcast(rejected_P)
    gap_P = chosen_P - rejected_P if margin is None else chosen_P - rejected_P - upcast(margin).detach()
    loss_P = -F.logsigmoid(gap_P)
    if centring:
        loss_P = loss_P + centring * (chosen_P + rejected_P) ** 2
    return LossOutput(loss=mean_share(loss_P, units), sums=detached(pair_sums(chosen_P, rejected_P, units)))


def stepwise(
    logits: Tensor, label_N: Tensor, *, mask_N: Tensor | None = None, units: Count | None = None
) -> LossOutput:
    """Process reward: cross-entropy of each judged step, averaged over steps.

    Args:
        logits: [N, C] class scores with integer labels 0 .. C-1; or [N], one score per step, with labels that are
            the probability of a good step in 0 .. 1 (bool, or a share of rollouts that succeed): binary cross-entropy.
        mask_N: bool, True where a step is judged, by default everywhere. With it N may be all positions of a batch:
            what stands elsewhere, labels of -100 and NaN included, is not looked at.
        units: the denominator, by default the number of judged steps; a loop that splits a step of training passes
            the global number.

    Differentiated: logits. Reduced in float32; nothing judged gives 0 with a graph. ``sums``: accuracy (the highest
    class, or the side of 1/2, is right). Source: 2305.20050; soft labels, 2312.08935.
    """
    if logits.dim() not in (1, 2) or label_N.shape != logits.shape[:1]:
        raise ValueError(
            f"stepwise: expected logits [N] or [N, C] and labels [N], got {(*logits.shape,)} and {(*label_N.shape,)}"
        )
    if logits.dim() == 2 and label_N.is_floating_point():
        raise ValueError(
            "stepwise: expected integer labels for logits [N, C], got floating ones (soft labels go with logits [N])"
        )
    mask_N = torch.ones_like(label_N, dtype=torch.bool) if mask_N is None else mask_N
    check_same("stepwise", label_N=label_N, mask_N=mask_N)
    count = mask_N.sum() if units is None else units
    logits = torch.where(mask_N if logits.dim() == 1 else mask_N[:, None], upcast(logits), 0.0)
    if logits.dim() == 2:
        label_N = torch.where(mask_N, label_N, 0).long()
        loss_N = F.cross_entropy(logits, label_N, reduction="none")
        right_N = logits.argmax(-1) == label_N
    else:
        label_N = torch.where(mask_N, label_N.to(logits.dtype), 0.0)
        loss_N = F.binary_cross_entropy_with_logits(logits, label_N, reduction="none")
        right_N = (logits > 0) == (label_N > 0.5)
    sums = {"accuracy": share(masked_sum(right_N, mask_N), count)}
    return LossOutput(loss=share(masked_sum(loss_N, mask_N), count), sums=detached(sums))
