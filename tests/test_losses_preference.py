"""KTO, BCO, ORPO, CPO, SimPO and reward losses by hand, by identities, under splits (oracles: ``oracles_dpo.ROWS``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import oracles_dpo as oracles
import pytest
import torch
from torch import Tensor, tensor

from ft.losses.pairs import dpo
from ft.losses.preference import bco, cpo, density_ratio, kto, kto_kl, orpo, simpo
from ft.losses.reduce import check_number, keep, masked_sum, mean_share, segment_sum, share
from ft.losses.reward import bradley_terry, stepwise
from ft.types import LossOutput

LABEL_S = tensor([True, False, True, True, False])
WEIGHT_S = tensor([3.0, 0.5, 3.0, 3.0, 2.0])
STEP = (3, 2)  # desirable and undesirable in LABEL_S
NAN = float("nan")


def logps(n: int = 2, low: float = -5.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [low * torch.rand(5, generator=generator, dtype=torch.float64) - 0.05 for _ in range(n)]


# What each loss is called with, for rows s of the five: (differentiated tensors, call on a slice of them).
CALLS: dict[str, Callable[[slice, Tensor, Tensor, Any], LossOutput]] = {
    "kto": lambda s, x, y, n: kto(x, y.detach(), LABEL_S[s], kl=0.4, desirable=1.3, labels=STEP, units=n),
    "apo_zero_unpaired": lambda s, x, y, n: kto(
        x, y.detach(), LABEL_S[s], kind="apo_zero_unpaired", labels=STEP, units=n
    ),
    "bco": lambda s, x, y, n: bco(x, y.detach(), LABEL_S[s], delta=0.2, weight_S=WEIGHT_S[s], labels=STEP, units=n),
    "orpo": lambda s, x, y, n: orpo(x, y, sft_P=x * 3, tokens=15.0, units=n),
    "cpo": lambda s, x, y, n: cpo(x, y, label_smoothing=0.1, tokens=15.0, units=n),
    "cpo hinge": lambda s, x, y, n: cpo(x, y, kind="hinge", tokens=15.0, units=n),
    "cpo ipo": lambda s, x, y, n: cpo(x, y, kind="ipo", lengths=(WEIGHT_S[s], WEIGHT_S[s]), sft=0, units=n),
    "simpo": lambda s, x, y, n: simpo(x, y, label_smoothing=0.1, units=n),
    "alphapo": lambda s, x, y, n: simpo(x, y, alpha=-0.5, units=n),
    "bradley_terry": lambda s, x, y, n: bradley_terry(x, y, margin=WEIGHT_S[s], centring=0.1, units=n),
    "stepwise": lambda s, x, y, n: stepwise(torch.stack([x, y], 1), LABEL_S[s].long(), units=n),
    "stepwise soft": lambda s, x, y, n: stepwise(x - y, LABEL_S[s] * 0.7, units=n),
}
WHOLE = slice(0, 5)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str) -> None:
    x, y = (t.requires_grad_() for t in logps())
    differentiated = (x,) if name in ("kto", "apo_zero_unpaired", "bco") else (x, y)
    call = lambda *t: CALLS[name](WHOLE, t[0], t[1] if len(t) > 1 else y, None).loss  # noqa: E731
    assert torch.autograd.gradcheck(call, differentiated)


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 1, 1, 4, 5)])
@pytest.mark.parametrize("name", CALLS)
def test_loss_gradient_and_metrics_are_the_same_however_a_step_is_split(name: str, cuts: tuple[int, ...]) -> None:
    whole, split = ([t.clone().requires_grad_() for t in logps()] for _ in range(2))
    expected = CALLS[name](WHOLE, whole[0], whole[1], None)
    expected.loss.backward()
    parts = []
    for a, b in pairwise(cuts):
        parts.append(CALLS[name](slice(a, b), split[0][a:b], split[1][a:b], tensor(5.0)))
        parts[-1].loss.backward()
    torch.testing.assert_close(torch.stack([p.loss for p in parts]).sum(), expected.loss)
    for x, y in zip(split, whole, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    for key, value in expected.sums.items():
        torch.testing.assert_close(torch.stack([p.sums[key] for p in parts]).sum(), value, msg=key)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_gives_zero_with_a_graph(name: str) -> None:
    x, y = (torch.zeros(0, requires_grad=True) for _ in range(2))
    out = CALLS[name](slice(0, 0), x, y, None)
    out.loss.backward()
    assert out.loss.item() == 0 and all(value.item() == 0 for value in out.sums.values())


@pytest.mark.parametrize("name", CALLS)
def test_nothing_asks_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LABEL_S", LABEL_S.to("meta"))
    monkeypatch.setitem(globals(), "WEIGHT_S", WEIGHT_S.to("meta"))
    assert CALLS[name](WHOLE, torch.empty(5, device="meta"), torch.empty(5, device="meta"), None).loss.is_meta


@pytest.mark.parametrize("name", CALLS)
def test_reduced_in_float32_whatever_comes(name: str) -> None:
    low = [t.bfloat16() for t in logps()]
    loss = CALLS[name](WHOLE, low[0], low[1], None).loss
    if name not in ("orpo", "stepwise soft"):  # there the call itself computes in bfloat16 before the loss
        assert loss.item() == pytest.approx(
            CALLS[name](WHOLE, low[0].double(), low[1].double(), None).loss.item(), 1e-6
        )
    assert loss.dtype == torch.float32


# --- kto and bco ----------------------------------------------------------------------------------------------------


def test_kto_by_hand() -> None:
    # beta 0.5, kl 1: desirable x = 3: 1 - s(1) = 0.268941; undesirable x = 3: 1 - s(-1) = 0.731059, weighing 2
    out = kto(tensor([0.0, 0.0]), tensor([-3.0, -3.0]), tensor([True, False]), kl=1.0, beta=0.5, undesirable=2.0)
    assert out.loss.item() == pytest.approx((0.268941 + 2 * 0.731059) / 2, abs=1e-6)
    assert {k: v.item() for k, v in out.sums.items()} == pytest.approx(
        {"rewards/chosen": 1.5, "rewards/rejected": 1.5, "rewards/margins": 0.0, "logps/chosen": 0.0,
         "logps/rejected": 0.0, "kl": 1.0}
    )  # fmt: skip


def test_kto_without_kl_is_apo_zero_unpaired_and_half_of_apo_zero() -> None:
    x, ref = logps()
    zero = kto(x, ref, LABEL_S, kl=0.0).loss
    assert zero == kto(x, ref, LABEL_S, kind="apo_zero_unpaired").loss
    pairs = dpo(x[:2], x[2:4], ref[:2], ref[2:4], kind="apo_zero").loss
    unpaired = kto(x[:4], ref[:4], tensor([True, True, False, False]), kind="apo_zero_unpaired").loss
    assert 2 * unpaired.item() == pytest.approx(pairs.item())


def test_kto_holds_kl_at_zero_or_more_and_stops_it() -> None:
    x, ref = logps()
    kl = tensor(0.5, requires_grad=True)
    kto(x.requires_grad_(), ref, LABEL_S, kl=kl).loss.backward()
    assert kl.grad is None
    assert kto(x, ref, LABEL_S, kl=-3.0).loss == kto(x, ref, LABEL_S, kl=0.0).loss


def test_kto_kl_is_a_share_and_is_held_only_once_summed() -> None:
    logp_S, ref_S = tensor([2.0, 0.0, -6.0]), torch.zeros(3)
    parts = [kto_kl(logp_S[s], ref_S[s], units=3) for s in (slice(0, 1), slice(1, 3))]
    assert (parts[0] + parts[1]).item() == pytest.approx(kto_kl(logp_S, ref_S).item()) == pytest.approx(-4 / 3)


def test_a_nan_row_is_seen_where_trl_averages_it_away() -> None:
    """TRL's nanmean drops the row and goes on; a NaN log-prob is a broken model, and the loop has to hear of it."""
    logp_BL = oracles.leaf().detach()
    logp_BL[0, 3] = NAN
    assert oracles.trl_kto(logp_BL, "apo_zero_unpaired").isfinite()
    assert oracles.our_unpaired(kto, logp_BL, kind="apo_zero_unpaired").isnan()


