"""NF4's Triton kernels under the interpreter, against plain torch.

The interpreter rounds float32 to bfloat16 by cutting bits off and cannot multiply matrices of bfloat16, so that bits
are compared in float32 and float16, and bfloat16 to one unit in its last place. That all compiles is test_aot.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from attrs import evolve
from torch import Tensor

from ft.errors import ModelError
from ft.kernels import nf4
from ft.kernels.launch import interpreted
from ft.kernels.nf4.cases import CASES, Case, make

triton = pytest.importorskip("ft.kernels.nf4.triton")
small = pytest.mark.parametrize("case", [c for c in CASES if c.name != "more than a piece"], ids=lambda c: c.name)


@contextmanager
def filled() -> Iterator[None]:
    """torch.empty gives NaN, and the largest integers: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pieces(q: nf4.NF4Tensor) -> list[Tensor]:
    return [t for t in (q.packed, q.absmax, q.absmax2, q.offset) if t is not None]


def ulp(x: Tensor) -> Tensor:
    """The distance of bfloat16 neighbours around each value."""
    return torch.ldexp(torch.ones_like(x, dtype=torch.float32), torch.frexp(x.float()).exponent - 8)


@small
def test_quantised_weight_equals_the_reference(case):
    w = make(case)
    with filled():
        got = nf4.quantise(w, block=case.block, double=case.double, impl="triton")
    expected = nf4.quantise(w, block=case.block, double=case.double, impl="torch")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(pieces(got), pieces(expected), strict=True))
    assert (got.shape, got.dtype, got.block) == (expected.shape, expected.dtype, expected.block)


@small
def test_dequantised_weight_equals_the_reference(case):
    q = evolve(nf4.quantise(make(case), block=case.block, double=case.double), dtype=torch.float32)
    with filled():
        got, half = nf4.dequantise(q, impl="triton"), nf4.dequantise(q, torch.float16, impl="triton")
    assert torch.equal(got, nf4.dequantise(q, impl="torch"))
    assert torch.equal(half, nf4.dequantise(q, torch.float16, impl="torch"))


def test_dequantised_weight_is_rounded_to_its_own_type_first():
    q = nf4.quantise(make(Case(name="", shape=(48, 64), dtype=torch.float16)))
    got = nf4.dequantise(q, torch.float32, impl="triton")
    assert torch.equal(got, nf4.dequantise(q).float()) and not torch.equal(
        got, nf4.dequantise(evolve(q, dtype=torch.float32))
    )
    q = evolve(q, dtype=torch.bfloat16)
    got, expected = nf4.dequantise(q, impl="triton"), nf4.dequantise(q, impl="torch")
    assert got.dtype == torch.bfloat16
    assert ((got.float() - expected.float()).abs() <= ulp(expected)).all()


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000, 2048, 2049])
def test_any_number_of_values(n):
    w = torch.randn(n, generator=torch.Generator().manual_seed(n))
    with filled():
        q = nf4.quantise(w, impl="triton")
        got = nf4.dequantise(q, impl="triton")
    assert torch.equal(got, nf4.dequantise(nf4.quantise(w, impl="torch"), impl="torch"))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("index", [[], [3], [4, 0, 4, 2], [0, 1, 2, 3, 4]], ids=str)
def test_chosen_rows_equal_rows_of_the_whole(double, index):
    w = torch.randn(5, 6, 96, generator=torch.Generator().manual_seed(0))  # 9 blocks a row
    q = nf4.quantise(w, double=double)
    chosen = torch.tensor(index, dtype=torch.int64)
    with filled():
        got = nf4.dequantise_rows(q, chosen, impl="triton")
    assert torch.equal(got, nf4.dequantise(q)[chosen])
    assert torch.equal(nf4.dequantise(nf4.slice_rows(q, 2), impl="triton"), nf4.dequantise(q)[2:3])


def test_rows_that_straddle_blocks_are_refused():
    with pytest.raises(ModelError, match="straddle"):
        nf4.dequantise_rows(nf4.quantise(torch.randn(3, 10, 10)), torch.tensor([0]), impl="triton")


