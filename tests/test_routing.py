"""Routing: by hand, against every family's own router, and the Triton form against the torch form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
from tiny_models import MOE, build
from torch import Tensor
from torch.nn.functional import linear

from ft.errors import ModelError
from ft.kernels.routing import Strategy, reference, route
from ft.kernels.routing.cases import CASES, STRATEGIES, Case, problem

# Infinities and NaN are put in on purpose; numpy, which interprets the kernels, remarks on them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

LOGITS = torch.tensor([0.6, 0.3, 0.1]).log()[None]


def routed(logits_TE: Tensor, strategy: Strategy, *args: Tensor | None) -> list[tuple[int, float]]:
    """The first token's experts and weights, the same from both forms."""
    found = [route(logits_TE, strategy, *args, impl=impl) for impl in ("torch", "triton")]
    (index_TK, weight_TK), (other_TK, others_TK) = found
    assert torch.equal(index_TK, other_TK) and torch.allclose(weight_TK, others_TK, rtol=1e-6)
    return [(e, round(w, 6)) for e, w in zip(index_TK[0].tolist(), weight_TK[0].tolist(), strict=True)]


def test_softmax_by_hand():
    """Probabilities 0.6, 0.3, 0.1: the best two weigh 0.6 and 0.3, or 2/3 and 1/3 of their sum."""
    assert routed(LOGITS, Strategy(k=2)) == [(0, 0.6), (1, 0.3)]
    assert routed(LOGITS, Strategy(k=2, normalise=True)) == [(0, 0.666667), (1, 0.333333)]
    assert routed(LOGITS, Strategy(k=2, score="logits")) == [(0, 0.666667), (1, 0.333333)]
    assert routed(LOGITS, Strategy(k=2, normalise=True, floor=1.8, scale=2.0)) == [(0, 0.666667), (1, 0.333333)]
    scales = torch.tensor([1.0, 10.0, 100.0])
    assert routed(LOGITS, Strategy(k=2), None, scales) == [(0, 0.6), (1, 3.0)]


def test_the_bias_chooses_and_never_weighs():
    """sigmoid(ln 3) = 3/4 and sigmoid(0) = 1/2; a bias of 1 puts the second expert first."""
    logits = torch.tensor([[3.0, 1.0]]).log()
    strategy = Strategy(k=2, score="sigmoid")
    assert routed(logits, strategy, torch.tensor([0.0, 1.0])) == [(1, 0.5), (0, 0.75)]
    assert routed(logits, evolve(strategy, k=1), torch.tensor([0.0, 1.0])) == [(1, 0.5)]


def test_groups_by_hand():
    """Groups (0.4, 0.0), (0.3, 0.3): the first has the best expert, the second the best pair."""
    logits = torch.tensor([[0.4, 1e-9, 0.3, 0.3 - 1e-3]]).log()
    assert [e for e, _ in routed(logits, Strategy(k=1, groups=2, worth="max"))] == [0]
    assert [e for e, _ in routed(logits, Strategy(k=1, groups=2, worth="two"))] == [2]
    assert [e for e, _ in routed(logits, Strategy(k=2, groups=2, kept=2))] == [0, 2]


def test_softcap_by_hand():
    """tanh(inf) = 1, so a huge logit counts as the cap: sigmoid(ln 4) = 4/5."""
    cap = float(torch.tensor(4.0).log())
    assert routed(torch.tensor([[1e9, -1e9]]), Strategy(k=2, score="sigmoid", softcap=cap)) == [(0, 0.8), (1, 0.2)]


# --- the families' own routers ---------------------------------------------------------------------------------------


def _softmax(c: Any) -> Strategy:
    return Strategy(k=c.num_experts_per_tok, normalise=getattr(c, "norm_topk_prob", False), weights_in="logits")


def _renormalised(c: Any) -> Strategy:
    return Strategy(k=c.num_experts_per_tok, normalise=True)


def _deepseek(c: Any) -> Strategy:
    k, scale = c.num_experts_per_tok, c.routed_scaling_factor
    groups = {"groups": c.n_group, "kept": c.topk_group}
    return Strategy(k=k, score="sigmoid", **groups, normalise=c.norm_topk_prob, eps=1e-20, scale=scale)


def _deepseek_v2(c: Any) -> Strategy:
    groups = {"groups": c.n_group, "kept": c.topk_group} if c.topk_method == "group_limited_greedy" else {}
    return Strategy(k=c.num_experts_per_tok, **groups, worth="max", scale=c.routed_scaling_factor)


