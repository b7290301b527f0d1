"""Advantages: how much better a sample did than could be expected of it. Nothing here is differentiated.

Shapes: S samples, K rewards of one sample, T packed tokens. ``group_S`` says which samples answer the same prompt: any
integers, in any order, groups of any size; each -1 is a group of its own. A reward that is NaN or infinite means "not
scored" (``from_list`` makes NaN of None): such a sample has advantage 0 and is in no mean, spread or count.

Defined throughout: a sample alone in its group has nothing to be compared with, so its advantage is 0; in a group whose
rewards are all equal every advantage is exactly 0, not the rounding error of a mean divided by a small eps. Results are
float32 (float64 stays). Whole groups must be in the call; spreads over a batch are those of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ft.losses.aggregate import check_tokens
from ft.losses.reduce import check_number, check_option, check_same, keep, segment_sum, upcast

SCALES = ("group", "batch", "none")


class _Groups(NamedTuple):
    """Rewards with their groups numbered 0 .. ; not scored ones are 0 and False."""

    reward_S: Tensor
    scored_S: Tensor
    id_S: Tensor

    def total(self, x_S: Tensor) -> Tensor:
        """At each sample the sum of ``x_S`` over the scored samples of its group."""
        S = x_S.numel()
        return segment_sum(keep(x_S, self.scored_S), self.id_S, S).index_select(0, self.id_S)

    def size(self) -> Tensor:
        return self.total(self.scored_S).clamp(min=1)

    def varied(self) -> Tensor:
        """True where the group holds two scored rewards that differ."""
        low, high = (self._extreme(end) for end in ("amin", "amax"))
        return self.scored_S & (high > low)

    def centred(self) -> Tensor:
        return torch.where(self.varied(), self.reward_S - self.total(self.reward_S) / self.size(), 0.0)

    def _extreme(self, end: str) -> Tensor:
        fill = torch.inf if end == "amin" else -torch.inf
        value_S = torch.where(self.scored_S, self.reward_S, fill)
        places = value_S.new_full((value_S.numel(),), fill)
        return places.scatter_reduce(0, self.id_S, value_S, end).index_select(0, self.id_S)


def from_list(rewards: Sequence[float | None], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rewards as a tensor, [S]; None becomes NaN."""
    return torch.tensor([float("nan") if r is None else r for r in rewards], dtype=dtype)


