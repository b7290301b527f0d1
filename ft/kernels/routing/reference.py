"""Routing in plain differentiable torch: the oracle, and what a CPU runs. Shapes and maths as in the package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ft.kernels.routing import Strategy


def route(
    logits_TE: Tensor,
    strategy: Strategy,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    routes_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(index_TK, weight_TK); see ``ft.kernels.routing.route``."""
    wide = torch.promote_types(torch.float32, logits_TE.dtype)  # float64 stays float64
    p_TE = _scores(logits_TE.to(wide if strategy.scores_in == "float32" else logits_TE.dtype), strategy)
    index_TK = _choose(p_TE.detach(), strategy, bias_E)
    if routes_TK is not None:
        index_TK = torch.where(routes_TK < 0, index_TK, routes_TK)
    weight_TK = _weights(p_TE.gather(1, index_TK), strategy)
    if strategy.scale != 1.0:
        weight_TK = weight_TK * strategy.scale
    if expert_scale_E is not None:
        weight_TK = weight_TK * expert_scale_E[index_TK]
    return index_TK, weight_TK.to(wide if strategy.weights_in == "float32" else logits_TE.dtype)


def _scores(x_TE: Tensor, strategy: Strategy) -> Tensor:
    """p of the package's text; the logits themselves for "logits"."""
    if strategy.softcap is not None:
        x_TE = torch.tanh(x_TE / strategy.softcap) * strategy.softcap
    if strategy.score == "logits":
        return x_TE
    return x_TE.softmax(-1) if strategy.score == "softmax" else x_TE.sigmoid()


def _choose(p_TE: Tensor, strategy: Strategy, bias_E: Tensor | None) -> Tensor:
    """index_TK of the best experts in the best groups."""
    c_TE = p_TE if bias_E is None else p_TE + bias_E.detach().to(torch.promote_types(torch.float32, p_TE.dtype))
    if strategy.groups > 1:
        c_TGe = c_TE.unflatten(1, (strategy.groups, -1))
        worth_TG = c_TGe.amax(-1) if strategy.worth == "max" else c_TGe.topk(2).values.sum(-1)
        kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, worth_TG.topk(strategy.kept).indices, True)
        c_TE = c_TGe.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)
    return c_TE.topk(strategy.k).indices


def _weights(weight_TK: Tensor, strategy: Strategy) -> Tensor:
    if strategy.score == "logits":
        return weight_TK.softmax(-1)
    if not strategy.normalise:
        return weight_TK
    total_T1 = weight_TK.sum(-1, keepdim=True) + strategy.eps
    return weight_TK / (total_T1.clamp(min=strategy.floor) if strategy.floor else total_T1)


def scaled_logits(hidden_TD: Tensor, scale_D: Tensor, weight_ED: Tensor, eps: float) -> Tensor:
    """Gemma 4's logits_TE: rows brought to a root mean square of 1, then scaled by ``scale_D`` / sqrt(D)."""
    x_TD = hidden_TD.float()
    x_TD = (x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)).to(hidden_TD.dtype)
    return linear(x_TD * scale_D * hidden_TD.shape[-1] ** -0.5, weight_ED)
