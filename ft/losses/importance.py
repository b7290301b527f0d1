"""Importance: how likely a token or answer is under one policy against another, with weights and masks made of it.

Shapes: T packed tokens, told apart into sequences by ``seq_T`` (0 .. S-1; S for filler). Three log-probs of one
sampled token appear in training: the policy's now (``logp_T``), that of the policy at the start of the step
(``old_logp_T``), and what the sampler said while sampling (``sampled_logp_T``), whose kernels, precision or age differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.losses.aggregate import check_tokens, needs_seq, per_sequence_mean, per_sequence_sum
from ft.losses.kl import BOUND
from ft.losses.reduce import check_number, check_option, keep

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask")


def at_level(
    log_ratio_T: Tensor, mask_T: Tensor, seq_T: Tensor | None, level: str, *, length_T: Tensor | None = None
) -> Tensor:
    """Log-ratios of tokens raised to ``level``, held to +-20 and laid at each token, [T].

    ``"token"``: as they are. ``"sequence"``: the sum over the sequence, which is the ratio of the whole answer.
    ``"geometric"``: the mean over its trained tokens. Differentiable; the gradient is 0 where the bound holds.
    ``log_ratio_T`` is 0 where ``mask_T`` is False.
    """
    check_option("level", level, LEVELS)
    if level == "sequence":
        log_ratio_T = per_sequence_sum(log_ratio_T, needs_seq(f"level={level!r}", seq_T))
    if level == "geometric":
        log_ratio_T = per_sequence_mean(log_ratio_T, mask_T, needs_seq(f"level={level!r}", seq_T), length_T=length_T)
    return log_ratio_T.clamp(-BOUND, BOUND)


@torch.no_grad()
def weights(
    logp_T: Tensor,
    sampled_logp_T: Tensor,
    mask_T: Tensor,
    seq_T: Tensor | None,
    *,
    level: str,
    mode: str = "truncate",
    cap: float,
    floor: float | None = None,
) -> Tensor:
    """w_T = exp(logp - sampled_logp) at ``level``, outliers truncated or weighed 0. Nothing is differentiated.

    - ``level``: ``"token"``; ``"sequence"``, the product over the sequence's trained tokens; ``"geometric"``, their
      geometric mean. (A product soon passes any cap: 0.012 a token over 100 tokens is already a factor of 3.3.)
    - ``mode="truncate"``: w is held to [floor, cap]. ``mode="mask"``: w is 0 outside [floor, cap], and stays 0: an
      outlier that is masked and then raised to a floor would still train, on what it was masked for.
    - ``floor=None``: no lower end.

    Where the sampler gave no log-prob (NaN) the token's ratio is taken as 1. Untrained positions get weight 1.
    Returns float32 (float64 stays). How many tokens ended at 0 is counted by the loss that uses them (``is_zero``).

    Truncation: TIS, https://fengyao.notion.site/off-policy-rl. Masking: IcePop, arXiv:2510.18855, and MIS,
    https://richardli.xyz/rl-collapse-3.
    """
    check_option("mode", mode, MODES)
    check_number("cap", cap, 0, open_low=True)
    if floor is not None:
        check_number("floor", floor, 0, cap)
    ratio_T = at_level(_difference(logp_T, sampled_logp_T, mask_T, seq_T), mask_T, seq_T, level).exp()
    low = 0.0 if floor is None else floor
    if mode == "truncate":
        weight_T = ratio_T.clamp(low, cap)
    else:
        weight_T = torch.where((ratio_T < low) | (ratio_T > cap), 0.0, ratio_T)
    return torch.where(mask_T, weight_T, 1.0)


@torch.no_grad()
def keep_by_kl(
    logp_T: Tensor, sampled_logp_T: Tensor, adv_T: Tensor, mask_T: Tensor, seq_T: Tensor, *, threshold: float
) -> Tensor:
    """Off-policy sequence mask: True where a token's sequence should train, [T] bool. Nothing is differentiated.

    A token is dropped if its advantage is negative and mean over its sequence of (sampled_logp - logp) > threshold:
    wrong answers that the policy has left behind teach little and may blow up. Tokens without a sampler's log-prob
    (NaN) are taken as unchanged. Untrained positions are False. DeepSeek-V3.2, arXiv:2512.02556, section 3.1.
    """
    check_tokens("keep_by_kl", mask_T, seq_T, adv_T=adv_T)
    kl_T = per_sequence_mean(-_difference(logp_T, sampled_logp_T, mask_T, seq_T), mask_T, seq_T)
    return ((adv_T >= 0) | (kl_T <= threshold)) & mask_T


def _difference(logp_T: Tensor, sampled_logp_T: Tensor, mask_T: Tensor, seq_T: Tensor | None) -> Tensor:
    check_tokens("importance", mask_T, seq_T, logp_T=logp_T, sampled_logp_T=sampled_logp_T)
    known_T = mask_T & ~sampled_logp_T.isnan()
    return keep(logp_T, known_T) - keep(sampled_logp_T, known_T)