@torch.no_grad()
def total(reward_SK: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """The weighted sum of several rewards, [S]: those not scored count 0, and a sample with none scored is NaN."""
    parts = [torch.where(part_S.isfinite(), part_S, 0.0) for part_S in _columns(reward_SK)]
    return torch.where(reward_SK.isfinite().any(1), _weighted_sum(parts, weights), torch.nan)


@torch.no_grad()
def group_mean(reward_S: Tensor, group_S: Tensor) -> Tensor:
    """R - mean of the group: GRPO's without its scale (Dr. GRPO, arXiv:2503.20783)."""
    return _groups(reward_S, group_S).centred()


@torch.no_grad()
def group_zscore(reward_S: Tensor, group_S: Tensor, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """(R - mean of the group) / (standard deviation + eps), the deviation with n - 1 (GRPO, arXiv:2402.03300).

    ``scale``: over the ``"group"``; over the rewards of the whole ``"batch"``, which does not favour prompts that are
    almost always or almost never solved (arXiv:2508.08221); ``"none"`` is ``group_mean``.
    """
    check_option("scale", scale, SCALES)
    groups = _groups(reward_S, group_S)
    return _scaled(groups, groups.centred(), scale, eps)


@torch.no_grad()
def leave_one_out(reward_S: Tensor, group_S: Tensor, *, scale: str = "none", eps: float = 1e-4) -> Tensor:
    """R - mean of the OTHERS of the group = n / (n - 1) (R - mean): RLOO, arXiv:2402.14740.

    ``scale="batch"`` then takes the z-score over the batch's scored samples: (A - mean A) / (deviation of A + eps).
    """
    check_option("scale", scale, ("none", "batch"))
    groups = _groups(reward_S, group_S)
    n_S = groups.size()
    adv_S = groups.centred() * n_S / (n_S - 1).clamp(min=1)
    return adv_S if scale == "none" else _zscore(adv_S, groups.scored_S, eps)


@torch.no_grad()
def opo(reward_S: Tensor, length_S: Tensor, group_S: Tensor) -> Tensor:
    """R - sum(length R) / sum(length) over the group: the baseline of least variance where the score's squared norm
    grows with the number of trained tokens (OPO, arXiv:2505.23585)."""
    check_same("opo", reward_S=reward_S, length_S=length_S)
    groups = _groups(reward_S, group_S)
    length_S = length_S.to(groups.reward_S.dtype)
    baseline_S = groups.total(length_S * groups.reward_S) / groups.total(length_S).clamp(min=1)
    return torch.where(groups.varied(), groups.reward_S - baseline_S, 0.0)


@torch.no_grad()
def maxrl(reward_S: Tensor, group_S: Tensor) -> Tensor:
    """(R - mean) / mean of the group, and 0 where that mean is not positive (MaxRL, arXiv:2602.02710).

    For rewards of 0 and 1 it weighs a prompt by one over how often it is solved, as maximum likelihood would.
    """
    groups = _groups(reward_S, group_S)
    mean_S = groups.total(groups.reward_S) / groups.size()
    return torch.where(mean_S > 0, groups.centred() / torch.where(mean_S > 0, mean_S, 1.0), 0.0)


@torch.no_grad()
def gdpo(reward_SK: Tensor, group_S: Tensor, *, weights: Sequence[float] | None = None, eps: float = 1e-4) -> Tensor:
    """Normalise each reward in its group, then sum, then take the z-score over the batch (GDPO, arXiv:2601.05242).

    A = zscore_S( sum_k w_k (r_k - mean_k) / (deviation_k + eps) ): no reward drowns another by having a wider spread.
    A reward that is not scored adds 0 to its sample; a sample with none scored has advantage 0.
    """
    parts = [group_zscore(reward_S, group_S, eps=eps) for reward_S in _columns(reward_SK)]
    return _zscore(_weighted_sum(parts, weights), reward_SK.isfinite().any(1), eps)


@torch.no_grad()
def reinforce_pp(
    reward_S: Tensor,
    seq_T: Tensor,
    mask_T: Tensor,
    *,
    kl_T: Tensor | None = None,
    kl_coef: float = 0.0,
    eps: float = 1e-8,
) -> Tensor:
    """REINFORCE++ (arXiv:2501.03262), one advantage per token, [T]: returns whitened over all trained tokens.

    The return of token t is R of its sequence, less kl_coef times the sum of ``kl_T`` from t to the sequence's end (no
    discount). Whitening is (x - mean) / sqrt(variance + eps), the variance with n - 1, over the call's trained tokens,
    so long answers weigh more. ``seq_T`` holds 0 .. S-1, each sequence's tokens in order. Untrained tokens are 0, and
    so is all of a sequence that was not scored. All returns equal: all 0.
    """
    if (kl_T is None) != (kl_coef == 0):
        raise ValueError(f"reinforce_pp: expected kl_T and kl_coef together; got kl_T {kl_T is not None}, {kl_coef}")
    check_tokens("reinforce_pp", mask_T, seq_T, kl_T=kl_T)
    return_T, scored_T = _spread(reward_S, seq_T, mask_T)
    if kl_T is not None:
        return_T = return_T - kl_coef * _to_go(keep(kl_T, scored_T), seq_T, reward_S.numel())
    return _whiten(return_T, scored_T, eps)


@torch.no_grad()
def reinforce_pp_baseline(
    reward_S: Tensor, group_S: Tensor, seq_T: Tensor, mask_T: Tensor, *, eps: float = 1e-8
) -> Tensor:
    """REINFORCE++ with the group's mean as baseline, [T]: R - mean of the group, whitened over all trained tokens."""
    check_tokens("reinforce_pp_baseline", mask_T, seq_T)
    _, scored_T = _spread(reward_S, seq_T, mask_T)
    centred_T, _ = _spread(group_mean(reward_S, group_S), seq_T, mask_T)
    return _whiten(centred_T, scored_T, eps)


@torch.no_grad()
def per_token(adv_S: Tensor, seq_T: Tensor) -> Tensor:
    """Each token's advantage is its sequence's, [T]; filler (``seq_T`` = S) gets 0."""
    return torch.cat([adv_S, adv_S.new_zeros(1)]).index_select(0, seq_T)


def _groups(reward_S: Tensor, group_S: Tensor) -> _Groups:
    check_same("advantage", reward_S=reward_S, group_S=group_S)
    scored_S = reward_S.isfinite()
    return _Groups(keep(reward_S, scored_S).detach(), scored_S, _number(group_S))


def _number(group_S: Tensor) -> Tensor:
    """Groups numbered from 0 without asking the device how many there are: sort, mark where a new one begins, count."""
    sorted_S, order_S = group_S.sort(stable=True)
    begins_S = sorted_S.new_ones(sorted_S.shape)
    begins_S[1:] = (sorted_S[1:] != sorted_S[:-1]) | (sorted_S[1:] < 0)
    return torch.empty_like(order_S).scatter(0, order_S, begins_S.cumsum(0).long() - 1)


def _scaled(groups: _Groups, centred_S: Tensor, scale: str, eps: float) -> Tensor:
    check_number("eps", eps, 0)
    if scale == "none":
        return centred_S
    if scale == "batch":
        spread_S = _variance(groups.reward_S, groups.scored_S).sqrt()
    else:
        spread_S = (groups.total(centred_S.square()) / (groups.size() - 1).clamp(min=1)).sqrt()
    return torch.where(groups.varied(), centred_S / torch.where(groups.varied(), spread_S + eps, 1.0), 0.0)


def _zscore(x_S: Tensor, valid_S: Tensor, eps: float) -> Tensor:
    check_number("eps", eps, 0)
    mean = keep(x_S, valid_S).sum() / valid_S.sum().clamp(min=1)
    spread = _variance(x_S, valid_S).sqrt() + eps
    return torch.where(valid_S & (spread > eps), (x_S - mean) / torch.where(spread > 0, spread, 1.0), 0.0)


def _whiten(x_T: Tensor, valid_T: Tensor, eps: float) -> Tensor:
    check_number("eps", eps, 0)
    mean = keep(x_T, valid_T).sum() / valid_T.sum().clamp(min=1)
    variance = _variance(x_T, valid_T)
    return torch.where(
        valid_T & (variance > 0), (x_T - mean) * torch.where(variance > 0, variance + eps, 1.0).rsqrt(), 0.0
    )


def _variance(x_S: Tensor, valid_S: Tensor) -> Tensor:
    """With n - 1; 0 for fewer than two values, and exactly 0 for equal ones."""
    n = valid_S.sum()
    mean = keep(x_S, valid_S).sum() / n.clamp(min=1)
    variance = keep((x_S - mean).square(), valid_S).sum() / (n - 1).clamp(min=1)
    none = x_S.new_full((1,), torch.inf)  # so that the extremes of no value at all are defined
    low = torch.cat([none, torch.where(valid_S, x_S, torch.inf)]).amin()
    high = torch.cat([-none, torch.where(valid_S, x_S, -torch.inf)]).amax()
    return torch.where(high > low, variance, 0.0)


def _spread(x_S: Tensor, seq_T: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's value of its sequence, and where that is both trained and scored."""
    x_T = per_token(upcast(x_S), seq_T)
    valid_T = mask_T & x_T.isfinite()
    return torch.where(valid_T, x_T, 0.0), valid_T


def _to_go(x_T: Tensor, seq_T: Tensor, S: int) -> Tensor:
    """Sum of ``x_T`` from each token to the end of its sequence (tokens of a sequence in order, wherever they lie)."""
    order_T = seq_T.sort(stable=True).indices
    sorted_T, sorted_seq_T = x_T[order_T].double(), seq_T[order_T]  # a running sum over all sequences: not in float32
    before_T = sorted_T.cumsum(0) - sorted_T
    starts = segment_sum(sorted_T, sorted_seq_T, S + 1).cumsum(0)
    to_go_T = starts[sorted_seq_T] - before_T
    return torch.empty_like(x_T).scatter(0, order_T, to_go_T.to(x_T.dtype))


def _weighted_sum(parts: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    if weights is not None and len(weights) != len(parts):
        raise ValueError(f"weights: expected one for each of {len(parts)} rewards; got {weights}")
    scaled = parts if weights is None else [w * part_S for w, part_S in zip(weights, parts, strict=True)]
    return torch.stack(list(scaled)).sum(0)


def _columns(reward_SK: Tensor) -> tuple[Tensor, ...]:
    if reward_SK.dim() != 2 or not reward_SK.shape[1]:
        raise ValueError(f"rewards: expected shape [S, K] with K at least 1; got {tuple(reward_SK.shape)}")
    return upcast(reward_SK).unbind(1)
