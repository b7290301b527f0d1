"""Policy-gradient losses: against TRL and Liger, by hand, and by identities.

Shapes: T packed tokens, S sequences; B rows, W columns where another system pads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import oracles_grpo as oracle
import pytest
import torch
from torch import Tensor

from ft.losses.clipped import grpo
from ft.losses.policy_gradient import cispo, dppo, gmpo, luspo, reinforce, rloo, sapo, vespo
from ft.types import LossOutput

torch.set_num_threads(1)
SEQ_T = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
MASK_T = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 1]).bool()


def sample(dtype: torch.dtype = torch.float64, drift: float = 0.3, seed: int = 0) -> tuple[Tensor, ...]:
    """logp_T (a leaf), old_logp_T, adv_T, ref_logp_T; one advantage per sequence."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, 10, generator=rng, dtype=torch.float64)
    logp_T = -noise[0].abs() - 0.05
    adv_T = torch.tensor([1.0, -0.5, 0.7, -1.3], dtype=torch.float64)[SEQ_T]
    values = logp_T, logp_T + drift * noise[1], adv_T, logp_T + drift * noise[2]
    return tuple(x.to(dtype).requires_grad_(i == 0) for i, x in enumerate(values))


def _reinforce(logp_T: Tensor, old_T: Tensor, adv_T: Tensor, mask_T: Tensor, **options: Any) -> LossOutput:
    return reinforce(logp_T, adv_T, mask_T, **options)


LOSSES: dict[str, Callable[..., LossOutput]] = {
    "dapo": grpo,
    "grpo": partial(grpo, aggregate="sequence"),
    "dr_grpo": partial(grpo, aggregate="constant", constant=10.0),
    "gspo": partial(grpo, level="sequence", aggregate="sequence"),
    "gspo_token": partial(grpo, level="sequence_token"),
    "dual": partial(grpo, dual_clip=1.25),
    "free": partial(grpo, clip=None),
    "reinforce": _reinforce,
    "rloo": rloo,
    "luspo": luspo,
    "cispo": partial(cispo, cap=1.2),
    "sapo": sapo,
    "gmpo": gmpo,
    "vespo": vespo,
    "dppo": partial(dppo, clip=(0.05, 0.05)),
    "dppo_kl": partial(dppo, divergence="kl", clip=(0.01, 0.01)),
}
STOPPED = ("reinforce", "gspo_token", "cispo", "vespo", "dppo", "dppo_kl")
"""Losses whose gradient is by design not that of their value: numerical differentiation does not apply."""

BY_TOKEN = ("dapo", "gspo_token", "dual", "free", "reinforce", "cispo", "vespo", "dppo", "dppo_kl")
"""Averaged over tokens: they refuse a number of sequences."""

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def grad(output: LossOutput | Tensor, leaf: Tensor) -> Tensor:
    loss = output.loss if isinstance(output, LossOutput) else output
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


@pytest.mark.parametrize("row", oracle.COMPARISONS, ids=lambda r: f"{r.loss}-{r.option}-{r.oracle}".replace(" ", "_"))
def test_value_and_gradient_are_theirs(row: oracle.Comparison) -> None:
    pytest.importorskip("trl" if row.oracle == "TRL" else "liger_kernel")
    assert oracle.worst(row) <= 1e-6


def test_what_is_logged_is_what_trl_logs() -> None:
    pytest.importorskip("trl")
    from trl import GRPOTrainer

    c = oracle.case(drift=0.6)
    trainer = oracle.trl_trainer(c, beta=0.5)
    GRPOTrainer._compute_loss(trainer, None, oracle.trl_inputs(c))
    theirs = {name: values[0] for name, values in trainer._metrics["train"].items()}
    ours = grpo(*c.args, ref_logp_T=c.pack(c.ref_BW), kl_coef=0.5).sums
    assert theirs["clip_ratio/low_mean"] > 0 and theirs["clip_ratio/high_mean"] > 0
    for mine, name in (("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean"), ("kl", "kl")):
        assert ours[mine].item() == pytest.approx(theirs[name], abs=1e-6)


