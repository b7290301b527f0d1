"""Given routes: the router's own choice replayed bit for bit, another choice weighed by hand, nonsense refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.routing import Strategy, route
from ft.kernels.routing.cases import CASES, STRATEGIES, Case, Problem, problem

# A huge logit is put in on purpose; numpy, which interprets the kernels, remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

IMPLS: tuple[Any, ...] = ("torch", "triton")


def run(x: Problem, impl: Any, routes_TK: Tensor | None = None) -> tuple[Tensor, ...]:
    """index_TK, weight_TK, and the gradients of a weighted sum of the weights."""
    index_TK, weight_TK = route(*x.args(), routes_TK=routes_TK, impl=impl)
    slope_TK = torch.randn(weight_TK.shape, generator=torch.Generator().manual_seed(9)).to(weight_TK.dtype)
    return index_TK, weight_TK, *torch.autograd.grad(weight_TK, x.leaves(), slope_TK)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [c for c in CASES if c.T < 63], ids=lambda c: c.name)
def test_the_own_choice_replayed_is_equal_bit_for_bit(case: Case, dtype: torch.dtype, impl: Any):
    x = problem(case, dtype=dtype)
    own = run(x, impl)
    for routes_TK in (own[0].to(torch.int16), torch.full_like(own[0], -1)):
        assert all(torch.equal(a, b) for a, b in zip(run(x, impl, routes_TK), own, strict=True))


LN = {n: math.log(n) for n in (2, 3, 4)}
SOFTMAX = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]  # probabilities 0.4, 0.3, 0.2, 0.1
SIGMOID = [LN[4], LN[3], 0.0, -LN[3]]  # probabilities 0.8, 0.75, 0.5, 0.25

# name: strategy, logits, bias, scale per expert, weights of experts 3 and 1 by hand
BY_HAND: dict[str, tuple[Strategy, list[float], list[float] | None, list[float] | None, tuple[float, float]]] = {
    "softmax": (Strategy(k=2), SOFTMAX, None, None, (0.1, 0.3)),
    "softmax, renormalised": (Strategy(k=2, normalise=True), SOFTMAX, None, None, (0.25, 0.75)),
    "groups by two": (  # the groups' worth is 0.7 and 0.3: alone, expert 3 could not be chosen
        Strategy(k=2, groups=2, kept=1, normalise=True, eps=0.1), SOFTMAX, None, None, (0.1 / 0.5, 0.3 / 0.5)),
    "groups by maximum": (
        Strategy(k=2, groups=2, kept=1, worth="max", scale=1.5), SOFTMAX, None, None, (0.15, 0.45)),
    "sigmoid, bias": (
        Strategy(k=2, score="sigmoid", normalise=True, scale=2.0), SIGMOID, [9.0, 0, 9.0, 0], None, (0.5, 1.5)),
    "sigmoid, bias, groups": (
        Strategy(k=2, score="sigmoid", groups=2, kept=1), SIGMOID, [9.0, 0, 0, 0], None, (0.25, 0.75)),
    "sigmoid, softcap, bias": (  # huge logits count as the cap: 3/4, and 1/4 for its negative
        Strategy(k=2, score="sigmoid", softcap=LN[3]), [9e9, 9e9, 9e9, -9e9], [0, -9.0, 0, 0], None, (0.25, 0.75)),
    "softmax, bias": (
        Strategy(k=2, normalise=True, floor=0.8), SOFTMAX, [9.0, 0, 9.0, 0], None, (0.1 / 0.8, 0.3 / 0.8)),
    "top-k, then softmax": (Strategy(k=2, score="logits"), SOFTMAX, None, None, (0.25, 0.75)),
    "scale per expert": (Strategy(k=2, normalise=True), SOFTMAX, None, [1, 2.0, 3, 4.0], (0.25 * 4, 0.75 * 2)),
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", BY_HAND)
def test_another_choice_weighs_as_by_hand(name: str, impl: Any):
    assert BY_HAND.keys() == STRATEGIES.keys()
    strategy, logits, bias, scales, wanted = BY_HAND[name]
    optional = [None if values is None else torch.tensor(values) for values in (bias, scales)]
    logits_TE = torch.tensor([logits, logits])
    routes_TK = torch.tensor([[3, 1], [-1, -1]])
    index_TK, weight_TK = route(logits_TE, strategy, *optional, routes_TK=routes_TK, impl=impl)
    own_TK = route(logits_TE, strategy, *optional, impl=impl)
    assert index_TK[0].tolist() == [3, 1] and set(own_TK[0][0].tolist()) != {3, 1}
    assert weight_TK[0].tolist() == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(index_TK[1], own_TK[0][1]) and torch.equal(weight_TK[1], own_TK[1][1])


@pytest.mark.parametrize("name", STRATEGIES)
def test_gradients_of_another_choice(name: str):
    """By finite differences in torch; Triton's are torch's."""
    case = Case(strategy=name, T=3, E=12)
    k = case.made().k
    routes_TK = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(t))[:k] for t in range(3)])
    x = problem(case, dtype=torch.float64)
    strategy = evolve(x.strategy, scores_in="logits")

    def weights(logits_TE: Tensor, *scales: Tensor) -> Tensor:
        return route(logits_TE, strategy, x.bias_E, *scales, routes_TK=routes_TK)[1]

    assert torch.autograd.gradcheck(weights, x.leaves())
    found = [run(problem(case), impl, routes_TK) for impl in IMPLS]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"wrong shape or type\n.*integers, \(2, 2\)\n.*int64, \(2, 3\)"),
        (torch.zeros(2, 2), r"wrong shape or type\n.*integers, \(2, 2\)\n.*float32, \(2, 2\)"),
        (torch.tensor([[0, 1], [0, 4]]), r"token 1: .*cannot have\n.*2 different ones of 0 to 3.*\n.*\[0, 4\]"),
        (torch.tensor([[0, -2], [0, 1]]), r"token 0: .*cannot have\n.*\n.*\[0, -2\]"),
        (torch.tensor([[0, -1], [0, 1]]), r"token 0: .*cannot have"),
        (torch.tensor([[0, 1], [2, 2]]), r"token 1: .*cannot have"),
    ],
)
def test_routes_that_do_not_fit_are_refused(routes: Tensor, message: str):
    with pytest.raises(ModelError, match=message):
        route(torch.zeros(2, 4), Strategy(k=2), routes_TK=routes)
