"""Triton's token_logps, interpreted, against the torch path and float64: values, gradients, ragged sizes."""

from __future__ import annotations

import attrs
import pytest
import torch
from test_logprobs import gradients, oracle, relative, with_grad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ft.errors import ModelError
from ft.kernels.logprobs import tiles, token_logps
from ft.kernels.logprobs.cases import CASES, Case, Inputs, make
from ft.kernels.logprobs.tiles import Head, Options

pytest.importorskip("triton")
from ft.kernels.logprobs import triton

RAGGED = (
    Case(name="63 of 1000", N=63, V=1000, D=96, options={"entropy": True}),
    Case(name="one of 1000", N=1, V=1000, D=96),
    Case(name="129 of 130", N=129, V=130, D=130, r=17, bias=True, options={"softcap": 4.0, "entropy": True}),
)
all_cases = pytest.mark.parametrize("case", [*(c for c in CASES if c.N < 500), *RAGGED], ids=lambda case: case.name)
trained = pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several blocks and ragged tiles at test sizes."""
    monkeypatch.setitem(tiles.ROWS, "cpu", 400)
    monkeypatch.setitem(tiles.TILE, "cpu", 100_000)
    monkeypatch.setitem(tiles.TILE, "other", 100_000)
    # What the interpreter takes grows with the number of programs.
    monkeypatch.setattr(triton, "ROW_WISE", {"BLOCK_R": 128, "BLOCK_C": 128})
    monkeypatch.setitem(triton.CONFIGS, "fp32", triton.CONFIGS["16 bit"])


@pytest.fixture(autouse=True)
def nan_filled():
    """``torch.empty`` holds NaN, so that whatever is read must have been written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(x: Inputs, impl: str = "triton") -> tuple[Tensor, Tensor | None]:
    return token_logps(*x.args(), **x.kwargs(), impl=impl)


@all_cases
@trained
def test_float32_equals_float64_to_rounding(case, trained):
    x = with_grad(make(case), trained)
    logp, entropy = run(x)
    expected, expected_entropy = oracle(x)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=3e-5)
    if case.options.get("entropy"):
        assert entropy is not None and not entropy.requires_grad
        torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-4, atol=1e-5)
    for got, want in zip(gradients(x, logp), gradients(x, expected), strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("case", [CASES[0], *CASES[6:8], CASES[11], RAGGED[0]], ids=lambda case: case.name)
@trained
def test_bfloat16_is_as_close_as_the_torch_path(case, trained):
    x = with_grad(make(case, torch.bfloat16), trained)
    logp, _ = run(x)
    expected, (torch_logp, _) = oracle(x)[0], run(x, "torch")
    ours, theirs = (float((a.double() - expected).detach().abs().mean()) for a in (logp, torch_logp))
    assert ours < 1.2 * theirs + 1e-3
    truth, reference = gradients(x, expected), gradients(x, torch_logp)
    for got, other, want in zip(gradients(x, logp), reference, truth, strict=True):
        assert got.dtype == torch.bfloat16
        # the interpreter cuts a float32 to 16 bits where a device rounds it
        assert relative(got, want) < 1.2 * relative(other, want) + 2**-8


def test_without_a_gradient_the_logits_are_never_rounded_to_16_bits():
    x = make(Case(name="", N=63, V=300, D=64, spread=4.0), torch.bfloat16)
    torch.testing.assert_close(run(x)[0].double(), oracle(x)[0], rtol=1e-5, atol=1e-5)


@trained
def test_no_positions_give_zero_with_a_graph(trained):
    x = with_grad(make(Case(name="", N=0, bias=True, r=2, options={"entropy": True})), trained)
    logp, entropy = run(x)
    assert logp.shape == (0,) and logp.requires_grad and entropy is not None and entropy.shape == (0,)
    logp.sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() == 0 for t in x.floats() if t.requires_grad)