def test_values_on_boundaries_and_extremes_equal_the_reference():
    code = nf4.nf4_code()
    middle = (code[1:] + code[:-1]) / 2
    near = torch.cat([middle, torch.nextafter(middle, torch.tensor(2.0)), torch.tensor([1.0, -1.0])])
    for w in (near, near.repeat(2), *(torch.linspace(-1, 1, 200) * size for size in (1e-42, 1e-38, 1e-30, 1e37))):
        got, expected = (nf4.quantise(w, double=False, impl=impl) for impl in ("triton", "torch"))
        assert torch.equal(got.packed, expected.packed) and torch.equal(got.absmax, expected.absmax)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value):
    w = torch.randn(200)
    w[70] = value
    with pytest.raises(ModelError, match="NaN or infinity"):
        nf4.quantise(w, impl="triton")


@pytest.mark.parametrize("rows", [(1,), (16,), (17,), (3, 21)], ids=str)
@pytest.mark.parametrize(("out", "width", "block"), [(40, 192, 64), (33, 64, 32), (64, 128, 128)])
@pytest.mark.parametrize("double", [True, False])
def test_products_of_few_rows_equal_the_dense_ones(rows, out, width, block, double):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(out, width, generator=rng).half()
    q = nf4.quantise(w, block=block, double=double)
    dense, b = nf4.dequantise(q).float(), torch.randn(out, generator=rng).half() if double else None
    x, grad = torch.randn(*rows, width, generator=rng).half(), torch.randn(*rows, out, generator=rng).half()
    assert triton.products(x, q)
    with filled():
        y, grad_x = triton.forward(x, q, b), triton.backward(grad, q)
    expected = torch.nn.functional.linear(x.float(), dense, None if b is None else b.float())
    torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grad_x.float(), grad.float() @ dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [5, 65])
def test_linear_equals_torch_with_gradients(dtype, rows, keep):
    q = nf4.quantise(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype))
    results = []
    for impl in ("torch", "triton"):
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(64, rows, generator=rng).to(dtype).t().requires_grad_()  # not contiguous
        b = torch.randn(32, generator=rng).to(dtype).requires_grad_()
        y = nf4.linear(x, q, b, keep=keep, impl=impl)
        y.sum().backward()  # a gradient without strides
        results.append((y.detach(), x.grad, b.grad))
    for expected, got in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=10 * tolerance)


def test_what_products_are_not_meant_for_is_dequantised():
    q = nf4.quantise(torch.randn(8, 64))
    assert triton.products(torch.ones(64, 64).half(), q)
    for x in (torch.ones(65, 64).half(), torch.ones(4, 64), torch.ones(0, 64).half()):
        assert not triton.products(x, q)
    assert not triton.products(torch.ones(4, 50).half(), nf4.quantise(torch.randn(8, 50)))
    assert nf4.linear(torch.ones(0, 64).half(), q, impl="triton").shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="kernels are interpreted; set TRITON_INTERPRET=0")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_a_device_bits_equal_the_reference(case):
    w = make(case)
    expected = nf4.quantise(w, block=case.block, double=False)
    got = nf4.quantise(w.cuda(), block=case.block, double=False, impl="triton")
    assert torch.equal(got.packed.cpu(), expected.packed) and torch.equal(got.absmax.cpu(), expected.absmax)
    q = nf4.quantise(w, block=case.block, double=case.double)
    there = evolve(q, **{name: None if t is None else t.cuda() for name, t in named(q).items()})
    assert torch.equal(nf4.dequantise(there, impl="triton").cpu(), nf4.dequantise(q))
    if len(q.shape) == 2:
        x = torch.randn(5, q.shape[1], dtype=q.dtype)
        y = nf4.linear(x.cuda(), there, impl="triton").cpu()
        torch.testing.assert_close(y.float(), x.float() @ nf4.dequantise(q).float().T, rtol=2e-2, atol=2e-2)


def named(q: nf4.NF4Tensor) -> dict[str, Tensor | None]:
    return {"packed": q.packed, "absmax": q.absmax, "absmax2": q.absmax2, "offset": q.offset}
