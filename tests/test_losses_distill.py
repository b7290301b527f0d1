"""Distillation: numbers by hand, numpy, TRL, and what must hold whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from oracles_ebft import ROWS
from torch import Tensor

from ft.losses.distill import generalized_jsd, linear_jsd, sampled_kl, topk_jsd

torch.set_num_threads(1)
MINE = [r for r in ROWS if r[0].endswith("_jsd")]
BETAS = (0.0, 0.3, 0.5, 1.0)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("row", MINE, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}")
def test_equals_the_independent_implementation(row: tuple[str, str, str, float]) -> None:
    assert row[3] < (1e-6 if "float32" in row[2] else 1e-9)


def test_two_entries_by_hand() -> None:
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    forward = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    reverse = 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    assert generalized_jsd(student, teacher, beta=0.0).loss.item() == pytest.approx(forward)
    assert generalized_jsd(student, teacher, beta=1.0).loss.item() == pytest.approx(reverse)
    to_mean = 0.5 * (0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35))
    to_mean += 0.5 * (0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35))
    assert generalized_jsd(student, teacher).loss.item() == pytest.approx(to_mean)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tile", [1, 14, 10**6])
def test_gradients_agree_with_finite_differences_in_every_tiling(beta: float, tile: int) -> None:
    teacher, mask = randn(5, 7, seed=1), torch.tensor([1, 0, 1, 1, 0]).bool()
    student = randn(5, 7).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return generalized_jsd(x, teacher, mask, beta=beta, temperature=1.7, tile=tile).loss

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("beta", BETAS)
def test_made_from_hidden_states_it_is_the_same(beta: float) -> None:
    hidden, head = randn(7, 4).requires_grad_(), randn(9, 4, seed=1).requires_grad_()
    other, other_head, mask = randn(7, 3, seed=2), randn(9, 3, seed=3), torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    want = generalized_jsd(hidden @ head.T, other @ other_head.T, mask, beta=beta, temperature=0.7).loss
    got = linear_jsd(hidden, head, other, other_head, mask, beta=beta, temperature=0.7, tile=20).loss
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_no_divergence_and_no_gradient(beta: float) -> None:
    logits = randn(3, 6).requires_grad_()
    out = generalized_jsd(logits, logits.detach() + 5.0, beta=beta).loss  # a constant per row changes nothing
    out.backward()
    assert out.abs() < 1e-14 and logits.grad is not None and logits.grad.abs().max() < 1e-14


def test_symmetry_and_bounds() -> None:
    one, two = randn(4, 6), 3 * randn(4, 6, seed=1)
    torch.testing.assert_close(generalized_jsd(one, two).loss, generalized_jsd(two, one).loss)
    torch.testing.assert_close(generalized_jsd(one, two, beta=0.0).loss, generalized_jsd(two, one, beta=1.0).loss)
    torch.testing.assert_close(generalized_jsd(one, two, beta=0.2).loss, generalized_jsd(two, one, beta=0.8).loss)
    apart = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert generalized_jsd(*apart).loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(generalized_jsd(one, two).loss, generalized_jsd(one.log_softmax(-1), two).loss)


@pytest.mark.parametrize("beta", BETAS)
def test_the_mean_is_the_same_under_every_partition(beta: float) -> None:
    student, teacher = randn(6, 5).requires_grad_(), randn(6, 5, seed=1)
    mask = torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    whole = generalized_jsd(student, teacher, mask, beta=beta).loss
    pieces = zip(student.split([1, 3, 2]), teacher.split([1, 3, 2]), mask.split([1, 3, 2]), strict=True)
    parts = sum(generalized_jsd(*piece, beta=beta, tokens=torch.tensor(4.0)).loss for piece in pieces)
    assert isinstance(parts, Tensor)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, student)[0], torch.autograd.grad(whole, student)[0])


@pytest.mark.parametrize("beta", BETAS)
def test_masked_rows_may_hold_anything(beta: float) -> None:
    nan = torch.full((2, 3), torch.nan)
    student, head = nan.clone().requires_grad_(), randn(3, 3).float().requires_grad_()
    none = torch.zeros(2).bool()
    for out in (
        generalized_jsd(student, nan, none, beta=beta),
        topk_jsd(student, nan, none, beta=beta),
        linear_jsd(student, head, nan, torch.ones(3, 3), none, beta=beta),
        generalized_jsd(student[:0], nan[:0], beta=beta),
    ):
        out.loss.backward()
        assert out.loss.item() == 0 and student.grad is not None and not student.grad.any()
    assert head.grad is not None and not head.grad.any()
    logp = torch.full((2,), torch.nan).requires_grad_()
    out = sampled_kl(logp, torch.full((2,), torch.nan), none)
    out.loss.backward()
    assert out.loss.item() == 0 and logp.grad is not None and not logp.grad.any()


@pytest.mark.parametrize("beta", BETAS)
def test_forbidden_entries_count_nothing(beta: float) -> None:
    """-inf in both, as for the padding of a vocabulary: TRL's kl_div gives NaN there."""
    student, teacher = randn(2, 4).requires_grad_(), randn(2, 4, seed=1)
    wide = [torch.cat([x, torch.full((2, 2), -torch.inf)], 1) for x in (student.detach(), teacher)]
    wide[0].requires_grad_()
    got, want = generalized_jsd(*wide, beta=beta).loss, generalized_jsd(student, teacher, beta=beta).loss
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    assert wide[0].grad is not None and student.grad is not None and not wide[0].grad[:, 4:].any()
    torch.testing.assert_close(wide[0].grad[:, :4], student.grad)


