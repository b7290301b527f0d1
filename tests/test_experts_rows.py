"""What the chunked experts do to rows, by C and by torch, against the formulas in float64."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_experts import assert_same, exact, run
from torch import Tensor

from ft.kernels import native
from ft.kernels.experts import rows
from ft.kernels.experts import torch as engines
from ft.kernels.experts.cases import CASES, RAGGED, Case, problem

KINDS = ("silu", "gelu_tanh")
SHAPES = ((1, 0, 3), (1, 1, 1), (2, 5, 7), (3, 40, 256), (1, 300, 130))
WAYS = ("C", "torch")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(rows, "routines", lambda x: None)
    elif rows.routines(torch.empty(0)) is None:
        pytest.skip(native.load(rows.SOURCE).text)
    return request.param


def new(shape: Any) -> Tensor:
    """Memory that shows what was not written."""
    return torch.full(tuple(shape), torch.nan)


def made(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    C, P, I = shape
    rng = torch.Generator().manual_seed(C + P + I)
    h, u = (torch.randn(C, P, n, generator=rng).mul_(3).to(dtype) for n in (2 * I, I))
    return h, u, torch.rand(C, P, generator=rng)


def formulas(kind: Any, h_CPM: Tensor, u_CPI: Tensor, w_CP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, <a, u> and dh in float64, by autograd."""
    h_CPM, u_CPI, w_CP = (t.double() for t in (h_CPM, u_CPI, w_CP))
    h_CPM.requires_grad_()
    gate_CPI, up_CPI = h_CPM.chunk(2, -1)
    a_CPI = (F.silu(gate_CPI) if kind == "silu" else F.gelu(gate_CPI, approximate="tanh")) * up_CPI
    (dh_CPM,) = torch.autograd.grad(a_CPI, h_CPM, u_CPI * w_CP[..., None])
    a_CPI = a_CPI.detach()
    return a_CPI, (a_CPI * u_CPI).sum(-1), dh_CPM


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_gates_equal_the_formulas(way: str, kind: Any, shape: tuple[int, int, int], dtype: torch.dtype, threads: int):
    gate, (h, u, w) = rows.Gated(kind), made(shape, dtype)
    a, d, dh = formulas(kind, h, u, w)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        forward = gate.forward(h, lambda s: new(s).to(dtype))
        back = gate.backward(h, u.clone(), w, lambda s: new(s).to(dtype), lambda s: new(s).to(dtype))
    finally:
        torch.set_num_threads(before)
    for got, expected in ((forward, a), (back[0], a), (back[2], dh)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(back[1].double(), d, rtol=tolerance, atol=30 * tolerance * max(1, shape[2]) ** 0.5)
    assert back[1].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_gates_saturate_as_they_should(way: str, kind: Any):
    """f(gate) is gate, or 0, far from 0: its derivative 1, or 0. NaN stays NaN."""
    gate, far = rows.Gated(kind), torch.tensor([[90.0, 1e4, -90.0, -1e4, torch.nan, 1.0, 1.0, 1.0, 1.0, 1.0]])
    h, u, w = far[None], torch.ones(1, 1, 5), torch.ones(1, 1)
    a, d, dh = gate.backward(h, u, w, new, new)
    torch.testing.assert_close(a[0, 0, :4], torch.tensor([90.0, 1e4, 0.0, 0.0]))
    torch.testing.assert_close(dh[0, 0, :4], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert a[0, 0, 4].isnan() and dh[0, 0, 4].isnan() and d.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 3), (700, 130)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_are_added_where_they_belong(way: str, dtype: torch.dtype, shape: tuple[int, int], threads: int):
    rng = torch.Generator().manual_seed(0)
    y, target = torch.randn(shape, generator=rng).to(dtype), torch.randint(0, 9, shape[:1], generator=rng)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for w in (None, torch.rand(shape[0], generator=rng)):
            out = torch.ones(9, shape[1])
            rows.add_rows(out, target, y, w)
            expected = torch.ones(9, shape[1], dtype=torch.float64)
            expected.index_add_(0, target, y.double() if w is None else y.double() * w.double()[:, None])
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES + RAGGED[1:], ids=lambda c: c.name)
def test_whole_experts_agree_both_ways(way: str, case: Case):
    assert_same(run(problem(case), engines.experts, engine="chunked"), exact(case), 1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_c_is_given_rows_of_its_types_in_a_cpus_memory_alone(device: str, dtype: torch.dtype):
    """The chunked engine runs on a GPU too, for widths that grouped_mm does not take: C must not read there."""
    found = rows.routines(torch.empty(0, dtype=dtype, device=device))
    if device == "meta" or dtype in (torch.float16, torch.float64):
        assert found is None
    else:
        assert (found is None) == (native.load(rows.SOURCE).library is None)


def test_the_source_ships_with_the_package():
    assert "forward" in (files("ft.kernels.experts") / "rows.c").read_text()