def test_rows_with_nothing_trained_do_not_count_unless_the_caller_counts_them() -> None:
    """TRL and Liger divide by all 4 rows; a row with nothing trained then shrinks the step of the other three."""
    pytest.importorskip("trl")
    c = oracle.case(masked_row=True)
    options: dict[str, Any] = {"seq_T": c.seq_T, "aggregate": "sequence"}
    theirs = oracle.trl(c, loss_type="grpo")
    assert grpo(*c.args, **options).loss.item() == pytest.approx(theirs.item() * 4 / 3, rel=1e-6)
    assert grpo(*c.args, **options, seqs=4).loss.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize(("loss", "theirs"), [(gmpo, oracle.trl_gmpo), (rloo, oracle.trl_rloo)])
def test_an_answer_with_nothing_trained_adds_no_constant(loss: Any, theirs: oracle.Loss) -> None:
    """TRL gives such a row a ratio of 1 and adds -A / 4 = 0.175 to the loss: no gradient, but a false number."""
    pytest.importorskip("trl")
    c = oracle.case(masked_row=True)
    ours = loss(*c.args, seq_T=c.seq_T, seqs=4).loss
    assert (theirs(c) - ours).item() == pytest.approx(0.7 / 4, abs=1e-6)


def test_cispo_refuses_the_cap_that_would_shrink_every_token() -> None:
    """TRL's default epsilon_high of 0.2 is taken as the cap of the ratio: even a ratio of 1 weighs 0.2."""
    pytest.importorskip("trl")
    c = oracle.case()
    on_policy = c._replace(old_BW=c.logp_BW.detach())
    full = cispo(*on_policy.args, cap=5.0).loss.item()
    assert oracle.trl(on_policy, loss_type="cispo").item() == pytest.approx(0.2 * full, rel=1e-5)
    with pytest.raises(ValueError, match="cap"):
        cispo(*c.args, cap=0.2)


def ratios(*values: float) -> tuple[Tensor, Tensor]:
    """logp and old_logp of tokens whose ratios are ``values``; every old probability is 0.25."""
    old_T = torch.full((len(values),), math.log(0.25), dtype=torch.float64)
    return (old_T + torch.tensor(values, dtype=torch.float64).log()).requires_grad_(), old_T


def test_clipped_surrogate_by_hand() -> None:
    """A = 1: 1.5 counts as 1.2, 0.5 as 0.5. A = -1: 1.5 as 1.5, 0.5 as 0.8. Sum -1.2 - 0.5 + 1.5 + 0.8 = 0.6."""
    logp_T, old_T = ratios(1.5, 0.5, 1.5, 0.5)
    adv_T, mask_T = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64), torch.ones(4).bool()
    out = grpo(logp_T, old_T, adv_T, mask_T)
    assert out.loss.item() == pytest.approx(0.6 / 4)
    assert grad(out, logp_T).tolist() == pytest.approx([0, -0.5 / 4, 1.5 / 4, 0])
    assert [out.sums[n].item() for n in ("clip_low", "clip_high")] == pytest.approx([0.25, 0.25])
    dual = grpo(logp_T, old_T, adv_T, mask_T, dual_clip=1.3)
    assert dual.loss.item() == pytest.approx(0.4 / 4) and dual.sums["clip_dual"].item() == pytest.approx(0.25)
    assert grpo(logp_T, old_T, adv_T, mask_T, clip=None).loss.item() == pytest.approx(0)


def test_the_three_averages_by_hand() -> None:
    """Ratios of 1, A = 1 on three tokens and 4 on one: terms -1 -1 -1 | -4."""
    logp_T, old_T = ratios(1, 1, 1, 1)
    adv_T, mask_T = torch.tensor([1.0, 1, 1, 4]), torch.ones(4).bool()
    options: dict[str, Any] = {"seq_T": torch.tensor([0, 0, 0, 1])}
    values = {
        "token": grpo(logp_T, old_T, adv_T, mask_T, **options),
        "sequence": grpo(logp_T, old_T, adv_T, mask_T, aggregate="sequence", **options),
        "constant": grpo(logp_T, old_T, adv_T, mask_T, aggregate="constant", constant=10, **options),
        "global": grpo(logp_T, old_T, adv_T, mask_T, aggregate="sequence", seqs=10, **options),
    }
    assert {n: v.loss.item() for n, v in values.items()} == pytest.approx(
        {"token": -7 / 4, "sequence": -5 / 2, "constant": -7 / 20, "global": -5 / 10}
    )


