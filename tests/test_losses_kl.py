"""KL estimators, the entropy bonus and the choice of tokens by entropy. Shapes: T packed tokens, V vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ft.losses import entropy, kl

torch.set_num_threads(1)


def grad(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def test_kl_estimators_by_hand_and_straight_through() -> None:
    """d = ln 2: k1 0.693, k2 0.240, k3 1/2 - 1 + ln 2 = 0.193. Gradients 1, d, 1 - 1/2; with +, d."""
    logp_T, d = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True), math.log(2)
    expected = {"k1": (d, 1), "abs": (d, 1), "k2": (d * d / 2, d), "k3": (d - 0.5, 0.5)}
    expected |= {f"{kind}+": (expected[kind][0], d) for kind in ("k1", "abs", "k3")}
    assert set(expected) == set(kl.KINDS)
    for kind, (value, slope) in expected.items():
        estimate_T = kl.estimate(logp_T, logp_T.detach() - d, kind=kind)
        assert estimate_T.item() == pytest.approx(value), kind
        assert grad(estimate_T.sum(), logp_T).item() == pytest.approx(slope), kind


def test_estimators_meet_the_exact_kl_on_a_policy_that_can_be_summed() -> None:
    """k1 and k3 average to KL(p || q); k2's and the straight-through gradients average to its gradient; the corrected
    k3 does so for tokens that another policy sampled."""
    logits_V = torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64, requires_grad=True)
    ref_V = torch.tensor([0.1, 0.4, -0.2], dtype=torch.float64).log_softmax(0)
    old_V = torch.tensor([0.0, 0.7, 0.2], dtype=torch.float64).log_softmax(0)
    logp_V = logits_V.log_softmax(0)
    exact = (logp_V.exp() * (logp_V - ref_V)).sum()
    slope_V = torch.autograd.grad(exact, logits_V, retain_graph=True)[0]
    for kind in ("k1", "k3", "k1+", "k3+"):
        mean = (logp_V.detach().exp() * kl.estimate(logp_V, ref_V, kind=kind)).sum()
        assert mean.item() == pytest.approx(exact.item())
    for kind in ("k2", "k1+", "k3+", "abs+"):
        mean = (logp_V.detach().exp() * kl.estimate(logp_V, ref_V, kind=kind)).sum()
        torch.testing.assert_close(torch.autograd.grad(mean, logits_V, retain_graph=True)[0], slope_V)
    corrected = (old_V.exp() * kl.estimate(logp_V, ref_V, ratio_T=(logp_V - old_V).exp())).sum()
    assert corrected.item() == pytest.approx(exact.item())
    torch.testing.assert_close(torch.autograd.grad(corrected, logits_V)[0], slope_V)


def test_entropy_bonus() -> None:
    entropy_T = torch.tensor([1.0, 2.0, math.nan], requires_grad=True)
    mask_T = torch.tensor([True, True, False])
    out = entropy.bonus(entropy_T, mask_T, coef=0.1, tokens=4)
    assert out.loss.item() == pytest.approx(-0.1 * 3 / 4) and out.sums["entropy"].item() == 0.75
    assert grad(out.loss, entropy_T).tolist() == pytest.approx([-0.025, -0.025, 0])
    assert entropy.bonus(entropy_T, ~mask_T & False, coef=0.1).loss.item() == 0
    with pytest.raises(ValueError, match="train nothing"):
        entropy.bonus(entropy_T.detach(), mask_T, coef=0.1)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.25, 0.5, 1.0])
def test_top_entropy_is_a_quantile_of_trained_tokens(fraction: float) -> None:
    entropy_T = torch.tensor([0.3, 9.0, 0.1, 0.8, 0.5, math.nan, 0.5])
    mask_T = torch.tensor([1, 0, 1, 1, 1, 0, 1]).bool()
    at_least = entropy.threshold(entropy_T, mask_T, fraction=fraction)
    assert at_least.item() == pytest.approx(torch.quantile(entropy_T[mask_T], 1 - fraction).item())
    kept_T = entropy.top(entropy_T, mask_T, fraction=fraction)
    assert torch.equal(kept_T, mask_T & (entropy_T >= at_least))
    halves = [entropy.top(entropy_T[part], mask_T[part], at_least=at_least) for part in (slice(0, 3), slice(3, 7))]
    assert torch.equal(torch.cat(halves), kept_T)


def test_top_entropy_of_nothing_is_nothing() -> None:
    for T in (0, 3):
        none_T = torch.zeros(T).bool()
        assert not entropy.top(torch.zeros(T), none_T, fraction=0.5).any()
    with pytest.raises(ValueError, match="one of fraction and at_least"):
        entropy.top(torch.zeros(3), none_T)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without storage cannot be asked for a value, so whatever would wait for a device fails on them."""
    entropy_T, mask_T = torch.zeros(5, device="meta", requires_grad=True), torch.zeros(5, device="meta").bool()
    assert entropy.top(entropy_T, mask_T, fraction=0.2).shape == (5,)
    assert entropy.bonus(entropy_T, mask_T, coef=0.1).loss.shape == ()
    assert all(kl.estimate(entropy_T, entropy_T, kind=kind).shape == (5,) for kind in kl.KINDS)
