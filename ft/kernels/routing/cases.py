"""Routing problems for tests and benchmarks: every strategy at a small size, and at the size families ship."""

from __future__ import annotations

import torch
from attrs import evolve, frozen
from torch import Tensor

from ft.kernels.routing import Strategy

STRATEGIES: dict[str, Strategy] = {
    "softmax": Strategy(k=2, weights_in="logits"),
    "softmax, renormalised": Strategy(k=3, normalise=True),
    "groups by two": Strategy(
        k=3, groups=4, kept=2, normalise=True, eps=1e-20, scores_in="logits", weights_in="logits"
    ),
    "groups by maximum": Strategy(k=2, groups=4, kept=2, worth="max", scale=1.5),
    "sigmoid, bias": Strategy(k=4, score="sigmoid", normalise=True, eps=1e-20, scale=2.5),
    "sigmoid, bias, groups": Strategy(k=4, score="sigmoid", groups=4, kept=2, normalise=True, eps=1e-20, scale=2.5),
    "sigmoid, softcap, bias": Strategy(k=2, score="sigmoid", softcap=2.0, normalise=True),
    "softmax, bias": Strategy(k=2, normalise=True, floor=1e-12),
    "top-k, then softmax": Strategy(k=4, score="logits", scores_in="logits", weights_in="logits"),
    "scale per expert": Strategy(k=3, normalise=True),
}
"""The eight kinds, and two variants, by name; "bias" and "per expert" in a name say what else a call passes."""


@frozen(kw_only=True)
class Case:
    """T tokens over E experts; ``k``, where given, replaces the strategy's."""

    strategy: str
    T: int
    E: int
    k: int | None = None

    @property
    def name(self) -> str:
        return f"{self.strategy}, T {self.T}, E {self.E}" + (f", k {self.k}" if self.k else "")

    def made(self) -> Strategy:
        strategy = STRATEGIES[self.strategy]
        return strategy if self.k is None else evolve(strategy, k=self.k)


CASES = (
    *(Case(strategy=name, T=63, E=12) for name in STRATEGIES),
    *(Case(strategy=name, T=3, E=20, k=1) for name in STRATEGIES),
    Case(strategy="softmax, renormalised", T=0, E=12),
    Case(strategy="sigmoid, bias, groups", T=1, E=40, k=20),
    Case(strategy="softmax", T=1000, E=5),
    Case(strategy="softmax", T=2, E=1, k=1),
)


@frozen(kw_only=True, eq=False)
class Problem:
    """Arguments of ``route``; the logits and the scales are leaves that require gradients."""

    logits_TE: Tensor
    strategy: Strategy
    bias_E: Tensor | None
    expert_scale_E: Tensor | None

    def args(self) -> tuple[Tensor, Strategy, Tensor | None, Tensor | None]:
        return self.logits_TE, self.strategy, self.bias_E, self.expert_scale_E

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.logits_TE, self.expert_scale_E) if t is not None]


def problem(case: Case, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Normal logits, and biases as large as the scores they correct."""
    rng = torch.Generator().manual_seed(seed)
    biased, scaled = "bias" in case.strategy, "per expert" in case.strategy
    return Problem(
        logits_TE=torch.randn(case.T, case.E, generator=rng).to(dtype).requires_grad_(),
        strategy=case.made(),
        bias_E=torch.randn(case.E, generator=rng) * 0.2 if biased else None,
        expert_scale_E=torch.rand(case.E, generator=rng).add(0.5).to(dtype).requires_grad_() if scaled else None,
    )
