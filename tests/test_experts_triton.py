"""Routed experts in Triton, under its interpreter: against the loop over experts, forward and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attrs import evolve
from tiny_models import build, tokens
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.experts import Factors, LoRA, Params, Stack, reference, triton
from ft.kernels.experts.cases import CASES, RAGGED, Case, Problem, problem, quantised
from ft.kernels.experts.triton_calls import Tile, route, tile
from ft.kernels.nf4 import quantise
from ft.models.experts import use_ft_experts

MORE = (
    *(case for case in RAGGED if case.E < 100 and case.T and not case.used),
    Case(name="several tiles each way", T=40, K=2, E=3, D=72, I=40, r=4),
    Case(name="a rank of two pieces", layout="plain", T=3, K=1, E=2, D=8, I=8, r=70),
)


@pytest.fixture(autouse=True)
def nan_filled() -> Iterator[None]:
    """Memory that no kernel writes holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(made: Problem, function: Any) -> dict[str, Tensor]:
    """The output and every gradient, for a random cotangent."""
    leaves = made.leaves()
    out = function(made.hidden_TD, made.index_TK, made.weight_TK, made.params, made.lora)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_equal_to_the_loop(made: Problem) -> None:
    got, expected = run(made, triton.experts), run(made, reference.experts)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        most = value.abs().max().item() if value.numel() else 0.0
        assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-5 * max(1.0, most)), name


def test_one_expert_by_hand():
    """x = (1, 2); up = [gate (1, 0); up (0, 1)] so a = relu(1) * 2 = 2; down = (3, 4)^T; weight 0.5: (3, 4)."""
    params = Params(
        up=Stack(weight=torch.eye(2)[None]),
        down=Stack(weight=torch.tensor([[[3.0], [4.0]]])),
        act=lambda h: h[:, :1].relu() * h[:, 1:],
    )
    args = torch.tensor([[1.0, 2.0]]), torch.tensor([[0]]), torch.tensor([[0.5]]), params
    assert triton.experts(*args).tolist() == [[3.0, 4.0]]
    # LoRA on down: 2 * B A a = 2 * (1, -1) * 1 * 2 = (4, -4), times 0.5
    lora = LoRA(down=Factors(A_ErN=torch.ones(1, 1, 1), B_EMr=torch.tensor([[[1.0], [-1.0]]]), scaling=2.0))
    assert triton.experts(*args, lora).tolist() == [[5.0, 2.0]]


@pytest.mark.parametrize("case", (*CASES, *MORE), ids=lambda c: c.name)
def test_trained_stacks_with_lora(case: Case):
    assert_equal_to_the_loop(problem(case))


@pytest.mark.parametrize("case", (*CASES, MORE[0], MORE[-2]), ids=lambda c: c.name)
def test_nf4_stacks_with_lora(case: Case):
    assert_equal_to_the_loop(quantised(problem(case, frozen=True)))


@pytest.mark.parametrize("case", (CASES[3], CASES[4]), ids=lambda c: c.name)
def test_without_lora(case: Case):
    assert_equal_to_the_loop(problem(case, lora=False))


@pytest.mark.parametrize(
    ("layout", "block", "double"),
    [("gated", 32, True), ("gated", 64, False), ("gated", 128, True), ("gpt_oss", 32, False), ("gpt_oss", 64, True)],
)
def test_nf4_blocks_that_end_with_rows(layout: Any, block: int, double: bool):
    """Rows of 64 values hold two blocks, one, or half of one, which is then looked up value by value."""
    made = problem(Case(name="", layout=layout, T=5, K=2, E=3, D=64, I=64, r=2), frozen=True)

    def pack(stack: Stack) -> Stack:
        assert isinstance(stack.weight, Tensor)
        return evolve(stack, weight=quantise(stack.weight, block=block, double=double))

    params = evolve(made.params, up=pack(made.params.up), down=pack(made.params.down))
    assert_equal_to_the_loop(evolve(made, params=params))


def test_no_tokens():
    """Nothing comes out, and what is trained gets zeros."""
    made = problem(CASES[3])
    hidden, weight = (x.detach()[:0].requires_grad_() for x in (made.hidden_TD, made.weight_TK))
    none = evolve(made, hidden_TD=hidden, index_TK=made.index_TK[:0], weight_TK=weight)
    got = run(none, triton.experts)
    assert got["out"].shape == got["hidden"].shape == (0, 16) and got["weight"].shape == (0, 4)
    assert all((value == 0).all() for value in got.values())


def test_one_stack_adapted_and_one_trained():
    made = problem(CASES[1])
    assert made.lora is not None
    assert_equal_to_the_loop(evolve(made, lora=LoRA(down=made.lora.down)))
    assert_equal_to_the_loop(evolve(quantised(made), lora=LoRA(up=made.lora.up)))
    down = evolve(made.params.down, weight=quantise(made.params.down.weight.detach()))  # type: ignore[union-attr]
    assert_equal_to_the_loop(evolve(made, params=evolve(made.params, down=down)))


