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
from ft.kernels.experts import Factors, LoRA, Params, Stack, experts, reference
from ft.kernels.experts import torch as grouped
from ft.kernels.experts.cases import CASES, Case, Problem, problem, quantised
from ft.kernels.nf4 import dequantise
from ft.models.experts import expert_modules, use_ft_experts

ENGINES = ("loop", "grouped")


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


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lora", [True, False])
def test_engines_agree_with_the_loop_over_experts(case: Case, engine: str, lora: bool):
    made = problem(case, lora=lora)
    made = made if lora else evolve(made, lora=LoRA())
    assert_same(run(made, grouped.experts, engine=engine), run(made, reference.experts), 1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("engine", ENGINES)
def test_nf4_experts_equal_their_dequantised_weights(case: Case, engine: str):
    made = quantised(problem(case, frozen=True))

    def dense(stack: Stack) -> Stack:
        return evolve(stack, weight=dequantise(stack.weight))  # type: ignore[arg-type]

    plain = evolve(made, params=evolve(made.params, up=dense(made.params.up), down=dense(made.params.down)))
    assert_same(run(made, grouped.experts, engine=engine), run(plain, reference.experts), 1e-5)


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
    got, expected = run(problem(case, dtype=torch.bfloat16), grouped.experts, engine=engine), {}
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
            got = run(made, grouped.experts, engine=engine)
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
def test_lora_makes_no_tensor_of_the_size_of_a_stack(nf4: bool):
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
    rows = case.T * case.K
    assert sum(kept.values()) <= rows * (2 * case.I + 2 * case.r)


def test_triton_is_refused_until_there_is_one():
    made = problem(CASES[0])
    with pytest.raises(RecipeError, match="no Triton kernel"):
        experts(made.hidden_TD, made.index_TK, made.weight_TK, made.params, impl="triton")
    with pytest.raises(RecipeError, match="no Triton kernel"):
        use_ft_experts(build("olmoe"), impl="triton")
    use_ft_experts(build("llama"), impl="triton")  # no experts, nothing to refuse


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


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_recomputed_layers_give_the_same_gradients(family: str):
    model = build(family).train()
    use_ft_experts(model)
    expected = logits_and_grads(model, None)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = logits_and_grads(model, None)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


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