def test_weights_touch_the_policy_term_and_not_the_kl() -> None:
    logp_T, old_T = ratios(1, 1)
    adv_T, mask_T = torch.tensor([1.0, 1.0]), torch.ones(2).bool()
    ref_T = (old_T - math.log(2)).requires_grad_()
    zero = torch.tensor([0.0, 3.0])
    out = grpo(logp_T, old_T, adv_T, mask_T, is_weight_T=zero, ref_logp_T=ref_T, kl_coef=1.0, kl="k1")
    assert out.loss.item() == pytest.approx(-3 / 2 + math.log(2))
    assert out.sums["policy_loss"].item() == pytest.approx(-1.5) and out.sums["kl"].item() == pytest.approx(math.log(2))
    assert out.sums["is_weight"].item() == 1.5 and out.sums["is_zero"].item() == 0.5
    watched = grpo(logp_T, old_T, adv_T, mask_T, ref_logp_T=ref_T, keep_T=zero.bool())
    assert watched.loss.item() == -0.5 and watched.sums["kl"].item() > 0 and watched.sums["kept"].item() == 0.5
    out.loss.backward()
    assert ref_T.grad is None


def test_dppo_by_hand() -> None:
    """q = 0.25 everywhere. p = 0.5 (moved 0.25), 0.375 (0.125), 0.125 (0.125); a threshold of 0.2 and 0.1."""
    logp_T, old_T = ratios(2.0, 1.5, 0.5)
    mask_T = torch.ones(3).bool()
    up = dppo(logp_T, old_T, torch.ones(3), mask_T)
    assert grad(up, logp_T).tolist() == pytest.approx([0, -0.5, -0.5 / 3])
    assert up.sums["clip_high"].item() == pytest.approx(1 / 3) and up.sums["clip_low"].item() == 0
    down = dppo(logp_T, old_T, -torch.ones(3), mask_T, clip=(0.1, 0.1), cap=1.75)
    assert grad(down, logp_T).tolist() == pytest.approx([1.75 / 3, 0.5, 0])
    rare = dppo(logp_T - 9, old_T - 9, torch.ones(3), mask_T)
    assert rare.sums["clip_high"].item() == 0  # a ratio of 2 on a rare token is no distance at all
    moved = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # 0.131; the others 0.034 and 0.048
    by_kl = [
        dppo(logp_T, old_T, torch.ones(3), mask_T, divergence="kl", clip=(d, d)) for d in (moved - 1e-6, moved + 1e-6)
    ]
    assert [o.sums["clip_high"].item() for o in by_kl] == pytest.approx([1 / 3, 0])
    certain = dppo(torch.zeros(1, requires_grad=True), old_T[:1], torch.ones(1), mask_T[:1], divergence="kl")
    assert certain.loss.isfinite()


def test_gmpo_by_hand() -> None:
    """A = 1: ratios 2 and 0.5 clipped at e^0.4 above: exp((0.4 - ln 2) / 2)."""
    logp_T, old_T = ratios(2.0, 0.5)
    seq_T, mask_T = torch.zeros(2).long(), torch.ones(2).bool()
    out = gmpo(logp_T, old_T, torch.ones(2), mask_T, seq_T=seq_T)
    value = math.exp((0.4 - math.log(2)) / 2)
    assert out.loss.item() == pytest.approx(-value)
    assert grad(out, logp_T).tolist() == pytest.approx([0, -value / 2])
    none = gmpo(logp_T, old_T, torch.ones(2), mask_T, seq_T=seq_T, keep_T=torch.zeros(2).bool())
    assert grad(none, logp_T).tolist() == [0, 0]


