"""Reductions, torch and Triton (interpreted), against ft.losses and ft.data, against numbers worked by hand."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from torch import Tensor

from ft import losses
from ft.data import pack
from ft.errors import ModelError, RecipeError
from ft.kernels.reductions import policy_gradient_sums, segment_sum, similarity
from ft.kernels.reductions.cases import FEATURES, POLICIES, SEGMENTS
from ft.losses import ebft

pytest.importorskip("triton")


def cases(found):
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


impls = pytest.mark.parametrize("impl", ["torch", "triton"])


@pytest.fixture(autouse=True)
def nan_filled():
    """``torch.empty`` holds NaN, so that whatever is read must have been written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradient(out: Tensor, x: Tensor) -> Tensor:
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weight).sum(), x)[0]


# ---- segment_sum ----------------------------------------------------------------------------------------------------


@impls
@cases(SEGMENTS)
def test_segment_sums_are_those_of_packing(case, impl):
    x, seq, S = case.make()
    x.requires_grad_()
    got, want = segment_sum(x, seq, S, impl=impl), pack.segment_sum(x, seq, S)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(got, x), gradient(want, x))


@impls
def test_segment_sums_by_hand_in_16_bits_and_from_columns(impl):
    x = torch.tensor([1.0, 2.0, 4.0, 8.0]).bfloat16()
    assert segment_sum(x, torch.tensor([0, 0, 2, 3]), 3, impl=impl).tolist() == [3.0, 0.0, 4.0]
    both = torch.arange(8.0).view(2, 4).T  # columns are not contiguous
    assert segment_sum(both, torch.tensor([0, 1, 1, 1]), 2, impl=impl).tolist() == [[0.0, 4.0], [6.0, 18.0]]


def test_segment_sum_gradcheck():
    x, seq, S = SEGMENTS[0].make(torch.float64)
    x = torch.nan_to_num(x).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, seq, S), x)


# ---- policy_gradient_sums -------------------------------------------------------------------------------------------


def by_grpo(args, options):
    weight, options = options.get("weight_T"), {k: v for k, v in options.items() if k != "weight_T"}
    return losses.grpo(*args, is_weight_T=weight, tokens=1, **options)


@impls
@cases(POLICIES)
def test_policy_sums_are_those_of_grpo(case, impl):
    args, options = case.make()
    logp = args[0].requires_grad_()
    got, want = policy_gradient_sums(*args, **options, impl=impl), by_grpo(args, options)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    (a,), (b,) = (torch.autograd.grad(loss, logp) for loss in (got.loss, want.loss))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert got.tokens == args[3].sum()
    drift = torch.where(args[3], args[0].detach() - args[1], 0.0).clamp(-20, 20).double()
    torch.testing.assert_close(got.approx_kl.double(), (drift.expm1() - drift).sum(), rtol=1e-5, atol=1e-12)
    moved = losses.drift(args[0], args[1], args[3], tokens=1)
    torch.testing.assert_close(got.approx_kl, moved.sums["approx_kl"], rtol=2e-2, atol=1e-9)
    for name in ("ratio", "clip_low", "clip_high", "clip_dual"):
        expected = {**want.sums, **moved.sums}.get(name, torch.zeros(()))
        torch.testing.assert_close(getattr(got, name), expected, rtol=1e-5, atol=1e-9)
    for name in ("ratio_max", "ratio_inverse_max"):
        torch.testing.assert_close(getattr(got, name), moved.maxes[name], rtol=1e-5, atol=0)
    assert [f.name for f in attrs.fields(type(got)) if getattr(got, f.name).requires_grad] == ["loss"]


@impls
def test_policy_sums_by_hand(impl):
    """Ratios 2, 1/2, 2, 1 with advantages 1, -1, -1, 3 and clip 0.2: 1.2 + (-0.8) + (-2) + 3 = 1.4."""
    drift = torch.tensor([math.log(2), -math.log(2), math.log(2), 0.0]).requires_grad_()
    adv, mask = torch.tensor([1.0, -1.0, -1.0, 3.0]), torch.ones(4, dtype=torch.bool)
    sums = policy_gradient_sums(drift, torch.zeros(4), adv, mask, impl=impl)
    assert sums.loss.item() == pytest.approx(-1.4)
    assert torch.autograd.grad(sums.loss, drift)[0].tolist() == pytest.approx([0.0, 0.0, 2.0, -3.0])
    assert [x.item() for x in (sums.clip_low, sums.clip_high, sums.clip_dual, sums.ratio)] == [1.0, 1.0, 0.0, 5.5]
    assert [sums.ratio_max.item(), sums.ratio_inverse_max.item()] == pytest.approx([2.0, 2.0])