def _sigmoid(c: Any) -> Strategy:
    return Strategy(k=c.num_experts_per_tok, score="sigmoid", normalise=True)


STRATEGY_OF: dict[str, Callable[[Any], Strategy]] = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe"), _softmax),
    **dict.fromkeys(("mixtral", "minimax", "hunyuan_v1_moe"), _renormalised),
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "nemotron_h"), _deepseek),
    "qwen3_5_moe_text": lambda c: evolve(_renormalised(c), weights_in="logits"),
    "hunyuan_v1_moe": lambda c: Strategy(k=c.moe_topk, normalise=True, weights_in="logits"),
    "minimax_m2": _sigmoid,
    "mistral4": lambda c: evolve(_deepseek(c), score="softmax", scores_in="logits", weights_in="logits"),
    "deepseek_v2": _deepseek_v2,
    "ernie4_5_moe": lambda c: evolve(_renormalised(c), floor=c.moe_norm_min),
    "gemma4_text": lambda c: Strategy(k=c.top_k_experts, normalise=True),
    "gpt_oss": lambda c: Strategy(k=c.num_experts_per_tok, score="logits", scores_in="logits", weights_in="logits"),
    "afmoe": lambda c: evolve(_sigmoid(c), eps=1e-20, scale=c.route_scale),
    "laguna": lambda c: evolve(_sigmoid(c), softcap=c.moe_router_logit_softcapping or None, weights_in="logits"),
}

OVER = {"laguna": {"moe_router_logit_softcapping": 1.5}, "qwen2_moe": {"norm_topk_prob": False}}


def router_of(family: str) -> tuple[Any, Any]:
    """(router, module that holds it) of a tiny model, with every parameter and bias scattered."""
    model = build(family, **OVER.get(family, {}))
    modules = dict(model.named_modules())
    name = next(n for n, m in modules.items() if "Router" in type(m).__name__ or type(m).__name__.endswith("V1Gate"))
    router, holder = modules[name], modules[name.rpartition(".")[0]]
    for tensor in [
        *router.parameters(),
        *router.buffers(),
        *holder.parameters(recurse=False),
        *holder.buffers(recurse=False),
    ]:
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
    return router, holder


def bias_of(family: str, router: Any, holder: Any) -> Tensor | None:
    if family == "ernie4_5_moe":
        return router.moe_statics.e_score_correction_bias.squeeze()
    if family == "afmoe":
        return holder.expert_bias
    return getattr(router, "e_score_correction_bias", getattr(holder, "e_score_correction_bias", None))


def own(family: str, router: Any, holder: Any, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(index_TK, weight_TK) as the family computes them."""
    bias = bias_of(family, router, holder)
    if family == "afmoe":
        return router(hidden_TD[None], bias)[:0:-1]
    return (router(hidden_TD, bias) if family == "minimax_m2" else router(hidden_TD))[:0:-1]


def logits_of(family: str, router: Any, hidden_TD: Tensor) -> Tensor:
    if family == "gemma4_text":
        return reference.scaled_logits(hidden_TD, router.scale, router.proj.weight, router.eps)
    gate = {"afmoe": "gate", "hunyuan_v1_moe": "wg"}.get(family)
    return linear(hidden_TD, (getattr(router, gate) if gate else router).weight, getattr(router, "bias", None))


def by_index(index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    """In order of the experts: some families ask torch.topk for the best in any order."""
    order = index_TK.argsort(-1)
    return index_TK.gather(1, order), weight_TK.gather(1, order)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("family", MOE)
def test_equal_to_the_familys_own_router(family: str, impl: Any):
    router, holder = router_of(family)
    width = next(p for n, p in router.named_parameters() if p.ndim == 2 and p.shape[1] > 8).shape[1]
    hidden_TD = torch.randn(63, width, generator=torch.Generator().manual_seed(5), requires_grad=True)
    cotangent = torch.randn(63, 64, generator=torch.Generator().manual_seed(6))
    trained = [hidden_TD, *(p for p in router.parameters() if p.requires_grad)]

    def result(index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, ...]:
        index_TK, weight_TK = by_index(index_TK, weight_TK)
        grads = torch.autograd.grad(weight_TK, trained, cotangent[:, : weight_TK.shape[1]])
        return index_TK, weight_TK, *grads

    expected = result(*own(family, router, holder, hidden_TD))
    strategy, scales = STRATEGY_OF[family](router_config(router, holder)), getattr(router, "per_expert_scale", None)
    args = logits_of(family, router, hidden_TD), strategy, bias_of(family, router, holder), scales
    got = result(*route(*args, impl=impl))
    assert torch.equal(got[0], expected[0])
    assert len(expected[0].unique()) > 2 and expected[1].std() > 0.01  # it does route
    for value, wanted in zip(got[1:], expected[1:], strict=True):
        assert value.dtype == wanted.dtype and torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)


def router_config(router: Any, holder: Any) -> Any:
    return next(m.config for m in (router, holder, holder.experts) if hasattr(m, "config"))


# --- the Triton form -------------------------------------------------------------------------------------------------


def run(args: tuple[Any, ...], leaves: list[Tensor], impl: Any) -> tuple[Tensor, ...]:
    index_TK, weight_TK = route(*args, impl=impl)
    cotangent = torch.randn(weight_TK.shape, generator=torch.Generator().manual_seed(9)).to(weight_TK.dtype)
    return index_TK, weight_TK, *torch.autograd.grad(weight_TK, leaves, cotangent)


@pytest.fixture
def nan_filled():
    """Memory that a kernel does not write holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_triton_agrees_with_torch(case: Case):
    made = problem(case)
    expected, got = (run(made.args(), made.leaves(), impl) for impl in ("torch", "triton"))
    assert torch.equal(got[0], expected[0])
    for value, wanted in zip(got[1:], expected[1:], strict=True):
        assert value.dtype == wanted.dtype and torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STRATEGIES)