def test_the_kl_of_ranks_is_one_mean_where_trl_takes_the_mean_of_means() -> None:
    """With 4 rows on one rank and 1 on the other, TRL weighs the single row like the four."""
    logp_S, ref_S = tensor([1.0, 1.0, 1.0, 1.0, 6.0]), torch.zeros(5)
    theirs = (logp_S[:4].mean() + logp_S[4:].mean()) / 2
    ours = kto_kl(logp_S[:4], ref_S[:4], units=5) + kto_kl(logp_S[4:], ref_S[4:], units=5)
    assert (theirs.item(), ours.item()) == (3.5, 2.0)


def test_bco_by_hand() -> None:
    # rewards 1 and 2, delta 1.5: -log s(-0.5) = 0.974077; -log s(1.5 - 2) = 0.974077, weighing 4
    out = bco(tensor([10.0, 20.0]), torch.zeros(2), tensor([True, False]), delta=1.5, weight_S=tensor([9.0, 4.0]))
    assert out.loss.item() == pytest.approx(5 * 0.974077 / 2, abs=1e-5)
    assert out.sums["rewards/mean"].item() == 1.5


def test_density_ratio() -> None:
    assert density_ratio(tensor([0.0, 0.5, 0.8, 1.0])).tolist() == pytest.approx([0.5, 1.0, 4.0, 10.0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "kl: expected"),
        ({"kl": 0.0, "kind": "apo_zero_unpaired"}, "kl: expected"),
        ({"kl": torch.zeros(5)}, "0-d"),
        ({"kl": 0.0, "beta": -1.0}, "beta"),
        ({"kl": 0.0, "undesirable": -1.0}, "undesirable"),
        ({"kl": 0.0, "kind": "bco"}, "kind"),
    ],
)
def test_kto_refuses(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kto(logps()[0], logps()[1], LABEL_S, **given)


def test_labels_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="expected bool"):
        bco(logps()[0], logps()[1], tensor([1, -1, 1, 1, -1]), delta=0.0)


