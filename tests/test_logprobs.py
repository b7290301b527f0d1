"""token_logps against log_softmax of all logits in float64, gradients too, and against numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ft.errors import ModelError, RecipeError
from ft.kernels.logprobs import tiles, token_logps
from ft.kernels.logprobs.cases import CASES, Case, Inputs, make

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
trained = pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several blocks and ragged tiles at test sizes."""
    monkeypatch.setitem(tiles.ROWS, "cpu", 400)
    monkeypatch.setitem(tiles.TILE, "cpu", 100_000)


def oracle(x: Inputs) -> tuple[Tensor, Tensor]:
    """All logits at once in float64."""
    o = x.options
    h, w = x.hidden_ND.double(), x.head_VD.double()
    z = h @ w.T
    if x.bias_V is not None:
        z = z + x.bias_V.double()
    if x.A_rD is not None and x.B_Vr is not None:
        z = z + 0.5 * (h @ x.A_rD.double().T) @ x.B_Vr.double().T
    z = z * o.get("scale", 1.0)
    if cap := o.get("softcap"):
        z = cap * torch.tanh(z / cap)
    logp = torch.log_softmax(z / o.get("temperature", 1.0), -1)
    return logp.gather(1, x.target_N[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def with_grad(x: Inputs, trained: bool) -> Inputs:
    """The same values as leaves; ``trained``: every float tensor needs a gradient, else the hidden state alone."""
    names = ["hidden_ND"] + (["head_VD", "bias_V", "A_rD", "B_Vr"] if trained else [])
    leaves = {n: t.detach().clone().requires_grad_() for n in names if (t := getattr(x, n)) is not None}
    return attrs.evolve(x, **leaves)


def gradients(x: Inputs, logp_N: Tensor) -> list[Tensor]:
    weight_N = torch.linspace(-1, 2, len(logp_N), dtype=logp_N.dtype)
    return list(torch.autograd.grad((logp_N * weight_N).sum(), [t for t in x.floats() if t.requires_grad]))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


@all_cases
@trained
def test_equals_log_softmax_in_float64_with_gradients(case, trained):
    x = with_grad(make(case, torch.float64), trained)
    logp, entropy = token_logps(*x.args(), **x.kwargs())
    expected, expected_entropy = oracle(x)
    torch.testing.assert_close(logp, expected, rtol=1e-10, atol=1e-12)
    if case.options.get("entropy"):
        assert entropy is not None and not entropy.requires_grad
        torch.testing.assert_close(entropy, expected_entropy, rtol=1e-9, atol=1e-12)
    else:
        assert entropy is None
    for got, want in zip(gradients(x, logp), gradients(x, expected), strict=True):
        assert relative(got, want) < 1e-10


@all_cases
@trained
def test_float32_is_exact_to_rounding(case, trained):
    x = with_grad(make(case), trained)
    logp, entropy = token_logps(*x.args(), **x.kwargs())
    expected, expected_entropy = oracle(x)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=3e-5)
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-4, atol=1e-5)
    for got, want in zip(gradients(x, logp), gradients(x, expected), strict=True):
        assert relative(got, want) < 1e-5


@all_cases
@trained
def test_bfloat16_is_as_close_as_naive_autograd(case, trained):
    """Both round their products to 16 bits; ours may not be worse than half as far again, plus a floor."""
    x = with_grad(make(case, torch.bfloat16), trained)
    logp, _ = token_logps(*x.args(), **x.kwargs())
    expected, _ = oracle(x)
    naive = naive_bfloat16(x)
    assert logp.dtype == torch.float32
    ours_off, naive_off = (float((a.double() - expected).detach().abs().mean()) for a in (logp, naive))
    assert ours_off < 1.5 * naive_off + 1e-3
    truth = gradients(x, expected)
    for got, other, want in zip(gradients(x, logp), gradients(x, naive), truth, strict=True):
        assert got.dtype == torch.bfloat16
        assert relative(got, want) < 1.5 * relative(other, want) + 4e-3


def naive_bfloat16(x: Inputs) -> Tensor:
    """What a model does: 16-bit head, logits to float32, log_softmax."""
    o = x.options
    z = x.hidden_ND @ x.head_VD.T
    if x.bias_V is not None:
        z = z + x.bias_V
    if x.A_rD is not None and x.B_Vr is not None:
        z = z + 0.5 * (x.hidden_ND @ x.A_rD.T) @ x.B_Vr.T
    z = z.float() * o.get("scale", 1.0)
    if cap := o.get("softcap"):
        z = cap * torch.tanh(z / cap)
    return torch.log_softmax(z / o.get("temperature", 1.0), -1).gather(1, x.target_N[:, None])[:, 0]


GRADCHECK: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"softcap": 1.5},
    {"scale": 2.0, "softcap": 1.2, "temperature": 1.4, "entropy": True},
]


