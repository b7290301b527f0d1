"""Routing, against the textbook's few lines for two families' routers.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from ft.commands.kernels.contest import FT, TOLERANCE, Contest, Cost, Results, Spec, carried
from ft.kernels.routing import Strategy, route
from ft.kernels.routing.cases import Problem

QWEN = Strategy(k=8, normalise=True)
DEEPSEEK = Strategy(k=8, score="sigmoid", groups=8, kept=4, normalise=True, eps=1e-20, scale=2.5)


@frozen(kw_only=True)
class Timed:
    family: str
    strategy: Strategy
    T: int
    E: int

    @property
    def name(self) -> str:
        return f"{self.family}, T{self.T} E{self.E} K{self.strategy.k}"


TIMED = (
    Timed(family="Qwen 3", strategy=QWEN, T=4096, E=128),
    Timed(family="DeepSeek V3", strategy=DEEPSEEK, T=2048, E=256),
)


def problem(timed: Timed, dtype: torch.dtype) -> Problem:
    rng = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(timed.T, timed.E, generator=rng).to(dtype).requires_grad_()
    biased = timed.strategy.score == "sigmoid"
    bias_E = torch.randn(timed.E, generator=rng) * 0.1 if biased else None
    return Problem(logits_TE=logits_TE, strategy=timed.strategy, bias_E=bias_E, expert_scale_E=None)


def contest(timed: Timed, dtype: torch.dtype, device: torch.device) -> Contest:
    x = carried(problem(timed, dtype), device)
    exact = carried(x, device, torch.float64)
    return Contest(
        runs={FT: partial(ours, x), "plain torch": partial(plain, x)}, truth=partial(plain, exact),
        oracle="the formula in float64", tolerance=TOLERANCE[dtype], plain=partial(plain, x),
    )  # fmt: skip


def ours(x: Problem) -> Results:
    return _results(x, *route(*x.args()))


def plain(x: Problem) -> Results:
    """Softmax, top-k, renormalise; or sigmoid, correction bias, best groups by their two best experts."""
    s, wide = x.strategy, torch.promote_types(torch.float32, x.logits_TE.dtype)
    logits_TE = x.logits_TE.to(wide)
    if s.score == "softmax":
        value_TK, index_TK = logits_TE.softmax(-1).topk(s.k, dim=-1)
        return _results(x, index_TK, value_TK / value_TK.sum(-1, keepdim=True))
    assert x.bias_E is not None
    p_TE = logits_TE.sigmoid()
    grouped = (p_TE.detach() + x.bias_E).view(len(p_TE), s.groups, -1)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(s.kept, dim=-1).indices
    open_TG = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=p_TE.device).scatter_(1, best, True)
    index_TK = grouped.masked_fill(~open_TG[..., None], -torch.inf).flatten(1).topk(s.k, dim=-1).indices
    value_TK = p_TE.gather(1, index_TK)
    return _results(x, index_TK, value_TK / (value_TK.sum(-1, keepdim=True) + s.eps) * s.scale)


def _results(x: Problem, index_TK: Tensor, weight_TK: Tensor) -> Results:
    """Experts by their logits, since equal ones (there are many in 16 bits) may be chosen in any order."""
    slope_K: Any = torch.linspace(-1, 1, weight_TK.shape[1], device=weight_TK.device, dtype=weight_TK.dtype)
    (grad_TE,) = torch.autograd.grad(weight_TK, x.logits_TE, slope_K.expand_as(weight_TK))
    return {"out": weight_TK.detach(), "chosen": x.logits_TE.detach().gather(1, index_TK), "grad logits": grad_TE}


def cost(timed: Timed, dtype: torch.dtype) -> Cost:
    """Logits read and their gradient written; indices and weights written, read again in backward."""
    chosen = timed.T * timed.strategy.k
    return Cost(bytes=2 * timed.T * timed.E * dtype.itemsize + 2 * chosen * (8 + 4))


SPECS = tuple(Spec(op="routing", name=t.name, make=partial(contest, t), cost=partial(cost, t)) for t in TIMED)