# --- without a reference --------------------------------------------------------------------------------------------


def test_orpo_by_hand() -> None:
    # p = 1/2 and 1/4: odds 1 and 1/3, log odds ratio log 3, -log s(log 3) = log(4/3)
    out = orpo(tensor([math.log(0.5)]), tensor([math.log(0.25)]), beta=0.5, sft_P=tensor([-6.0]), tokens=3)
    assert out.loss.item() == pytest.approx(2.0 + 0.5 * math.log(4 / 3), abs=1e-6)
    assert out.sums["log_odds"].item() == pytest.approx(math.log(3), abs=1e-6)
    assert out.sums["nll"].item() == 2.0


def test_orpo_of_a_certain_answer_is_finite_where_trl_has_none() -> None:
    """A mean log-prob of 0 has infinite odds: TRL's loss is 0 for a certain chosen answer and infinite or NaN for a
    certain rejected one, with a NaN gradient. Ours takes the answer as certain to 1e-7."""
    zero, other = torch.zeros(1), tensor([-1.0])
    for chosen_P, rejected_P in ((zero, other), (other, zero), (zero, zero)):
        chosen_P, rejected_P = chosen_P.clone().requires_grad_(), rejected_P.clone().requires_grad_()
        theirs = oracles.trl_orpo(chosen_P, rejected_P)
        theirs.backward()
        assert chosen_P.grad is not None and rejected_P.grad is not None
        assert not all(t.isfinite().all() for t in (theirs, chosen_P.grad, rejected_P.grad))
        chosen_P, rejected_P = chosen_P.detach().requires_grad_(), rejected_P.detach().requires_grad_()
        ours = orpo(chosen_P, rejected_P).loss
        ours.backward()
        assert chosen_P.grad is not None and rejected_P.grad is not None
        assert all(t.isfinite().all() for t in (ours, chosen_P.grad, rejected_P.grad))


def test_simpo_by_hand_and_gamma_is_the_margin_itself() -> None:
    # 2 * (-1 + 2) - 1.5 = 0.5
    out = simpo(tensor([-1.0]), tensor([-2.0]), beta=2.0, gamma=1.5)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.5)), abs=1e-6)
    assert out.sums["rewards/margins"].item() == 2.0 and out.sums["rewards/accuracies"].item() == 1.0