def test_vespo_weighs_an_unchanged_answer_by_one() -> None:
    logp_T, old_T = ratios(2.0, 0.5)
    args = torch.ones(2), torch.ones(2).bool()
    seq_T = torch.zeros(2).long()
    assert grad(vespo(logp_T, old_T, *args, seq_T=seq_T), logp_T).tolist() == pytest.approx([-0.5, -0.5])
    twice = vespo(logp_T, old_T, *args, seq_T=seq_T, is_weight_T=torch.tensor([2.0, 1.0]))  # e^3 2^2 e^-6
    assert grad(twice, logp_T).tolist() == pytest.approx([-2 * math.exp(-3)] * 2)


@pytest.mark.parametrize("name", LOSSES)
def test_where_the_policy_has_not_moved_the_gradient_is_reinforce(name: str) -> None:
    logp_T, _, adv_T, _ = sample()
    options: dict[str, Any] = {"seq_T": SEQ_T}
    ours = grad(LOSSES[name](logp_T, logp_T.detach(), adv_T, MASK_T, **options), logp_T)
    if not name.startswith("dppo"):  # which needs the sampler's probabilities
        assert torch.equal(ours, grad(LOSSES[name](logp_T, None, adv_T, MASK_T, **options), logp_T))
    average: dict[str, Any] = {}
    if name in ("grpo", "gspo", "sapo", "gmpo"):
        average = {"aggregate": "sequence"}
    if name in ("dr_grpo", "luspo", "rloo"):  # the whole answer as one action: the sum of its tokens' scores
        average = {"aggregate": "constant", "constant": 10.0 if name == "dr_grpo" else 1.0}
    torch.testing.assert_close(ours, grad(reinforce(logp_T, adv_T, MASK_T, **options, **average), logp_T))


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "sequence_sum"])
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_with_one_token_a_sequence_every_level_is_the_token_level(level: str, aggregate: str) -> None:
    logp_T, old_T, adv_T, ref_T = sample()
    options: dict[str, Any] = {"seq_T": torch.arange(10), "aggregate": aggregate, "ref_logp_T": ref_T, "kl_coef": 0.2}
    options |= {"kl_bias_correction": True}
    ours, token = (grpo(logp_T, old_T, adv_T, MASK_T, level=v, **options) for v in (level, "token"))
    torch.testing.assert_close(ours.loss, token.loss)
    torch.testing.assert_close(grad(ours, logp_T), grad(token, logp_T))


def test_with_one_advantage_a_sequence_gspo_token_has_the_gradient_of_gspo() -> None:
    logp_T, old_T, adv_T, _ = sample()
    for aggregate in ("token", "sequence"):
        options: dict[str, Any] = {"seq_T": SEQ_T, "aggregate": aggregate}
        outs = [grpo(logp_T, old_T, adv_T, MASK_T, level=v, **options) for v in ("sequence", "sequence_token")]
        torch.testing.assert_close(outs[0].loss, outs[1].loss)
        torch.testing.assert_close(grad(outs[0], logp_T), grad(outs[1], logp_T))


@pytest.mark.parametrize("name", LOSSES)
def test_any_split_into_parts_adds_up_to_the_whole(name: str) -> None:
    loss, (logp_T, old_T, adv_T, ref_T) = LOSSES[name], sample()
    weight_T = torch.linspace(0.5, 1.5, 10, dtype=torch.float64)
    extra: dict[str, Any] = {"kl_coef": 0.3, "kl_bias_correction": True, "tokens": MASK_T.sum()}
    extra |= {} if name in BY_TOKEN else {"seqs": 4}

    def share(where_T: Tensor) -> LossOutput:
        """The part of a rank that holds these sequences, renumbered from 0."""
        seq_T = torch.unique(SEQ_T[where_T], return_inverse=True)[1]
        parts = (x[where_T] for x in (logp_T, old_T, adv_T, MASK_T))
        streams = {"is_weight_T": weight_T[where_T], "ref_logp_T": ref_T[where_T], "keep_T": weight_T[where_T] > 0.6}
        return loss(*parts, seq_T=seq_T, **streams, **extra)

    whole = share(SEQ_T >= 0)
    for owner_S in ([0, 1, 0, 1], [0, 1, 2, 3], [2, 2, 0, 2]):  # the last leaves rank 1 with nothing at all
        owner_T = torch.tensor(owner_S)[SEQ_T]
        outs = [share(owner_T == rank) for rank in range(4)]
        total = torch.stack([o.loss for o in outs]).sum()
        torch.testing.assert_close(total, whole.loss)
        torch.testing.assert_close(grad(total, logp_T), grad(whole, logp_T))
        for name in whole.sums:
            torch.testing.assert_close(torch.stack([o.sums[name] for o in outs]).sum(), whole.sums[name])
        for name in whole.maxes:
            torch.testing.assert_close(torch.stack([o.maxes[name] for o in outs]).amax(), whole.maxes[name])


