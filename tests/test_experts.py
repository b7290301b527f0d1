"""Routed experts: the grouped kernel against the loop, and tiny models against transformers' own experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from tiny_models import MOE, build, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ft.errors import ModelError, RecipeError
from ft.kernels.experts import Factors, LoRA, Params, Stack, choose, chunked, experts, reference
from ft.kernels.experts import torch as engines
from ft.kernels.experts.cases import CASES, RAGGED, Case, Problem, problem, quantised
from ft.kernels.experts.chunks import SLACK, cuts, padded
from ft.kernels.nf4 import dequantise
from ft.models.experts import expert_modules, use_ft_experts

ENGINES = ("chunked", "grouped")


def run(problem: Problem, function: Any, **options: Any) -> dict[str, Tensor]:
    """The output and every gradient, for a random cotangent."""
    leaves = problem.leaves()
    out = function(problem.hidden_TD, problem.index_TK, problem.weight_TK, problem.params, problem.lora, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.allclose(got[name].double(), value.double(), rtol=tolerance, atol=tolerance), name


def exact(case: Case, lora: bool = True) -> dict[str, Tensor]:
    """The same numbers by the loop over experts in float64, rounded."""
    made = problem(case, lora=lora, dtype=torch.float64)
    found = run(made if lora else evolve(made, lora=LoRA()), reference.experts)
    return {name: value.float() for name, value in found.items()}


def test_one_expert_by_hand():
    """x = (1, 2); up = [gate (1, 0); up (0, 1)] so a = relu(1) * 2 = 2; down = (3, 4)^T; weight 0.5: (3, 4)."""
    params = Params(
        up=Stack(weight=torch.eye(2)[None]),
        down=Stack(weight=torch.tensor([[[3.0], [4.0]]])),
        act=lambda h: h[:, :1].relu() * h[:, 1:],
    )
    routing = torch.tensor([[0]]), torch.tensor([[0.5]])
    assert experts(torch.tensor([[1.0, 2.0]]), *routing, params).tolist() == [[3.0, 4.0]]
    # LoRA on down: 2 * B A a = 2 * (1, -1) * 1 * 2 = (4, -4), times 0.5
    lora = LoRA(down=Factors(A_ErN=torch.ones(1, 1, 1), B_EMr=torch.tensor([[[1.0], [-1.0]]]), scaling=2.0))
    assert experts(torch.tensor([[1.0, 2.0]]), *routing, params, lora).tolist() == [[5.0, 2.0]]


def fits(engine: str, case: Case) -> bool:
    """grouped_mm takes rows of 16 bytes' multiples only; on a GPU such widths go to the other engine."""
    return engine == "chunked" or case.D % 4 == case.I % 4 == 0


