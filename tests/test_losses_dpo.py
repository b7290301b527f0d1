"""DPO's kinds against TRL, Liger and numbers worked by hand; how a step may be split; where we differ on purpose."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import oracles_dpo as oracles
import pytest
import torch
from torch import Tensor, tensor

from ft.losses.pairs import DIVERGENCES, KINDS, dpo, ld_sums, wpo_weights
from ft.losses.preference import cpo

LOG2 = math.log(2)
SPLIT = [kind for kind in KINDS if "aot" not in kind]
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
FAR = [(k, "reverse_kl") for k in KINDS] + [(k, d) for k in DIVERGENT for d in DIVERGENCES[1:]]


def options(kind: str) -> dict[str, Any]:
    return {"kind": kind, "beta": 0.3, "label_smoothing": 0.1 if kind in ("exo_pair", "robust") else 0.0}


def hand(c: float, l: float, **given: Any) -> float:
    """The loss of one pair whose log-ratios are c and l."""
    return dpo(tensor([c - 3.0]), tensor([l - 2.0]), tensor([-3.0]), tensor([-2.0]), **given).loss.item()


# --- oracles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", oracles.ROWS, ids=lambda row: row.name)
def test_value_and_gradient_are_the_oracle_s(row: oracles.Row) -> None:
    assert oracles.difference(row) <= (1e-6 if row.dtype == torch.float32 else 1e-7)


def test_the_table_says_for_each_kind_and_divergence_whom_it_was_compared_with() -> None:
    options = " ".join(row.option for row in oracles.ROWS if row.loss == "dpo")
    assert [name for name in (*KINDS, *DIVERGENCES[1:]) if name not in options] == []


def test_metrics_are_those_of_trl() -> None:
    logp_BL = oracles.leaf()
    ours, theirs = oracles.our_dpo(logp_BL).sums, oracles.trl_dpo(logp_BL, {"sigmoid": 1.0})[1]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                 "logps/rejected"):  # fmt: skip
        assert ours[name].item() == pytest.approx(theirs[name], abs=1e-7), name  # theirs are float32
    assert ours["lengths/chosen"].item() == 4.0  # (7 + 3 + 5 + 1 + 4) / 5
    assert not any(value.requires_grad for value in ours.values())


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sigmoid", LOG2),
        ("hinge", 1.0),
        ("nca_pair", 2 * LOG2),
        ("bco_pair", 2 * LOG2),
        ("sppo_hard", 2 * 5.0**2),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", 0.5 * LOG2 + 0.5),
        ("aot", LOG2),
        ("aot_unpaired", LOG2),
        ("robust", LOG2),
    ],
)
def test_a_policy_that_is_its_reference(kind: str, expected: float) -> None:
    assert hand(0.0, 0.0, kind=kind) == pytest.approx(expected, rel=1e-6)


def test_numbers_worked_by_hand() -> None:
    # beta 0.5, c = 2, l = -2: z = 2, s(2) = 0.880797, -log s(2) = 0.126928, -log s(-2) = 2.126928
    assert hand(2, -2, beta=0.5) == pytest.approx(0.126928, abs=1e-6)
    assert hand(2, -2, beta=0.5, label_smoothing=0.25) == pytest.approx(0.75 * 0.126928 + 0.25 * 2.126928, abs=1e-6)
    assert hand(2, -2, beta=0.5, kind="robust", label_smoothing=0.25) == pytest.approx(
        (0.75 * 0.126928 - 0.25 * 2.126928) / 0.5, abs=1e-6
    )
    assert hand(2, -2, beta=0.25, kind="hinge") == 0.0
    lengths = (tensor([4]), tensor([2]))  # 2/4 - (-2)/2 = 1.5; 1.5 - 1/(2 * 0.5) = 0.5
    assert hand(2, -2, beta=0.5, kind="ipo", lengths=lengths) == pytest.approx(0.25)
    assert hand(2, -2, beta=2.0, kind="sppo_hard") == pytest.approx(2 * 1.75**2)
    # scores: 1 - exp(-2) = 0.864665 and 1 - exp(2) = -6.389056; hinge at beta 0.1 is 1 - 0.7253721
    assert hand(2, -2, kind="hinge", divergence="forward_kl") == pytest.approx(0.2746279, abs=1e-6)
    assert hand(2, -2, kind="hinge", divergence="alpha", alpha=2.0) == pytest.approx(
        max(0.0, 1 - 0.1 * (math.e**2 - math.e**-2)), abs=1e-6
    )


def test_a_margin_by_hand() -> None:
    # beta 0.5, c = 2, l = -2: z = 2, less a margin of 1.5: -log s(0.5) = 0.474077, -log s(-0.5) = 0.974077
    margin = tensor([1.5])
    assert hand(2, -2, beta=0.5, margin=margin) == pytest.approx(0.474077, abs=1e-6)
    smooth = hand(2, -2, beta=0.5, margin=margin, label_smoothing=0.25)
    assert smooth == pytest.approx(0.75 * 0.474077 + 0.25 * 0.974077, abs=1e-6)
    robust = hand(2, -2, beta=0.5, margin=margin, label_smoothing=0.25, kind="robust")
    assert robust == pytest.approx((0.75 * 0.474077 - 0.25 * 0.974077) / 0.5, abs=1e-6)
    assert hand(2, -2, beta=0.5, margin=margin, kind="hinge") == 0.5  # 1 - (2 - 1.5)
    lengths = (tensor([4]), tensor([2]))  # 0.5 (2/4 + 2/2) - 1.5 = -0.75
    norm = hand(2, -2, beta=0.5, margin=margin, kind="sigmoid_norm", lengths=lengths)
    assert norm == pytest.approx(math.log1p(math.exp(0.75)), abs=1e-6)


def test_a_margin_is_stopped_and_leaves_the_metrics_alone() -> None:
    margin = torch.ones(3, requires_grad=True)
    chosen_P, *rest = pairs()
    out = dpo(chosen_P.requires_grad_(), *rest, margin=margin)
    out.loss.backward()
    assert margin.grad is None and chosen_P.grad is not None
    assert out.sums["rewards/margins"] == dpo(chosen_P, *rest).sums["rewards/margins"]


def test_a_mixture_is_the_weighted_sum_of_its_kinds() -> None:
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    logp_BL = oracles.leaf()
    whole = oracles.our_dpo(logp_BL, kind=mixture)
    parts = {kind: oracles.our_dpo(logp_BL, kind=kind).loss for kind in mixture}
    assert whole.loss.item() == pytest.approx(sum(w * parts[k].item() for k, w in mixture.items()))
    assert whole.sums["loss/bco_pair"].item() == pytest.approx(parts["bco_pair"].item())
    assert parts["sft"].item() == pytest.approx(-(logp_BL[:5].sum() / 20).item())  # 20 trained tokens


def test_alpha_tends_to_reverse_kl() -> None:
    logp_BL = oracles.leaf()
    near = oracles.our_dpo(logp_BL, divergence="alpha", alpha=1 + 1e-7).loss
    assert near.item() == pytest.approx(oracles.our_dpo(logp_BL).loss.item(), abs=1e-6)
    assert oracles.our_dpo(logp_BL, divergence="alpha", alpha=1.0).loss == oracles.our_dpo(logp_BL).loss


def test_ld_sums_by_hand() -> None:
    logp_T = tensor([-9.0, -1, -2, -3, -9, -5, float("nan")], requires_grad=True)
    mask_T = tensor([False, True, True, True, False, True, False])
    seq_T = tensor([0, 0, 0, 0, 1, 1, 2])  # 3 trained tokens, 1, and filler
    sums_S = ld_sums(logp_T, mask_T, seq_T, tensor([1, 0]), alpha=0.5)
    assert sums_S.tolist() == [-1 - 0.5 * 5, -5]
    sums_S.sum().backward()
    assert logp_T.grad is not None and logp_T.grad.tolist() == [0, 1, 0.5, 0.5, 0, 1, 0]


def test_wpo_weights_by_hand() -> None:
    logp_T, square_T = tensor([-1.0, -2, -7, float("nan")]), tensor([-2.0, -2, -7, 0])
    weight_S = wpo_weights(logp_T, square_T, tensor([True, True, False, False]), tensor([0, 0, 1, 2]), 2)
    assert weight_S.tolist() == pytest.approx([math.exp(0.5), 1.0])


# --- gradients and splits -------------------------------------------------------------------------------------------


def pairs(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [-5 * torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    chosen_P, rejected_P, *ref = pairs()
    lengths = (tensor([3, 1, 4]), tensor([1, 5, 9]))
    chosen_P, rejected_P = chosen_P.requires_grad_(), rejected_P.requires_grad_()
    call = lambda c, r: dpo(c, r, *ref, lengths=lengths, **options(kind)).loss  # noqa: E731
    assert torch.autograd.gradcheck(call, (chosen_P, rejected_P) if kind != "sft" else (chosen_P, rejected_P.detach()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_divergences(divergence: str) -> None:
    chosen_P, rejected_P, *ref = pairs()
    given = {"divergence": divergence, "alpha": 0.5 if divergence == "alpha" else None}
    call = lambda c, r: dpo(c, r, *ref, **given).loss  # noqa: E731
    assert torch.autograd.gradcheck(call, (chosen_P.requires_grad_(), rejected_P.requires_grad_()))


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 1, 1, 4, 5), (0, 5, 5)])
@pytest.mark.parametrize("kind", SPLIT)
def test_loss_gradient_and_metrics_are_the_same_however_a_step_is_split(kind: str, cuts: tuple[int, ...]) -> None:
    lengths = (tensor([7, 3, 5, 1, 4]), tensor([2, 6, 5, 7, 3]))
    whole, split = ([x.clone().requires_grad_(i < 2) for i, x in enumerate(pairs(5))] for _ in range(2))
    tokens = {"tokens": tensor(20.0)} if kind == "sft" else {}
    expected = dpo(*whole, lengths=lengths, **options(kind))
    expected.loss.backward()
    parts = []
    for a, b in pairwise(cuts):
        some = (lengths[0][a:b], lengths[1][a:b])
        parts.append(dpo(*(x[a:b] for x in split), lengths=some, units=tensor(5.0), **tokens, **options(kind)))
        parts[-1].loss.backward()
    torch.testing.assert_close(torch.stack([p.loss for p in parts]).sum(), expected.loss)
    for x, y in zip(split[:2], whole[:2], strict=True):
        assert (x.grad is None) == (y.grad is None)
        torch.testing.assert_close(x.grad, y.grad)
    for name, value in expected.sums.items():
        torch.testing.assert_close(torch.stack([p.sums[name] for p in parts]).sum(), value, msg=name)


def test_aot_alone_depends_on_the_split() -> None:
    chosen_P, rejected_P, *ref = pairs(5)
    whole = dpo(chosen_P, rejected_P, *ref, kind="aot", beta=1.0).loss
    parts = [
        dpo(*(x[s] for x in (chosen_P, rejected_P, *ref)), kind="aot", beta=1.0, units=5).loss
        for s in (slice(0, 2), slice(2, 5))
    ]
    assert abs(whole - sum(parts)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs_give_zero_with_a_graph(kind: str) -> None:
    none = [torch.zeros(0, requires_grad=i < 2) for i in range(4)]
    out = dpo(*none, lengths=(torch.zeros(0), torch.zeros(0)), **options(kind))
    out.loss.backward()
    assert out.loss.item() == 0 and all(value.item() == 0 for value in out.sums.values())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_asks_the_device(kind: str) -> None:
    meta = [torch.empty(3, device="meta") for _ in range(6)]
    weight = {} if kind in ("sft", "aot", "aot_unpaired") else {"weight_P": meta[0]}
    assert dpo(*meta[:4], lengths=(meta[4], meta[5]), **weight, **options(kind)).loss.is_meta


@pytest.mark.parametrize(("kind", "divergence"), FAR)
def test_far_log_ratios_stay_finite(kind: str, divergence: str) -> None:
    far_P = tensor([-1e4, 1e4, 0.0, -1e4])
    chosen_P, rejected_P = far_P.clone().requires_grad_(), far_P.roll(1).requires_grad_()
    given = {"divergence": divergence, "alpha": 0.5 if divergence == "alpha" else None} | options(kind)
    loss = dpo(
        chosen_P, rejected_P, torch.zeros(4), torch.zeros(4), lengths=(torch.ones(4), torch.ones(4)), **given
    ).loss
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (chosen_P, rejected_P))


def test_reduced_in_float32_whatever_comes() -> None:
    logps = [x.bfloat16() for x in pairs(5)]
    out = dpo(*logps)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(dpo(*(x.double() for x in logps)).loss.item(), abs=1e-6)


def test_the_reference_the_weights_and_the_lengths_are_stopped() -> None:
    given = [torch.ones(2, requires_grad=True) for _ in range(7)]
    dpo(*given[:4], weight_P=given[4], lengths=(given[5], given[6]), kind="ipo").loss.backward()
    assert [x.grad is not None for x in given] == [True, True, False, False, False, False, False]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "dpo"}, "kind: expected one of sigmoid"),
        ({"kind": {}}, "at least one kind"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "got hinge"),
        ({"kind": {"sigmoid": 1.0, "bco_pair": 1.0}, "label_smoothing": 0.1}, "got bco_pair"),
        ({"kind": "exo_pair"}, "label_smoothing > 0"),
        ({"kind": "ipo"}, "lengths="),
        ({"kind": "sigmoid_norm"}, "lengths="),
        ({"kind": "nca_pair", "divergence": "js"}, "got nca_pair"),
        ({"divergence": "kl"}, "divergence: expected one of"),
        ({"divergence": "alpha"}, "alpha goes with"),
        ({"alpha": 0.5}, "alpha goes with"),
        ({"tau": 0.1}, "only with discopop"),
        ({"kind": "discopop", "tau": 2.0}, "tau"),
        ({"kind": "aot", "weight_P": torch.ones(3)}, "got aot"),
        ({"kind": "ipo", "lengths": (torch.ones(3), torch.ones(3)), "margin": torch.ones(3)}, "got ipo"),
        ({"kind": {"sigmoid": 1.0, "exo_pair": 1.0}, "label_smoothing": 0.1, "margin": torch.ones(3)}, "got exo_pair"),
        ({"kind": "sft", "tokens": 3, "margin": torch.ones(3)}, "got sft"),
        ({"margin": torch.ones(2)}, "one length"),
        ({"kind": "sft"}, "tokens="),
        ({"tokens": 3}, "only with kind sft"),
        ({"weight_P": torch.ones(2)}, "one length"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dpo(*pairs(3), **given)


def test_tensors_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        dpo(torch.zeros(3), torch.zeros(3), torch.zeros(1), torch.zeros(3))
    with pytest.raises(ValueError, match="1-D"):
        dpo(*(torch.zeros(3, 1) for _ in range(4)))


# --- where we differ on purpose -------------------------------------------------------------------------------------


def test_label_smoothing_of_sigmoid_is_cdpo_where_trl_ignores_it() -> None:
    """TRL 1.16 computes sigmoid without its label_smoothing; whoever asks for conservative DPO trains plain DPO."""
    logp_BL = oracles.leaf()
    plain, asked = (oracles.trl_dpo(logp_BL, {"sigmoid": 1.0}, label_smoothing=e)[0].item() for e in (0.0, 0.1))
    assert plain == asked
    ours = oracles.our_dpo(logp_BL, label_smoothing=0.1)  # -log s(-z) = z - log s(z), so that e adds e times the margin
    assert ours.loss.item() == pytest.approx(plain + 0.1 * ours.sums["rewards/margins"].item(), abs=1e-9)
    assert abs(ours.loss.item() - plain) > 1e-3
    # cDPO is (1 - e) of the loss and e of the loss with the answers exchanged
    chosen_P, rejected_P, ref_w, ref_l = pairs()
    exchanged = dpo(rejected_P, chosen_P, ref_l, ref_w).loss
    smooth = dpo(chosen_P, rejected_P, ref_w, ref_l, label_smoothing=0.1).loss
    assert smooth.item() == pytest.approx((0.9 * dpo(chosen_P, rejected_P, ref_w, ref_l).loss + 0.1 * exchanged).item())


def test_discopop_of_a_far_pair_is_finite_where_trl_has_nan() -> None:
    """TRL multiplies exp(-z) = inf by s(z / tau) = 0; the product is one exponential, and 0."""
    logp_BL = oracles.leaf(torch.float32)
    far_BL = (
        logp_BL.detach() + oracles.mask_BL() * torch.where(torch.arange(10) < 5, -300.0, 0.0)[:, None]
    ).requires_grad_()
    assert oracles.trl_dpo(far_BL, {"discopop": 1.0}, beta=1.0)[0].isnan()
    ours = oracles.our_dpo(far_BL, kind="discopop", beta=1.0).loss
    sigmoid = oracles.our_dpo(far_BL, beta=1.0).loss
    assert ours.item() == pytest.approx(sigmoid.item())  # with the gate shut, what is left is the logistic part


def test_forward_kl_of_a_far_pair_is_finite_where_trl_overflows() -> None:
    """exp(-c) of a chosen answer that lost 300 nats is infinite in float32; ours is cut at exp(40)."""
    logp_BL = oracles.leaf(torch.float32)
    far_BL = (logp_BL.detach() - 300 * oracles.mask_BL()).requires_grad_()
    assert not oracles.trl_dpo(far_BL, {"sigmoid": 1.0}, f="forward_kl")[0].isfinite()
    assert oracles.our_dpo(far_BL, divergence="forward_kl").loss.isfinite()


def test_sft_without_a_trained_token_is_zero_where_trl_has_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes the mean of no tokens, which is NaN and spreads; a share of the step's mean is 0 / 1."""
    monkeypatch.setattr(oracles, "LENGTHS_B", oracles.LENGTHS_B * (torch.arange(10) >= 5))
    assert oracles.trl_dpo(oracles.leaf(), {"sft": 1.0})[0].isnan()
    logp_BL = oracles.leaf()
    ours = oracles.our_dpo(logp_BL, kind="sft").loss
    ours.backward()
    assert ours.item() == 0 and logp_BL.grad is not None and logp_BL.grad.count_nonzero() == 0