@every_loss
def test_order_and_numbering_of_sequences_do_not_matter(loss: Callable[..., LossOutput]) -> None:
    logp_T, old_T, adv_T, _ = sample()
    order_T = torch.tensor([9, 5, 3, 0, 6, 1, 7, 4, 2, 8])
    whole = loss(logp_T, old_T, adv_T, MASK_T, seq_T=SEQ_T)
    args = (x[order_T] for x in (logp_T, old_T, adv_T, MASK_T))
    moved = loss(*args, seq_T=torch.tensor([3, 7, 0, 5])[SEQ_T][order_T])
    torch.testing.assert_close(moved.loss, whole.loss)
    torch.testing.assert_close(grad(moved, logp_T), grad(whole, logp_T))


@every_loss
@pytest.mark.parametrize("filler", [0, 3])
def test_offsets_and_advantages_of_sequences_give_what_ids_give(loss: Callable[..., LossOutput], filler: int) -> None:
    """The third of five sequences has no token at all. Filler holds NaN, and belongs to none."""
    logp_T, old_T, adv_T, ref_T = sample()
    mask_T, cu_S1 = MASK_T.clone(), torch.tensor([0, 3, 5, 5, 9, 10])
    mask_T[3:5] = False
    streams: dict[str, Any] = {"ref_logp_T": ref_T, "is_weight_T": torch.linspace(0.5, 1.5, 10), "keep_T": adv_T < 1}
    extra: dict[str, Any] = {"kl_coef": 0.3, "kl_bias_correction": True}
    by_id = loss(logp_T, old_T, adv_T, mask_T, seq_T=SEQ_T, **streams, **extra)

    def longer(x_T: Tensor) -> Tensor:
        return torch.cat([x_T, torch.full((filler,), math.nan).to(x_T.dtype)])

    args, padded_T = [longer(x_T) for x_T in (logp_T, old_T, adv_T)], torch.cat([mask_T, torch.zeros(filler).bool()])
    extra |= {"cu_S1": cu_S1.int(), **{name: longer(x_T) for name, x_T in streams.items()}}
    adv_S = torch.tensor([1.0, math.nan, math.nan, 0.7, -1.3])  # of sequences with nothing trained: never seen
    for adv in ({"adv_S": adv_S}, {}):
        offsets = loss(*args[:2], None if adv else args[2], padded_T, **extra, **adv)
        torch.testing.assert_close(offsets.loss, by_id.loss)
        torch.testing.assert_close(grad(offsets, logp_T), grad(by_id, logp_T))
        for name, value in [*by_id.sums.items(), *by_id.maxes.items()]:
            torch.testing.assert_close({**offsets.sums, **offsets.maxes}[name], value, msg=name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cu_S1": torch.tensor([0, 10]), "seq_T": SEQ_T}, "got both"),
        ({"cu_S1": torch.tensor([0, 11])}, "offsets that rise from 0 to 10"),
        ({"cu_S1": torch.tensor([0, 6, 5])}, "offsets that rise"),
        ({"cu_S1": torch.tensor([0.0, 10.0])}, "S \\+ 1 integers"),
        ({"cu_S1": torch.tensor([0, 5, 10]), "adv_S": torch.ones(2)}, "adv_T and adv_S; got both"),
        ({"cu_S1": torch.tensor([0, 5, 10]), "adv_S": torch.ones(3), "adv_T": None}, "one length"),
        ({"seq_T": SEQ_T, "adv_S": torch.ones(4), "adv_T": None}, "expected with cu_S1"),
        ({"adv_T": None, "seq_T": SEQ_T}, "got neither"),
    ],
)
def test_sequences_and_advantages_that_contradict_are_refused(given: dict[str, Any], said: str) -> None:
    logp_T, old_T, adv_T, _ = sample()
    adv_T = given.pop("adv_T", adv_T)
    with pytest.raises(ValueError, match=said):
        grpo(logp_T, old_T, adv_T, MASK_T, level="sequence", **given)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in STOPPED])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradients_are_those_of_the_value(name: str, estimator: str) -> None:
    logp_T, old_T, adv_T, ref_T = sample()

    def value(x_T: Tensor) -> Tensor:
        options: dict[str, Any] = {"ref_logp_T": ref_T, "kl_coef": 0.3, "kl": estimator, "kl_bias_correction": True}
        return LOSSES[name](x_T, old_T, adv_T, MASK_T, seq_T=SEQ_T, **options).loss

    assert torch.autograd.gradcheck(value, (logp_T,))