@trained
def test_slices_and_columns_of_other_tensors(trained):
    x = make(Case(name="", N=63, D=24, V=70))
    wide = torch.cat([x.hidden_ND, x.hidden_ND], 1)
    want = run(x, "torch")[0]
    for hidden in (wide[:, 24:], wide.T.contiguous().T[:, :24]):
        y = with_grad(attrs.evolve(x, hidden_ND=hidden, head_VD=x.head_VD.T.contiguous().T), trained)
        torch.testing.assert_close(run(attrs.evolve(y, target_N=torch.stack([x.target_N] * 2, 1)[:, 0]))[0], want)


def test_many_splits_are_combined_and_every_block_is_visited(monkeypatch):
    """More blocks than GROUP, the last group smaller; the positions in several calls."""
    monkeypatch.setitem(triton.CONFIGS, "fp32", triton.Config(n=16, v=16, d=16, warps=4, stages=2))
    monkeypatch.setitem(tiles.TILE, "other", 1_600)
    x = with_grad(make(Case(name="", N=150, V=70, D=20, options={"entropy": True}, bias=True, r=1)), True)
    logp, entropy = run(x)
    expected, expected_entropy = oracle(x)
    assert entropy is not None
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-4, atol=1e-5)
    for got, want in zip(gradients(x, logp), gradients(x, expected), strict=True):
        assert relative(got, want) < 1e-5


@trained
def test_tokens_forbidden_by_the_bias_have_no_share(trained):
    x = make(Case(name="", N=9, V=30, bias=True, options={"entropy": True}))
    assert x.bias_V is not None
    forbidden = torch.arange(30) % 3 == 1
    x.target_N[forbidden[x.target_N]] = 0
    x = with_grad(attrs.evolve(x, bias_V=x.bias_V.masked_fill(forbidden, -torch.inf)), trained)
    got, want = run(x), run(x, "torch")
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(x, got[0]), gradients(x, want[0]), strict=True):
        assert a.isfinite().all() and relative(a, b) < 1e-5


def test_a_target_that_is_no_token_is_nan_and_harms_no_other():
    """On a GPU targets are not checked, since that would wait for it."""
    x = make(Case(name="", N=5, V=30))
    head = Head(weight_VD=x.head_VD, bias_V=None, A_rD=None, B_Vr=None, s=1.0)
    bad = torch.tensor([0, -100, 2, 30, 4])
    logp = triton.forward(x.hidden_ND, head, bad, Options(), jacobian=False).logp_N
    assert logp.isnan().tolist() == [False, True, False, True, False]


def test_almost_certain_tokens_keep_their_precision():
    hidden, head = torch.ones(1, 1), torch.tensor([[30.0], [0.0]])
    expected = torch.tensor(30.0).neg().exp()
    for leaf in (hidden.requires_grad_(), head.requires_grad_()):  # the frozen head first
        logp, _ = token_logps(hidden, head, torch.tensor([0]), impl="triton")
        (grad,) = torch.autograd.grad(logp.sum(), leaf)
        torch.testing.assert_close(-logp.detach()[0], expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad[0, 0], expected * (30 if leaf is hidden else 1), rtol=1e-5, atol=0)


@trained
def test_no_tensor_holds_all_logits_and_nothing_waits(trained, monkeypatch):
    for device in tiles.TILE:
        monkeypatch.setitem(tiles.TILE, device, 6_000)
        monkeypatch.setitem(tiles.ROWS, device, 100)
    x = with_grad(make(Case(name="", N=200, V=600, D=6, options={"softcap": 3.0, "entropy": True})), trained)
    sizes, names = [], set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())
            names.add(func.__name__)
            return out

    monkeypatch.setattr("ft.kernels.logprobs._check", lambda *_: None)  # looks at targets, on a CPU alone
    with Watch():
        run(x)[0].sum().backward()
    assert max(sizes) <= 6_000 == 200 * 600 / 20
    assert not names & {"_local_scalar_dense.default", "nonzero.default", "item.default"}


def test_float64_is_left_to_torch():
    x = make(Case(name="", N=3), torch.float64)
    with pytest.raises(ModelError, match="no float64"):
        run(x)
    assert run(x, "auto")[0].dtype == torch.float64