def test_triton_rounds_as_torch_does(name: str, dtype: torch.dtype):
    """16-bit scores tie, so tokens with ties are left out; the rest are equal but for two units in the last place."""
    made = problem(Case(strategy=name, T=40, E=12), dtype=dtype)
    expected, got = (route(*made.args(), impl=impl) for impl in ("torch", "triton"))
    same = (expected[0] == got[0]).all(1)
    assert same.float().mean() > 0.7
    assert got[1].dtype == expected[1].dtype
    assert torch.allclose(got[1][same].float(), expected[1][same].float(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    (expected_grad,), (grad,) = (
        torch.autograd.grad(w[same].float().square().sum(), made.leaves()[:1]) for _, w in (expected, got)
    )
    assert (grad - expected_grad).float().norm() <= 0.02 * expected_grad.float().norm()


def test_triton_takes_the_lower_of_equals_and_different_experts_whatever_comes():
    strategy = Strategy(k=3)
    index_TK, _ = route(torch.zeros(1, 5), strategy, impl="triton")
    assert index_TK.tolist() == [[0, 1, 2]]
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 5, [inf] * 5, [-inf] * 5, [0.0, nan, 1.0, nan, 2.0], [-inf, 0.0, -inf, -inf, -inf]]
    for score in ("softmax", "sigmoid", "logits"):
        index_TK, weight_TK = route(torch.tensor(rows), evolve(strategy, score=score), impl="triton")
        assert all(len(set(row)) == 3 and set(row) <= set(range(5)) for row in index_TK.tolist())
        assert weight_TK[0].isnan().all() and weight_TK[3].isnan().any()


def test_logits_may_be_a_view():
    made = problem(Case(strategy="softmax", T=12, E=12))
    logits_TE = made.logits_TE.t()
    args = logits_TE, made.strategy
    for a, b in zip(run(args, made.leaves(), "torch"), run(args, made.leaves(), "triton"), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_float64_gradients_by_finite_differences(name: str):
    made = problem(Case(strategy=name, T=3, E=12), dtype=torch.float64)
    strategy = evolve(made.strategy, scores_in="logits")

    def weights(logits_TE: Tensor, *scales: Tensor) -> Tensor:
        return reference.route(logits_TE, strategy, made.bias_E, *scales)[1]

    assert torch.autograd.gradcheck(weights, made.leaves())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "more experts per token"),
        ({"k": 3, "groups": 2}, "more experts per token"),
        ({"k": 1, "groups": 3}, "do not divide"),
        ({"k": 1, "groups": 2, "kept": 3}, "do not divide"),
        ({"k": 1, "groups": 4}, "need two experts"),
        ({"k": 1, "score": "logits", "normalise": True}, "knows no"),
    ],
)
def test_strategies_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        route(torch.zeros(2, 4), Strategy(**options))
    with pytest.raises(ModelError, match="correction bias has the wrong shape"):
        route(torch.zeros(2, 4), Strategy(k=1), torch.zeros(3))


def test_float64_is_for_torch():
    logits = torch.zeros(2, 4, dtype=torch.float64)
    assert route(logits, Strategy(k=1))[1].dtype == torch.float64
    with pytest.raises(ModelError, match="16 or 32 bits"):
        route(logits, Strategy(k=1), impl="triton")