@every_loss
@pytest.mark.parametrize("T", [0, 10])
def test_nothing_trained_is_a_finite_zero_with_a_graph(loss: Callable[..., LossOutput], T: int) -> None:
    logp_T = torch.full((T,), torch.nan, requires_grad=True)
    nan_T = torch.full((T,), torch.nan)
    options: dict[str, Any] = {
        "ref_logp_T": nan_T,
        "kl_coef": 0.1,
        "is_weight_T": nan_T,
        "keep_T": nan_T,
        "seq_T": SEQ_T[:T],
    }
    out = loss(logp_T, nan_T, nan_T, torch.zeros(T).bool(), **options)
    assert out.loss.item() == 0 and out.loss.dtype == torch.float32
    assert grad(out, logp_T).tolist() == [0] * T
    assert all(x.item() == 0 for x in [*out.sums.values(), *out.maxes.values()])


@every_loss
def test_what_stands_at_untrained_places_is_never_seen(loss: Callable[..., LossOutput]) -> None:
    logp_T, old_T, adv_T, ref_T = sample()

    def run(fill: float) -> tuple[Tensor, Tensor]:
        parts = [torch.where(MASK_T, x, fill).detach() for x in (logp_T, old_T, adv_T, ref_T)]
        leaf_T = parts[0].requires_grad_()
        out = loss(leaf_T, parts[1], parts[2], MASK_T, seq_T=SEQ_T, ref_logp_T=parts[3], kl_coef=0.1)
        return out.loss, grad(out, leaf_T)

    for a, b in zip(run(0.0), run(math.nan), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@every_loss
@pytest.mark.parametrize("gap", [500.0, -500.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_absurd_ratios_stay_finite(loss: Callable[..., LossOutput], gap: float, sign: float) -> None:
    logp_T = torch.full((10,), -600.0, requires_grad=True)
    apart_T = logp_T.detach() + gap
    out = loss(logp_T, apart_T, torch.full((10,), sign), MASK_T, seq_T=SEQ_T, ref_logp_T=apart_T, kl_coef=0.1)
    assert out.loss.isfinite() and grad(out, logp_T).isfinite().all()
    assert all(x.isfinite() for x in [*out.sums.values(), *out.maxes.values()])


@every_loss
def test_half_precision_is_reduced_in_float32(loss: Callable[..., LossOutput]) -> None:
    halves = [x.bfloat16() for x in sample()]
    logp_T = halves[0].detach().requires_grad_()
    out = loss(logp_T, halves[1], halves[2], MASK_T, seq_T=SEQ_T)
    exact = loss(*(x.float() for x in halves[:3]), MASK_T, seq_T=SEQ_T)
    assert out.loss.dtype == torch.float32 and out.loss.item() == pytest.approx(exact.loss.item(), abs=1e-6)
    assert grad(out, logp_T).dtype == torch.bfloat16


@every_loss
def test_nothing_waits_for_the_device(loss: Callable[..., LossOutput]) -> None:
    """Tensors without storage cannot be asked for a value, so whatever would wait for a device fails on them."""
    logp_T, old_T, adv_T, ref_T = (x.detach().to("meta") for x in sample())
    mask_T, seq_T = MASK_T.to("meta"), SEQ_T.to("meta")
    options: dict[str, Any] = {"ref_logp_T": ref_T, "kl_coef": 0.1, "is_weight_T": old_T, "keep_T": mask_T}
    out = loss(logp_T.requires_grad_(), old_T, adv_T, mask_T, seq_T=seq_T, **options)
    assert grad(out, logp_T).shape == (10,)
    cu_S1, adv_S = torch.zeros(5, dtype=torch.int32, device="meta"), torch.zeros(4, device="meta")
    out = loss(logp_T, old_T, None, mask_T, cu_S1=cu_S1, adv_S=adv_S, **options)
    assert grad(out, logp_T).shape == (10,)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "level": ({"level": "word"}, "level: expected one of token, sequence"),
    "aggregate": ({"aggregate": "mean"}, "aggregate: expected one of token"),
    "sequence level without ids": ({"level": "sequence"}, "expected seq_T"),
    "sequence average without ids": ({"aggregate": "sequence"}, "expected seq_T"),
    "constant missing": ({"aggregate": "constant", "seqs": 1}, "constant: expected a number"),
    "sequences counted where tokens are": ({"seqs": 4}, "seqs: expected with aggregate='sequence'"),
    "constant unused": ({"constant": 5.0}, "constant: expected a number"),
    "kl kind": ({"kl": "k4"}, "kl: expected one of k1"),
    "kl without reference": ({"kl_coef": 0.1}, "expected ref_logp_T"),
    "kl sign": ({"kl_coef": -0.1}, "kl_coef: expected a number"),
    "correction of no kl": ({"kl_bias_correction": True}, "kl_bias_correction"),
    "clip": ({"clip": (1.2, 0.2)}, r"clip\[0\]: expected a number"),
    "dual clip inside the clip": ({"dual_clip": 1.1}, "dual_clip: expected a number in"),
    "weights per sequence": ({"is_weight_T": torch.ones(4)}, "one length"),
    "ids of the wrong type": ({"seq_T": torch.zeros(10)}, "expected seq_T of torch.int64"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    logp_T, old_T, adv_T, _ = sample()
    with pytest.raises(ValueError, match=message):
        grpo(logp_T, old_T, adv_T, MASK_T, **options)


def test_shapes_that_would_broadcast_and_masks_that_are_not_bool_are_refused() -> None:
    logp_T, old_T, adv_T, _ = sample()
    with pytest.raises(ValueError, match="one length"):
        grpo(logp_T, old_T, adv_T[:1], MASK_T)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        grpo(logp_T, old_T, adv_T, MASK_T.float())
    for loss, fixed in ((rloo, "sequence"), (luspo, "constant"), (gmpo, "sequence")):
        with pytest.raises(ValueError, match=f"aggregate='{fixed}', which is part of this loss"):
            loss(logp_T, old_T, adv_T, MASK_T, seq_T=SEQ_T, aggregate="token")


def test_dual_clip_alone_holds_bad_answers_and_leaves_good_ones() -> None:
    """r = 4 of one good and one bad token; only the bad one is held, at 3, and loses its gradient."""
    logp_T = torch.full((2,), math.log(4.0), dtype=torch.float64, requires_grad=True)
    adv_T, mask_T = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    out = grpo(logp_T, torch.zeros(2, dtype=torch.float64), adv_T, mask_T, clip=None, dual_clip=3.0)
    out.loss.backward()
    assert float(out.loss) == pytest.approx((-4 + 3) / 2)
    assert logp_T.grad is not None and logp_T.grad.tolist() == pytest.approx([-4 / 2, 0.0])