@pytest.mark.parametrize("options", GRADCHECK, ids=str)
@pytest.mark.parametrize("extra", [{}, {"bias": True}, {"r": 2}, {"bias": True, "r": 2}], ids=str)
@trained
def test_gradcheck(options, extra, trained):
    x = with_grad(make(Case(name="", N=3, D=2, V=5, options=options, **extra), torch.float64), trained)
    assert torch.autograd.gradcheck(lambda *_: token_logps(*x.args(), **x.kwargs())[0], x.floats())


@pytest.mark.parametrize("needs", ["head_VD", "bias_V", "A_rD", "B_Vr"])
def test_each_gradient_alone(needs):
    x = make(Case(name="", bias=True, r=3), torch.float64)
    x = attrs.evolve(x, **{needs: getattr(x, needs).requires_grad_()})
    logp, _ = token_logps(*x.args(), **x.kwargs())
    (got,), (want,) = gradients(x, logp), gradients(x, oracle(x)[0])
    assert relative(got, want) < 1e-10


def test_by_hand():
    hidden = torch.tensor([[1.0], [2.0], [0.0]])
    head = torch.tensor([[0.0], [math.log(3.0)]])  # odds of 1 to 3, of 1 to 9, of 1 to 1
    logp, entropy = token_logps(hidden, head, torch.tensor([1, 0, 0]), entropy=True)
    assert entropy is not None
    assert logp.exp().tolist() == pytest.approx([0.75, 0.1, 0.5])
    assert entropy.tolist() == pytest.approx([0.75 * math.log(4 / 3) + 0.25 * math.log(4), 0.3250830, math.log(2)])


def test_almost_certain_tokens_keep_their_precision():
    """logp = -exp(-30) is 0 when formed as z - logsumexp in float32, and its gradient too."""
    hidden = torch.ones(1, 1, requires_grad=True)
    head = torch.tensor([[30.0], [0.0]])
    logp, _ = token_logps(hidden, head, torch.tensor([0]))
    assert logp.item() == pytest.approx(-math.exp(-30), rel=1e-5)
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(30 * math.exp(-30), rel=1e-5)


def test_large_logits_neither_overflow_nor_lose_the_rest():
    head = torch.tensor([[3e4], [3e4], [-3e4]])
    logp, entropy = token_logps(torch.ones(3, 1), head, torch.tensor([0, 1, 2]), entropy=True)
    assert entropy is not None
    assert logp.tolist() == pytest.approx([-math.log(2), -math.log(2), -6e4 - math.log(2)])
    assert entropy.tolist() == pytest.approx([math.log(2)] * 3)


@trained
def test_tokens_forbidden_by_the_bias_have_no_share(trained):
    x = make(Case(name="", V=30, bias=True, options={"entropy": True}), torch.float64)
    assert x.bias_V is not None
    forbidden = torch.arange(30) % 3 == 1
    x.target_N[forbidden[x.target_N]] = 0
    kept = attrs.evolve(x, head_VD=x.head_VD[~forbidden], bias_V=x.bias_V[~forbidden])
    kept = attrs.evolve(kept, target_N=(~forbidden).cumsum(0)[x.target_N] - 1)
    x = with_grad(attrs.evolve(x, bias_V=x.bias_V.masked_fill(forbidden, -math.inf)), trained)
    (logp, entropy), (want, want_entropy) = (
        token_logps(*x.args(), **x.kwargs()),
        token_logps(*kept.args(), **kept.kwargs()),
    )
    torch.testing.assert_close((logp.detach(), entropy), (want, want_entropy))
    assert all(grad.isfinite().all() for grad in gradients(x, logp))


@trained
def test_no_positions_give_zero_with_a_graph(trained):
    x = with_grad(make(Case(name="", N=3, bias=True, r=2)), trained)
    none = attrs.evolve(x, target_N=x.target_N[:0])
    nothing = x.hidden_ND[torch.zeros(0, dtype=torch.long)]
    logp, _ = token_logps(nothing, x.head_VD, none.target_N, **x.kwargs())
    assert logp.shape == (0,) and logp.requires_grad and logp.sum().item() == 0.0
    logp.sum().backward()
    for tensor in x.floats():
        if tensor.requires_grad:
            assert tensor.grad is not None and tensor.grad.abs().max() == 0.0


@trained
def test_slices_and_columns_of_other_tensors_are_read_in_place(trained):
    x = make(Case(name="", N=63, D=24))
    wide = torch.cat([x.hidden_ND, x.hidden_ND], 1).T.contiguous().T  # column-major
    y = with_grad(attrs.evolve(x, hidden_ND=wide), trained)
    x = with_grad(x, trained)
    logp, _ = token_logps(y.hidden_ND[:, :24], y.head_VD, y.target_N)
    want, _ = token_logps(*x.args())
    torch.testing.assert_close(logp, want)
    got, expected = gradients(y, logp), gradients(x, want)
    torch.testing.assert_close(got[0][:, :24], expected[0], rtol=1e-4, atol=1e-6)
    assert got[0][:, 24:].abs().max() == 0.0