def test_half_precision_keeps_float32_sums_and_gives_gradients_of_its_own_type() -> None:
    student, teacher = randn(300, 50).bfloat16().requires_grad_(), randn(300, 50, seed=1).bfloat16()
    out = generalized_jsd(student, teacher).loss
    out.backward()
    assert out.dtype == torch.float32 and student.grad is not None and student.grad.dtype == torch.bfloat16
    wide = student.detach().double().requires_grad_()
    exact = generalized_jsd(wide, teacher.double()).loss
    exact.backward()
    assert out.item() == pytest.approx(exact.item(), abs=1e-6) and wide.grad is not None
    # 1/300 in bfloat16 is 0.1% off: the gradients are not
    assert (student.grad.double() * wide.grad).sum() / wide.grad.square().sum() == pytest.approx(1, abs=2e-4)


def test_a_tail_never_adds_divergence_and_all_entries_leave_none() -> None:
    logs = randn(4, 8).log_softmax(-1), randn(4, 8, seed=1).log_softmax(-1)
    for beta in BETAS:
        full = generalized_jsd(*logs, beta=beta).loss
        grown = [topk_jsd(logs[0][:, :k], logs[1][:, :k], beta=beta).loss for k in (2, 5, 7)]
        assert grown[0] <= grown[1] <= grown[2] <= full + 1e-12
        torch.testing.assert_close(grown[2], full)  # seven entries and the tail are all eight
        torch.testing.assert_close(topk_jsd(*logs, beta=beta, tail=False).loss, full)


@pytest.mark.parametrize("tail", [True, False])
def test_the_tail_trains_the_logits_it_came_from(tail: bool) -> None:
    teacher = randn(3, 6, seed=1).log_softmax(-1)[:, :3]
    logits = randn(3, 6).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return topk_jsd(x.log_softmax(-1)[:, :3], teacher, beta=0.4, tail=tail).loss

    assert torch.autograd.gradcheck(loss, logits)
    full = torch.zeros(1, 2).log_softmax(-1).float()  # nothing is left for the tail: finite all the same
    assert topk_jsd(full, full).loss.item() == pytest.approx(0.0, abs=1e-6)
    half = full + math.log(0.5)  # the teacher has half elsewhere: .5 log(.5 / 1) + .5 log(.5 / 1e-7)
    assert topk_jsd(full, half).loss.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5e7), rel=1e-3)


def test_sampled_tokens_give_the_gradient_of_reverse_kl_on_average() -> None:
    logits, teacher = randn(5).requires_grad_(), randn(5, seed=1).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits, retain_graph=True)
    every = torch.ones(5).bool()
    average, value = torch.zeros(5, dtype=torch.float64), 0.0
    for token, p in enumerate(logp.exp().tolist()):
        only = every & (torch.arange(5) == token)
        out = sampled_kl(logp, teacher, only).loss
        average += p * torch.autograd.grad(out, logits, retain_graph=True)[0]
        value += p * out.item()
    torch.testing.assert_close(average, exact)
    assert value == pytest.approx((logp.exp() * (logp - teacher)).sum().item())


def test_what_cannot_be_honoured_is_refused() -> None:
    x = torch.zeros(2, 3)
    for call in (
        lambda: generalized_jsd(x, torch.zeros(2, 4)),
        lambda: generalized_jsd(x[None], x[None]),
        lambda: generalized_jsd(x, x, torch.ones(2)),
        lambda: generalized_jsd(x, x, torch.ones(3).bool()),
        lambda: generalized_jsd(x, x, beta=1.5),
        lambda: generalized_jsd(x, x, beta=math.nan),
        lambda: generalized_jsd(x, x, temperature=0.0),
        lambda: generalized_jsd(x, x, tile=0),
        lambda: topk_jsd(x, x, beta=-0.1),
        lambda: linear_jsd(x, torch.zeros(5, 3), x, torch.zeros(6, 3)),
        lambda: linear_jsd(x, torch.zeros(5, 2), x, torch.zeros(5, 3)),
        lambda: linear_jsd(x, torch.zeros(5, 3), x[:1], torch.zeros(5, 3)),
        lambda: sampled_kl(x[0], x[0], torch.ones(2).bool()),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