def test_weights_with_an_sft_term_work_where_trl_raises() -> None:
    """TRL multiplies an expanded tensor in place. Ours weighs the pairs and leaves the likelihood term alone."""
    mixture = {"sigmoid": 1.0, "sft": 1.0}
    with pytest.raises(RuntimeError, match="single memory location"):
        oracles.trl_dpo(oracles.leaf(), mixture, use_weighting=True)
    logp_BL = oracles.leaf()
    apart = oracles.our_wpo(logp_BL).loss + oracles.our_dpo(logp_BL, kind="sft").loss
    assert oracles.our_wpo(logp_BL, kind=mixture).loss.item() == pytest.approx(apart.item())


def test_the_mean_is_the_step_s_where_trl_takes_the_mean_of_means() -> None:
    """TRL averages the local pairs, so a short last micro-batch counts its pairs more."""
    losses = [dpo(*(x[s] for x in pairs(5)), beta=1.0).loss for s in (slice(0, 4), slice(4, 5))]
    whole = dpo(*pairs(5), beta=1.0).loss
    assert abs(sum(losses) / 2 - whole) > 1e-3
    assert ((4 * losses[0] + losses[1]) / 5).item() == pytest.approx(whole.item())


def test_robust_at_a_half_is_refused_where_trl_divides_by_zero() -> None:
    assert not oracles.trl_dpo(oracles.leaf(), {"robust": 1.0}, label_smoothing=0.5)[0].isfinite()
    with pytest.raises(ValueError, match="label_smoothing"):
        oracles.our_dpo(oracles.leaf(), kind="robust", label_smoothing=0.5)


def test_cpo_is_dpo_with_a_uniform_reference() -> None:
    chosen_P, rejected_P, *_ = pairs()
    zero_P = torch.zeros(3)
    assert cpo(chosen_P, rejected_P, sft=0.0).loss == dpo(chosen_P, rejected_P, zero_P, zero_P).loss