def test_alphapo_tends_to_simpo_and_stays_finite() -> None:
    w, l = logps()
    assert simpo(w, l, alpha=1e-7).loss.item() == pytest.approx(simpo(w, l).loss.item(), abs=1e-6)
    far_P = tensor([-1e4], requires_grad=True)
    loss = simpo(far_P, tensor([-1.0]), alpha=0.5).loss
    loss.backward()
    assert loss.isfinite() and far_P.grad is not None and far_P.grad.isfinite()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda w, l: cpo(w, l), "likelihood term"),
        (lambda w, l: cpo(w, l, sft=0.0, tokens=3), "likelihood term"),
        (lambda w, l: orpo(w, l, sft_P=w), "likelihood term"),
        (lambda w, l: cpo(w, l, kind="ipo", sft=0.0), "lengths"),
        (lambda w, l: cpo(w, l, kind="hinge", sft=0.0, label_smoothing=0.1), "label_smoothing"),
        (lambda w, l: cpo(w, l, kind="simpo"), "kind"),
        (lambda w, l: simpo(w, l, beta=0.0), "beta"),
        (lambda w, l: simpo(w, l, label_smoothing=-0.1), "label_smoothing"),
        (lambda w, l: simpo(w, l[:2]), "one length"),
        (lambda w, l: bradley_terry(w, l, centring=-1.0), "centring"),
        (lambda w, l: bradley_terry(w, l, margin=l[:1]), "one length"),
        (lambda w, l: stepwise(w, LABEL_S[:2]), "labels"),
        (lambda w, l: stepwise(torch.stack([w, l], 1), w), "integer labels"),
    ],
)
def test_what_cannot_be_honoured_is_refused(call: Callable[[Tensor, Tensor], LossOutput], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(*logps())


# --- rewards --------------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    out = bradley_terry(tensor([2.0, 0.0]), tensor([1.0, 0.0]), margin=tensor([1.0, 0.0]), centring=0.5)
    assert out.loss.item() == pytest.approx(math.log(2) + 0.5 * (9 + 0) / 2, abs=1e-6)
    assert out.sums["rewards/accuracies"].item() == 0.5  # a tie is not right


def test_stepwise_looks_only_where_a_step_is_judged() -> None:
    logits_NC = tensor([[1.0, 3.0], [NAN, NAN], [2.0, 0.0]], requires_grad=True)
    label_N = tensor([1, -100, 1])
    out = stepwise(logits_NC, label_N, mask_N=label_N != -100)
    out.loss.backward()
    # log(1 + e^-2) = 0.126928 and 2.126928
    assert out.loss.item() == pytest.approx((0.126928 + 2.126928) / 2, abs=1e-6)
    assert out.sums["accuracy"].item() == 0.5
    assert logits_NC.grad is not None and logits_NC.grad[1].tolist() == [0, 0] and logits_NC.grad.isfinite().all()


def test_stepwise_without_a_judged_step_is_zero_where_torch_has_nan() -> None:
    """A process-reward trainer's cross-entropy of labels that are all -100 is 0 / 0."""
    logits_NC, label_N = torch.randn(3, 2, requires_grad=True), torch.full((3,), -100)
    assert torch.nn.functional.cross_entropy(logits_NC, label_N).isnan()
    out = stepwise(logits_NC, label_N, mask_N=label_N != -100)
    out.loss.backward()
    assert out.loss.item() == 0


def test_one_score_is_two_classes() -> None:
    x, y = logps()
    two = stepwise(torch.stack([y, x], 1), LABEL_S.long())
    one = stepwise(x - y, LABEL_S)
    assert one.loss.item() == pytest.approx(two.loss.item())
    assert one.sums["accuracy"] == two.sums["accuracy"]


# --- the shared helpers ---------------------------------------------------------------------------------------------


def test_share_of_counts_as_number_and_as_tensor() -> None:
    total = tensor(6.0)
    assert share(total, 4) == share(total, tensor(4.0, dtype=torch.float64)) == 1.5
    assert share(total, tensor(4, dtype=torch.int64)).dtype == torch.float32
    assert share(total, 0) == share(total, tensor(0)) == 6.0
    assert mean_share(tensor([1.0, 2.0])).item() == 1.5


def test_masked_sum_does_not_see_what_is_masked() -> None:
    x_N = tensor([1.0, NAN, 2.0], requires_grad=True)
    mask_N = tensor([True, False, True])
    masked_sum(x_N, mask_N).backward()
    assert x_N.grad is not None and x_N.grad.tolist() == [1, 0, 1]
    assert keep(x_N.detach().half(), mask_N).tolist() == [1, 0, 2]
    assert keep(x_N.detach().half(), mask_N).dtype == torch.float32


def test_segment_sum_drops_filler() -> None:
    assert segment_sum(tensor([1.0, 2, 4, NAN]), tensor([0, 1, 1, 3]), 3).tolist() == [1, 6, 0]


def test_a_number_that_is_none_is_refused() -> None:
    for value in (NAN, -1.0, 0.0):
        with pytest.raises(ValueError, match="expected a number in"):
            check_number("x", value, 0.0, open_low=True)