def test_both_paths_and_no_grad_agree():
    x = make(Case(name="", N=600, V=701))
    frozen, all_trained = with_grad(x, False), with_grad(x, True)
    logps = [token_logps(*y.args())[0] for y in (x, frozen, all_trained)]
    with torch.no_grad():
        logps.append(token_logps(*all_trained.args())[0])
    assert [logp.requires_grad for logp in logps] == [False, True, True, False]
    assert all(torch.equal(logp, logps[0]) for logp in logps)


def test_an_unused_result_needs_no_backward():
    x = with_grad(make(Case(name="", options={"entropy": True})), False)
    logp, entropy = token_logps(*x.args(), **x.kwargs())
    assert entropy is not None
    logp.sum().backward()  # although entropy also came from the same function
    assert x.hidden_ND.grad is not None


def test_hidden_and_head_of_different_types_meet_in_the_wider():
    x = make(Case(name=""))
    hidden = x.hidden_ND.bfloat16()
    logp, _ = token_logps(hidden, x.head_VD, x.target_N)
    want, _ = token_logps(hidden.float(), x.head_VD, x.target_N)
    assert torch.equal(logp, want)


def test_autocast_changes_nothing():
    x = with_grad(make(Case(name="")), True)
    want, _ = token_logps(*x.args())
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = token_logps(*x.args())
        grads = gradients(x, logp)
    assert torch.equal(logp, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, gradients(x, want), strict=True))


@trained
def test_backward_twice_gives_the_same(trained):
    x = with_grad(make(Case(name="")), trained)
    logp, _ = token_logps(*x.args())
    first = torch.autograd.grad(logp.sum(), x.hidden_ND, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(logp.sum(), x.hidden_ND)[0])


def test_a_tied_embedding_gets_both_gradients():
    table = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    ids, target = torch.arange(20), torch.arange(1, 21)
    got = torch.autograd.grad(token_logps(table[ids], table, target)[0].sum(), table)[0]
    naive = torch.log_softmax(table[ids] @ table.T, -1).gather(1, target[:, None]).sum()
    torch.testing.assert_close(got, torch.autograd.grad(naive, table)[0])


@trained
def test_no_tensor_holds_all_logits(trained, monkeypatch):
    """The largest tensor that the call allocates is a tile, or a gradient that it returns."""
    monkeypatch.setitem(tiles.TILE, "cpu", 2_000)
    monkeypatch.setitem(tiles.ROWS, "cpu", 50)
    x = with_grad(make(Case(name="", N=300, V=1000, D=6, options={"softcap": 3.0, "entropy": True})), trained)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Watch():
        logp, _ = token_logps(*x.args(), **x.kwargs())
        logp.sum().backward()
    assert max(sizes) <= max(2_000, 1000 * 6) < 300 * 1000 / 20


def test_equals_trl():
    utils = pytest.importorskip("trl.trainer.utils")
    x = make(Case(name="", options={"temperature": 0.8}))
    want = utils.selective_log_softmax(x.hidden_ND @ x.head_VD.T, x.target_N, temperature=0.8)
    torch.testing.assert_close(token_logps(*x.args(), **x.kwargs())[0], want)


def test_what_cannot_run_says_why(monkeypatch):
    x = make(Case(name="", N=3))
    assert torch.equal(token_logps(*x.args(), impl="torch")[0], token_logps(*x.args())[0])
    with pytest.raises(RecipeError, match=r"no such kernels\n.*auto, torch, triton\n.*cuda"):
        token_logps(*x.args(), impl="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RecipeError, match=r"Triton kernels cannot run here"):
        token_logps(*x.args(), impl="triton")


def test_wrong_inputs_are_refused():
    x = make(Case(name="", N=3, D=4, V=9))
    h, w, t = x.args()
    with pytest.raises(ModelError, match=r"no token of the vocabulary\n.*0 to 8\n.*-100 to"):
        token_logps(h, w, torch.tensor([1, -100, 2]))
    with pytest.raises(ModelError, match=r"hidden.*wrong shape\n.*\(3, 4\)"):
        token_logps(h[:, :3], w, t)
    with pytest.raises(ModelError, match="bias"):
        token_logps(h, w, t, bias_V=torch.zeros(8))
    with pytest.raises(ModelError, match="LoRA's B"):
        token_logps(h, w, t, lora=(torch.zeros(2, 4), torch.zeros(9, 3), 1.0))
    for temperature, softcap in ((0.0, None), (math.nan, None), (1.0, -1.0)):
        with pytest.raises(ModelError, match="must be positive"):
            token_logps(h, w, t, temperature=temperature, softcap=softcap)