@impls
def test_policy_sums_take_16_bit_and_strided_inputs(impl):
    args, options = POLICIES[0].make(torch.bfloat16)
    wide = torch.stack([args[0]] * 2, 1)[:, 0]
    got = policy_gradient_sums(wide, *args[1:], **options, impl=impl)
    logp, old, adv = (x.float() for x in args[:3])
    exact = policy_gradient_sums(logp, old, adv, args[3], **options, impl="torch")
    torch.testing.assert_close(got.loss, exact.loss)
    assert got.loss.dtype == torch.float32


def test_policy_sums_gradcheck_where_nothing_is_clipped():
    args, options = attrs.evolve(POLICIES[5], trained=1.0, T=9).make(torch.float64)
    options["clip"] = None
    logp = args[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_gradient_sums(x, *args[1:], **options).loss, logp)


# ---- similarity -----------------------------------------------------------------------------------------------------


@impls
@cases(FEATURES)
def test_similarities_are_those_of_ebft(case, impl):
    gen, ref, valid = case.make()
    align, div = similarity(gen, ref, valid_PG=valid, impl=impl)
    torch.testing.assert_close(align, ebft.alignment(gen, ref, valid_PG=valid), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(div, ebft.diversity(gen, valid_PG=valid), rtol=1e-5, atol=1e-4)


@cases(FEATURES)
def test_similarity_gradients_agree(case):
    gen, ref, valid = case.make()
    grads = []
    for impl in ("torch", "triton"):
        gen = gen.detach().requires_grad_()
        align, div = similarity(gen, ref, valid_PG=valid, impl=impl)
        grads.append(gradient(align, gen) if not align.numel() else gradient(align + 0.1 * div.square(), gen))
    assert grads[0].isfinite().all()
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_similarity_gradcheck(missing):
    gen, ref, valid = attrs.evolve(FEATURES[0], D=3, missing=missing).make(torch.float64)
    gen = torch.nan_to_num(gen).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: similarity(x, ref, valid_PG=valid), gen)


@impls
def test_similarity_by_hand_with_a_zero_vector(impl):
    gen = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]], requires_grad=True)
    align, div = similarity(gen, torch.tensor([[0.0, 5.0]]), impl=impl)
    assert align.tolist() == [pytest.approx([1.6, 2.0, 0.0])]
    assert div.tolist() == [[8.0, 8.0, 0.0]]  # 3 samples: 2 / 2 times 4 * 2
    (grad,) = torch.autograd.grad(align.sum() + div.sum(), gen)
    assert grad.isfinite().all()


@impls
def test_similarity_takes_16_bits_and_other_layouts(impl):
    gen, ref, _ = FEATURES[0].make(torch.bfloat16)
    want = similarity(gen.float(), ref.float(), impl="torch")
    turned = gen.mT.contiguous().mT.requires_grad_()
    got = similarity(turned, ref, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert gradient(got[0], turned).dtype == torch.bfloat16


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    x, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"not in order\n.*0 \.\. 2"):
        segment_sum(x, torch.tensor([0, 1, 0]), 2)
    with pytest.raises(ModelError, match="not in order"):
        segment_sum(x, torch.tensor([0, 1, 3]), 2)
    with pytest.raises(ModelError, match=r"segment_sum do not fit.*\n.*\n.*\(3,\) float32, \(2,\) int64"):
        segment_sum(x, torch.tensor([0, 1]), 2)
    with pytest.raises(ModelError, match="mask bool"):
        policy_gradient_sums(x, x, x, mask.float())
    for clip, dual in (((1.2, 0.2), None), ((0.2, -0.1), None), ((0.2, 3.0), 3.0), (None, 0.5)):
        with pytest.raises(ModelError, match="no range around 1"):
            policy_gradient_sums(x, x, x, mask, clip=clip, dual_clip=dual)
    with pytest.raises(ModelError, match="similarity do not fit"):
        similarity(torch.zeros(2, 3, 4), torch.zeros(2, 5))
    with pytest.raises(ModelError, match="64 or fewer"):
        similarity(torch.zeros(1, 65, 4), torch.zeros(1, 4), impl="triton")
    with pytest.raises(ModelError, match="no float64"):
        segment_sum(x.double(), torch.tensor([0, 0, 0]), 1, impl="triton")
    with pytest.raises(RecipeError, match="auto, torch, triton"):
        segment_sum(x, torch.tensor([0, 0, 0]), 1, impl="cuda")