@pytest.mark.parametrize("case", CASES + RAGGED[1:], ids=lambda c: c.name)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lora", [True, False])
def test_engines_agree_with_the_loop_over_experts(case: Case, engine: str, lora: bool):
    made = problem(case, lora=lora)
    made = made if lora else evolve(made, lora=LoRA())
    if not fits(engine, case):
        with pytest.raises(RuntimeError, match="16 bytes"):
            run(made, engines.experts, engine=engine)
        return
    assert_same(run(made, engines.experts, engine=engine), exact(case, lora), 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_tokens_are_no_output_and_zero_gradients(engine: str):
    assert RAGGED[0].T == 0
    for got in (run(problem(RAGGED[0]), engines.experts, engine=engine),
                run(quantised(problem(RAGGED[0], frozen=True)), engines.experts, engine=engine)):  # fmt: skip
        assert got.pop("out").shape == (0, 8)
        assert all((value == 0).all() for value in got.values()) and "up.A" in got


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keep", [False, True])
def test_nf4_experts_equal_their_dequantised_weights(case: Case, engine: str, keep: bool):
    made = quantised(problem(case, frozen=True))

    def dense(stack: Stack) -> Stack:
        return evolve(stack, weight=dequantise(stack.weight))  # type: ignore[arg-type]

    plain = evolve(made, params=evolve(made.params, up=dense(made.params.up), down=dense(made.params.down)))
    assert_same(run(made, engines.experts, engine=engine, keep=keep), run(plain, reference.experts), 1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_nf4_is_dequantised_again_in_backward_unless_kept(monkeypatch: pytest.MonkeyPatch, engine: Any, keep: bool):
    made = quantised(problem(evolve(CASES[0], D=64), frozen=True))
    out = engines.experts(made.hidden_TD, made.index_TK, made.weight_TK, made.params, LoRA(), engine=engine, keep=keep)
    calls: list[int] = []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return dequantise(*args)

    monkeypatch.setattr(engines, "dequantise", counted)
    monkeypatch.setattr(chunked, "dequantise", counted)
    monkeypatch.setattr(chunked, "TOGETHER", 1)  # one expert's matrix
    out.sum().backward()
    hit = len(made.index_TK.unique())
    assert len(calls) == (0 if keep else 2 * hit if engine == "chunked" else 2)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64_gradients_by_finite_differences(case: Case):
    case = evolve(case, T=min(case.T, 3), D=4, I=3, r=2, E=min(case.E, 4), K=min(case.K, 2))
    made = problem(case, dtype=torch.float64)
    names, leaves = zip(*made.leaves().items(), strict=True)

    def function(*values: Tensor) -> Tensor:
        v: dict[str, Any] = dict(zip(names, values, strict=True))

        def stack(name: str) -> Stack:
            return evolve(getattr(made.params, name), weight=v[f"{name}.weight"], bias_EM=v.get(f"{name}.bias"))

        def factors(name: str) -> Factors:
            return Factors(A_ErN=v[f"{name}.A"], B_EMr=v[f"{name}.B"], scaling=0.5)

        params = evolve(made.params, up=stack("up"), down=stack("down"))
        return experts(v["hidden"], made.index_TK, v["weight"], params, LoRA(up=factors("up"), down=factors("down")))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_stays_near_float32_and_sums_in_float32(engine: str):
    case = evolve(CASES[0], T=64, K=4, D=32, I=16)
    got, expected = run(problem(case, dtype=torch.bfloat16), engines.experts, engine=engine), {}
    expected = run(problem(case), reference.experts)
    for name, value in expected.items():
        error = (got[name].float() - value).norm() / value.norm()
        assert error < 0.02, (name, error)
    assert got["out"].dtype == torch.bfloat16 and got["weight"].dtype == got["up.A"].dtype == torch.float32


def test_unrouted_experts_get_exact_zeros_and_uninitialised_memory_never_shows(monkeypatch: pytest.MonkeyPatch):
    """Rows no product wrote would hold NaN: ``torch.empty`` is filled with it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        made = problem(evolve(CASES[0], used=2))
        for engine in ENGINES:
            got = run(made, engines.experts, engine=engine)
            assert all(value.isfinite().all() for value in got.values())
            idle = [e for e in range(5) if e not in made.index_TK]
            assert len(idle) == 3 and all((got[n][idle] == 0).all() for n in ("up.A", "up.B", "down.weight"))
    finally:
        torch.use_deterministic_algorithms(False)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(made):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, t.numel())
        return made


@pytest.mark.parametrize("nf4", [False, True])
def test_lora_makes_no_tensor_of_the_size_of_a_stack(nf4: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "TOGETHER", 2 * 64 * 64)
    case = Case(name="wide", T=16, K=2, E=16, D=64, I=64, r=4)
    made = problem(case, frozen=True)
    made = quantised(made) if nf4 else made
    with Largest() as largest:
        run(made, experts)
    stack = case.E * case.D * case.I  # the smaller one, down
    assert case.T * case.K * 2 * case.I <= largest.elements < stack / 4
    with Largest() as control:
        run(problem(case), experts)  # trained stacks need a gradient of their size
    assert control.elements >= stack


def test_nothing_is_saved_that_grows_with_the_weights():
    """Between forward and backward: hidden_TD, the up output, rank-sized products, routing; and the leaves."""
    case = Case(name="saved", T=32, K=4, E=8, D=64, I=16, r=2)
    made = problem(case, frozen=True)
    kept: dict[int, int] = {}
    leaves = [made.params.up.weight, made.params.down.weight, *made.leaves().values()]
    known = {t.data_ptr() for t in leaves if isinstance(t, Tensor)}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        experts(made.hidden_TD, made.index_TK, made.weight_TK, made.params, made.lora)
    rows = case.T * case.K + SLACK[False]
    assert sum(kept.values()) <= rows * (2 * case.I + 2 * case.r)


def test_inputs_of_any_strides_and_gradients_of_none():
    made = problem(CASES[0])
    hidden = made.hidden_TD.detach().repeat(1, 2)[:, ::2].contiguous().t().contiguous().t().requires_grad_()
    index = made.index_TK.t().contiguous().t()
    stack = evolve(made.params.up, weight=made.params.up.weight.detach().mT.contiguous().mT.requires_grad_())  # type: ignore[union-attr]
    odd = evolve(made, hidden_TD=hidden, index_TK=index, params=evolve(made.params, up=stack))
    assert not hidden.is_contiguous() and not index.is_contiguous() and not stack.weight.is_contiguous()  # type: ignore[union-attr]
    plain = evolve(odd, hidden_TD=hidden.detach().contiguous().requires_grad_())
    for engine in ENGINES:
        assert_same(run(odd, engines.experts, engine=engine), run(plain, reference.experts), 1e-5)
    grads = []
    for function in (experts, reference.experts):  # a sum's gradient is expanded from one number
        out = function(hidden, index, made.weight_TK, made.params, made.lora)
        grads.append(torch.autograd.grad(out.sum(), [hidden, made.weight_TK]))
    for got, expected in zip(*grads, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_chunks_hold_neighbours_of_like_lengths():
    assert cuts([3, 0, 3, 3, 3], room=100, narrow=False) == [((0, 2, 3, 4), 3)]
    assert cuts([5, 5, 5, 5], room=10, narrow=False) == [((0, 1), 5), ((2, 3), 5)]  # 10 rows at most
    assert cuts([500, 1, 500, 1, 500, 1], room=2000, narrow=False) == [((0, 2, 4), 500), ((1, 3, 5), 1)]
    assert cuts([0, 7], room=1, narrow=False) == [((1,), 7)]  # an expert is never cut
    assert cuts([0, 0], room=9, narrow=True) == []
    assert [padded(n, True) for n in (1, 8, 9, 130, 260)] == [8, 8, 16, 144, 288]


@pytest.mark.parametrize("index", [5, -1])
def test_an_expert_that_does_not_exist_is_refused(index: int):
    made = problem(CASES[0])
    wrong = made.index_TK.clone()
    wrong[3, 1] = index
    with pytest.raises(ModelError, match=r"expert that does not exist\n  expected: 0 .. 4"):
        experts(made.hidden_TD, wrong, made.weight_TK, made.params, made.lora)


def test_what_does_not_fit_is_named():
    made = problem(CASES[3])  # T = 11, K = 4, E = 6, D = 16, M = 16, r = 4
    up, lora = made.params.up, made.lora
    assert isinstance(up.weight, Tensor) and lora is not None and lora.up is not None

    def refused(where: str, **change: Any) -> None:
        parts = {n: getattr(made, n) for n in ("hidden_TD", "index_TK", "weight_TK", "params", "lora")} | change
        with pytest.raises(ModelError, match=where):
            experts(**parts)

    def changed(**change: Any) -> Params:
        return evolve(made.params, up=evolve(up, **change))

    refused("hidden_TD", hidden_TD=made.hidden_TD[None])
    refused("index_TK", index_TK=made.index_TK[:5])
    refused("index_TK.*\n.*int64", index_TK=made.index_TK.int())
    refused("weight_TK", weight_TK=made.weight_TK[:, :2])
    refused("up: a stack", params=changed(weight=up.weight[0]))
    refused("up: a stack.*\n.*N = 16", params=changed(weight=up.weight[:, :8]))
    refused("down: a stack.*\n.*E = 5", params=changed(weight=up.weight[:5], bias_EM=None), lora=None)
    refused("up.bias_EM", params=changed(bias_EM=made.params.down.bias_EM[:, :3]))  # type: ignore[index]
    refused("differ in type", params=changed(weight=up.weight.half()))
    refused("lora.up.B_EMr", lora=LoRA(up=evolve(lora.up, B_EMr=lora.up.B_EMr[..., :2])))
    refused("lora.up.A_ErN", lora=LoRA(up=evolve(lora.up, A_ErN=lora.up.A_ErN[:, :0])))


def test_autocast_does_not_reach_inside():
    made = problem(CASES[0])
    expected = run(made, experts)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(made.hidden_TD, made.index_TK, made.weight_TK, made.params, made.lora)
    assert torch.equal(out, expected["out"])


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = problem(CASES[0])
    with pytest.raises(RecipeError, match="cannot run here"):
        experts(made.hidden_TD, made.index_TK, made.weight_TK, made.params, impl="triton")
    with pytest.raises(RecipeError, match="keep"):
        experts(made.hidden_TD, made.index_TK, made.weight_TK, made.params, impl="triton", keep=True)
    with pytest.raises(RecipeError, match="no such kernels"):
        use_ft_experts(build("olmoe"), impl="cuda")  # type: ignore[arg-type]
    assert choose("auto", made.hidden_TD, made.params) == "torch"


@pytest.mark.parametrize("family", MOE)
def test_tiny_models_equal_transformers_eager_experts(family: str):
    model = build(family)
    expected = logits_and_grads(model, "eager")
    use_ft_experts(model)
    modules = expert_modules(model)
    assert modules and all(m.config._experts_implementation == "ft" for m in modules.values())
    got = logits_and_grads(model, None)
    assert got.keys() == expected.keys() and any("experts" in name for name in got)
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-5), (name, (got[name] - value).abs().max())


def logits_and_grads(model: Any, implementation: str | None) -> dict[str, Tensor]:
    if implementation:
        model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(input_ids=tokens(2, 17), use_cache=False).logits
    (out.log_softmax(-1)[..., 3].sum() / 10).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.detach(), **grads}


def test_modules_that_ft_cannot_run_are_named():
    model = build("qwen3_moe")
    next(iter(expert_modules(model).values())).has_post_expert_norm = True
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts"):
        use_ft_experts(model)