def test_views_of_any_strides():
    """Inputs, weights and factors that are not contiguous, and a gradient that is one value."""
    made = problem(CASES[3])

    def turned(x: Tensor) -> Tensor:
        return x.detach().mT.contiguous().mT.requires_grad_()

    def stack(s: Stack) -> Stack:
        assert isinstance(s.weight, Tensor)
        assert s.bias_EM is not None
        return evolve(s, weight=turned(s.weight), bias_EM=turned(s.bias_EM))

    assert made.lora is not None and made.lora.up is not None
    up = evolve(made.lora.up, A_ErN=turned(made.lora.up.A_ErN), B_EMr=turned(made.lora.up.B_EMr))
    params = evolve(made.params, up=stack(made.params.up), down=stack(made.params.down))
    hidden, weight = turned(made.hidden_TD), turned(made.weight_TK)
    views = evolve(made, hidden_TD=hidden, weight_TK=weight, params=params, lora=LoRA(up=up))
    assert not hidden.is_contiguous() and not up.A_ErN.is_contiguous()
    assert_equal_to_the_loop(views)
    sums = [f(hidden, made.index_TK, weight, params).sum() for f in (triton.experts, reference.experts)]
    got, expected = (torch.autograd.grad(total, hidden)[0] for total in sums)
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_near_float32(dtype: torch.dtype):
    """The interpreter cuts bits off where devices round to bfloat16, which doubles its error and gives it a sign."""
    case = evolve(CASES[3], T=40, D=32, I=16)
    got, expected = run(problem(case, dtype=dtype), triton.experts), run(problem(case), reference.experts)
    for name, value in expected.items():
        error = (got[name].float() - value).norm() / value.norm()
        assert error < (0.06 if dtype == torch.bfloat16 else 0.003), (name, error)
    assert got["out"].dtype == dtype and got["weight"].dtype == got["up.A"].dtype == torch.float32


def test_16_bit_rows_and_nf4_at_the_largest_tile():
    """More than 192 rows an expert; the oracle dequantises to 16 bits before it multiplies, and so does the kernel."""
    case = Case(name="", T=500, K=1, E=2, D=16, I=8, r=2)
    made = quantised(problem(case, dtype=torch.float16, frozen=True))
    got, expected = run(made, triton.experts), run(made, reference.experts)
    for name, value in expected.items():
        assert (got[name] - value).float().norm() <= 0.003 * value.float().norm(), name


def test_unrouted_experts_get_exact_zeros():
    made = problem(evolve(CASES[0], used=2))
    got = run(made, triton.experts)
    idle = [e for e in range(5) if e not in made.index_TK]
    assert len(idle) == 3 and all((got[n][idle] == 0).all() for n in ("up.A", "up.B", "up.weight", "down.weight"))


def test_frozen_things_get_no_gradient():
    made = problem(CASES[3], frozen=True, lora=False)
    out = triton.experts(made.hidden_TD.detach(), made.index_TK, made.weight_TK, made.params)
    out.sum().backward()
    assert made.weight_TK.grad is not None and made.hidden_TD.grad is None
    assert isinstance(made.params.up.weight, Tensor) and made.params.up.weight.grad is None


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_tiny_models_equal_transformers_eager_experts(family: str):
    """The two families furthest from the usual layout, through transformers' own interface."""
    model = build(family)

    def logits_and_grads() -> list[Tensor]:
        logits = model(input_ids=tokens(1, 6)).logits
        model.zero_grad()
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    model.set_experts_implementation("eager")
    expected = logits_and_grads()
    use_ft_experts(model, impl="triton")
    for value, wanted in zip(logits_and_grads(), expected, strict=True):
        assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-5)


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    """Experts 2, 0, 2, 2 and blocks of two rows: expert 0 has row 0, expert 2 rows 1, 2 and 3; at most 2 + 3 blocks."""
    cut = Tile(rows=2, out=16, inner=16, warps=4, stages=2)
    got = route(torch.tensor([[2, 0], [2, 2]]), 3, cut)
    assert got.slot_R.tolist() == [1, 0, 2, 3] and got.expert_R.tolist() == [0, 2, 2, 2]
    assert got.ends_E.tolist() == [1, 1, 4]
    assert got.expert_B.tolist() == [0, 2, 2, 3, 3] and got.row_B.tolist()[:3] == [0, 1, 3]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_exactly_one_block_of_its_expert(seed: int):
    rng = torch.Generator().manual_seed(seed)
    E, rows = 7, 4
    index_TK = (torch.rand(29, 3, generator=rng) ** 3 * E).long()
    got = route(index_TK, E, Tile(rows=rows, out=16, inner=16, warps=4, stages=2))
    seen = []
    for e, row in zip(got.expert_B.tolist(), got.row_B.tolist(), strict=True):
        mine = range(row, min(row + rows, got.ends_E[e].item())) if e < E else range(0)  # type: ignore[arg-type]
        assert (got.expert_R[mine.start : mine.stop] == e).all()
        seen += mine
    assert sorted(seen) == list(range(87))


def test_schedule_needs_nothing_from_the_device():
    """A tensor of the meta device has no values that a host could wait for."""
    got = route(torch.empty(64, 8, dtype=torch.int64, device="meta"), 128, tile(512, 128, torch.bfloat16))
    assert got.expert_B.shape == (512 // 16 + 128,)


def test_what_is_compiled_ahead_of_time_covers_every_tile():
    found = triton.launches()
    names = [launch.name for launch in found]
    assert len(set(names)) == len(names)
    assert {launch.constants["BR"] for launch in found if launch.constants.get("BLOCK") == 64} == {16, 32, 64, 128}


def test_what_cannot_run_is_refused():
    made = problem(CASES[0], dtype=torch.float64)
    with pytest.raises(ModelError, match="16 or 32 bits"):
        run(made, triton.experts)
    odd = quantised(problem(Case(name="", T=2, K=1, E=2, D=7, I=4), frozen=True))
    with pytest.raises(ModelError, match="even length"):
        run(odd, triton.experts)
