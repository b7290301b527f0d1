"""Supervised losses: numbers by hand, TRL, and what must hold whatever the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles_ebft import ROWS
from torch import Tensor
from torch.nn.functional import cross_entropy

from ft.losses.sft import dft, nll
from ft.types import LossOutput

torch.set_num_threads(1)
MINE = [r for r in ROWS if r[0] in ("nll", "dft")]
LOSSES = [nll, dft]


def logps(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return -torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs().to(dtype)


@pytest.mark.parametrize("row", MINE, ids=lambda r: f"{r[0]}-{r[2]}")
def test_equals_the_independent_implementation(row: tuple[str, str, str, float]) -> None:
    assert row[3] < 1e-6


def test_nll_is_cross_entropy() -> None:
    logits, target = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 6, 0, 3, 2])
    mask = torch.tensor([1, 1, 0, 1, 0]).bool()
    ours = nll(logits.log_softmax(-1).gather(1, target[:, None])[:, 0], mask).loss
    torch.testing.assert_close(ours, cross_entropy(logits, target.where(mask, -100), ignore_index=-100))


def test_dft_by_hand() -> None:
    logp = torch.tensor([0.5, 0.25, 0.9]).log().requires_grad_()
    out = dft(logp, torch.tensor([True, True, False]))
    out.loss.backward()
    assert out.loss.item() == pytest.approx((0.5 * 0.6931472 + 0.25 * 1.3862944) / 2)
    assert out.sums["nll"].item() == pytest.approx((0.6931472 + 1.3862944) / 2)
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-0.25, -0.125, 0.0])  # -p / 2: p is stopped


def test_dft_pulls_on_the_logits_as_the_probability_itself_does() -> None:
    """d(-sg(p) log p) = -dp: the loss maximises the mean probability of the targets."""
    logits, target = torch.randn(4, 6, dtype=torch.float64).requires_grad_(), torch.tensor([1, 5, 0, 3])
    logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    (ours,) = torch.autograd.grad(dft(logp, torch.ones(4).bool()).loss, logits, retain_graph=True)
    (mean_probability,) = torch.autograd.grad(logp.exp().mean(), logits)
    torch.testing.assert_close(ours, -mean_probability)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_is_the_same_under_every_partition(loss: Callable[..., LossOutput]) -> None:
    logp, mask = logps(7, torch.float32).requires_grad_(), torch.tensor([1, 0, 1, 1, 0, 1, 0]).bool()
    whole = loss(logp, mask).loss
    for sizes in ([3, 4], [1, 1, 5], [6, 1]):
        pieces = zip(logp.split(sizes), mask.split(sizes), strict=True)
        parts = sum(loss(lp, m, tokens=torch.tensor(4.0, dtype=torch.float64)).loss for lp, m in pieces)
        assert isinstance(parts, Tensor)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(
            torch.autograd.grad(parts, logp)[0], torch.autograd.grad(loss(logp, mask).loss, logp)[0]
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tokens", [None, 0, torch.tensor(0.0), 5])
def test_an_all_masked_call_is_a_finite_zero_with_a_graph(loss: Callable[..., LossOutput], tokens: object) -> None:
    logp = torch.tensor([torch.nan, torch.inf, -torch.inf]).requires_grad_()
    out = loss(logp, torch.zeros(3).bool(), tokens=tokens)
    out.loss.backward()
    assert out.loss.item() == 0 and logp.grad is not None and logp.grad.tolist() == [0, 0, 0]
    assert all(value.isfinite() and not value.requires_grad for value in out.sums.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(loss: Callable[..., LossOutput], dtype: torch.dtype) -> None:
    logp = torch.full((4096,), -1.001).to(dtype).requires_grad_()
    out = loss(logp, torch.ones(4096).bool()).loss
    exact = loss(logp.detach().double(), torch.ones(4096).bool()).loss
    assert out.dtype == torch.float32 and out.item() == pytest.approx(exact.item(), abs=1e-6)
    out.backward()
    assert logp.grad is not None and logp.grad.dtype == dtype


def test_dft_keeps_float64() -> None:
    logp = logps(5).requires_grad_()
    out = dft(logp, torch.ones(5).bool()).loss
    out.backward()
    assert out.dtype == torch.float64 and logp.grad is not None
    torch.testing.assert_close(logp.grad, -logp.detach().exp() / 5, rtol=1e-15, atol=0)
