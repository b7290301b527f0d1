"""Feature matching: numbers by hand, numpy, finite differences, and what must hold whatever the numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracles_ebft import ROWS
from torch import Tensor

from ft.losses import ebft
from ft.losses.ebft import advantages, alignment, baseline, diversity, ebft_loss, feature_distance, feature_matching
from ft.losses.features import normalise, pool, unit, whiten

torch.set_num_threads(1)
MINE = [r for r in ROWS if r[0] in {*ebft.__all__}]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("row", MINE, ids=lambda r: f"{r[0]}-{r[1]}")
def test_equals_the_independent_derivation(row: tuple[str, str, str, float]) -> None:
    assert row[3] < 1e-9


# --- features ---------------------------------------------------------------------------------------------------------


def test_joint_norm_lets_loud_layers_weigh_more_and_layer_norm_does_not() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])  # one token, two layers, width 2
    assert normalise(hidden, by="joint")[0].tolist() == pytest.approx([0.6, 0, 0, 0.8])
    assert normalise(hidden, by="layer")[0].tolist() == [1, 0, 0, 1]  # length sqrt(2)
    assert normalise(hidden, by="none")[0].tolist() == [3, 0, 0, 4]


def test_a_zero_vector_has_a_direction_of_zero_and_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    out = unit(x)
    out.sum().backward()
    assert out.tolist() == [[0.0] * 3] * 2 and x.grad is not None and x.grad.isfinite().all()


def test_pooling_by_hand() -> None:
    hidden = torch.arange(9.0)[:, None].repeat(1, 2)  # token t holds (t, t)
    seq = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 3])  # sequence 2 is empty, 3 is filler
    completion = torch.tensor([0, 0, 1, 1, 0, 0, 1, 0, 1]).bool()
    assert pool(hidden, seq, 3, method="last")[:, 0].tolist() == [4, 7, 0]
    assert pool(hidden, seq, 3, method="last", completion_T=completion)[:, 0].tolist() == [3, 6, 0]
    assert pool(hidden, seq, 3, method="mean")[:, 0].tolist() == [2, 6, 0]
    assert pool(hidden, seq, 3, method="completion_mean", completion_T=completion)[:, 0].tolist() == [2.5, 6, 0]
    # of 5 tokens: places 1, 2, 3; of 3 tokens: places 0, 1, 2
    assert pool(hidden, seq, 3, method="quartiles")[:, ::2].tolist() == [[1, 2, 3], [5, 6, 7], [0, 0, 0]]


@pytest.mark.parametrize("method", ["last", "mean", "completion_mean", "quartiles"])
def test_pooling_knows_neither_the_order_of_sequences_nor_what_stands_in_filler(method: str) -> None:
    hidden, seq = randn(12, 3), torch.tensor([0] * 4 + [1] * 5 + [2] * 3)
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0]).bool() if method == "completion_mean" else None
    order = torch.tensor([9, 10, 11, 4, 5, 6, 7, 8, 0, 1, 2, 3])
    filler = torch.full((2, 3), torch.nan, dtype=torch.float64)
    packed = torch.cat([hidden[order], filler]).requires_grad_()
    packed_keep = None if keep is None else torch.cat([keep[order], torch.ones(2).bool()])
    ours = pool(packed, torch.cat([seq[order], torch.tensor([3, 3])]), 3, method=method, completion_T=packed_keep)
    torch.testing.assert_close(ours, pool(hidden, seq, 3, method=method, completion_T=keep))
    ours.square().sum().backward()
    assert packed.grad is not None and packed.grad.isfinite().all() and not packed.grad[-2:].any()


@pytest.mark.parametrize("method", ["last", "mean", "quartiles"])
def test_pooling_nothing_gives_zeros_with_a_graph(method: str) -> None:
    hidden = torch.zeros(0, 2, requires_grad=True)
    out = pool(hidden, torch.zeros(0, dtype=torch.long), 2, method=method)
    assert out.shape == (2, 6 if method == "quartiles" else 2) and not out.any()
    out.sum().backward()


def test_features_have_the_right_gradient() -> None:
    hidden, seq = randn(6, 2, 2).requires_grad_(), torch.tensor([0, 0, 1, 1, 1, 2])
    for by, method in (("joint", "mean"), ("layer", "last"), ("none", "quartiles")):
        assert torch.autograd.gradcheck(lambda x, b=by, m=method: pool(normalise(x, by=b), seq, 3, method=m), hidden)


def test_whitened_samples_are_orthonormal_so_their_diversity_says_nothing() -> None:
    gen, ref = randn(5, 4, 16), randn(5, 16, seed=1)
    white, _ = whiten(gen, ref)
    torch.testing.assert_close(white @ white.mT, torch.eye(4, dtype=torch.float64).expand(5, 4, 4))
    assert diversity(white).abs().max() < 1e-12
    twice = torch.cat([gen[:, :3], gen[:, 2:3]], 1)  # the fourth sample repeats the third: each becomes v / sqrt(2)
    assert diversity(whiten(twice, ref)[0])[:, 2:].tolist() == [pytest.approx([1 / 3, 1 / 3])] * 5  # 2/(4-1) * 1/2


def test_a_negative_row_of_the_whitening_turns_the_references_sign() -> None:
    """Sample 2 lies between the others, so (W 1)_2 = -3.3: it is said to disagree with what it agrees with."""
    gen = unit(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.1]]).double())
    ref = torch.tensor([0.0, 0.0, 1.0]).double()  # sample 2 alone has any of it
    authors = alignment(*whiten(gen, ref))
    raw = alignment(*whiten(gen, ref, reference="raw"))
    torch.testing.assert_close(authors, raw * torch.tensor([1, 1, -1]))
    assert raw[2] > 1.2 and authors[2] < -1.2


def test_whitening_leaves_missing_samples_and_small_directions_out() -> None:
    gen, ref = randn(1, 4, 8), randn(1, 8, seed=1)
    valid = torch.tensor([[True, False, True, True]])
    holed = torch.where(valid[..., None], gen, torch.nan)
    for side in ("sample", "feature"):
        white, ref_w = whiten(holed, ref, side=side, valid_PG=valid)
        want, ref_want = whiten(gen[:, [0, 2, 3]], ref, side=side)
        torch.testing.assert_close(white[:, [0, 2, 3]], want)
        torch.testing.assert_close(alignment(white, ref_w, valid_PG=valid)[:, [0, 2, 3]], alignment(want, ref_want))
        assert not white[:, 1].any()
        assert not torch.cat(whiten(torch.zeros(1, 2, 3), torch.ones(1, 3), side=side), 1).any()


# --- rewards and baselines --------------------------------------------------------------------------------------------


def test_rewards_by_hand() -> None:
    gen = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    ref = torch.tensor([2.0, 0.0])
    assert alignment(gen, ref).tolist() == pytest.approx([2.0, 0.0, 1.2])
    assert alignment(gen, ref, similarity="dot").tolist() == pytest.approx([4.0, 0.0, 2.4])
    assert diversity(gen).tolist() == pytest.approx([0.6, 0.8, 1.4])  # 2/2 * (0 + .6), (0 + .8), (.6 + .8)
    # alignment: the others' mean. diversity: twice the one product without j: 2 * .8, 2 * .6, 2 * 0
    want = [0.6 - 1.6, 1.6 - 1.2, 1.0 - 0.0]
    assert baseline(alignment(gen, ref), diversity(gen)).tolist() == pytest.approx(want)
    assert feature_distance(gen, ref).item() == pytest.approx((1.6 / 3 - 2) ** 2 + 0.6**2)


def test_layerwise_features_count_diversity_once_per_layer() -> None:
    hidden, ref = randn(4, 3, 8), randn(3, 8, seed=1)
    each = unit(hidden)
    by_layer = normalise(hidden, by="layer")
    cosines = diversity(by_layer / 3**0.5)
    torch.testing.assert_close(diversity(by_layer), 3 * cosines)
    torch.testing.assert_close(diversity(by_layer), sum(diversity(each[:, f]) for f in range(3)))
    torch.testing.assert_close(
        alignment(by_layer, normalise(ref, by="layer")), alignment(by_layer / 3**0.5, normalise(ref, by="layer"))
    )


def test_the_independent_baseline_does_not_see_its_own_sample_and_plain_leave_one_out_does() -> None:
    gen, ref = unit(randn(4, 6)), unit(randn(6, seed=1))
    other = gen.clone()
    other[1] = unit(randn(6, seed=2))
    for kind, moved in (("independent", False), ("leave_one_out", True), ("mean", True)):
        before, after = (baseline(alignment(g, ref), diversity(g), kind=kind) for g in (gen, other))
        assert (abs(before[1] - after[1]) > 1e-3) == moved, kind
        if not moved:
            assert abs(before[1] - after[1]) < 1e-14
        assert (before[0] - after[0]).abs() > 1e-3


@pytest.mark.parametrize("kind", ["independent", "none"])
@pytest.mark.parametrize("n", [2, 3])
def test_the_reward_is_the_gradient_of_feature_matching_and_an_independent_baseline_keeps_it(kind: str, n: int) -> None:
    """All n-tuples of four outcomes, weighed by their probability: E sum_j A_j grad log p_j / n = -grad L."""
    phi, ref = randn(4, 3), randn(3, seed=1)
    logits = randn(4, seed=2).requires_grad_()
    prob = logits.softmax(-1)
    (exact,) = torch.autograd.grad((prob @ phi - ref).square().sum(), logits)
    tuples = torch.tensor(list(itertools.product(range(4), repeat=n)))
    gen = phi[tuples]
    adv = advantages(alignment(gen, ref.expand(len(gen), 3), similarity="dot"), diversity(gen), kind=kind)
    logp = logits.log_softmax(-1)[tuples]
    weight = logp.sum(-1).exp().detach()
    (policy,) = torch.autograd.grad((weight[:, None] * adv * logp / n).sum(), logits)
    torch.testing.assert_close(policy, -exact)


def test_plain_leave_one_out_is_biased() -> None:
    phi, ref = randn(4, 3), randn(3, seed=1)
    logits = randn(4, seed=2).requires_grad_()
    tuples = torch.tensor(list(itertools.product(range(4), repeat=3)))
    gen, logp = phi[tuples], logits.log_softmax(-1)[tuples]
    weight = logp.sum(-1).exp().detach()
    terms = alignment(gen, ref.expand(len(gen), 3), similarity="dot"), diversity(gen)
    grads = [
        torch.autograd.grad((weight[:, None] * advantages(*terms, kind=k) * logp / 3).sum(), logits, retain_graph=True)
        for k in ("none", "leave_one_out")
    ]
    assert (grads[0][0] - grads[1][0]).abs().max() > 0.05


def test_the_unbiased_distance_is_unbiased_and_the_plain_one_is_not() -> None:
    phi, ref, prob = randn(4, 3), randn(3, seed=1), randn(4, seed=2).softmax(-1)
    tuples = torch.tensor(list(itertools.product(range(4), repeat=3)))
    weight, gen = prob[tuples].prod(-1), phi[tuples]
    exact = (prob @ phi - ref).square().sum()
    variance = (prob @ phi.square().sum(-1)) - (prob @ phi).square().sum()
    refs = ref.expand(len(gen), 3)
    torch.testing.assert_close(weight @ feature_distance(gen, refs, unbiased=True), exact)
    torch.testing.assert_close(weight @ feature_distance(gen, refs), exact + variance / 3)


@pytest.mark.parametrize("kind", ["independent", "leave_one_out", "mean", "none"])
@pytest.mark.parametrize("scale", ["none", "samples", "blocks"])
def test_permuting_the_samples_permutes_the_advantages(kind: str, scale: str) -> None:
    gen, ref, order = randn(2, 3, 5, 4), randn(2, 3, 4, seed=1), torch.tensor([3, 1, 4, 0, 2])
    one, two = (
        advantages(alignment(g, ref), diversity(g), kind=kind, scale=scale)
        for g in (gen, gen[:, :, order].contiguous())
    )
    torch.testing.assert_close(one[..., order], two)


@pytest.mark.parametrize("kind", ["independent", "leave_one_out", "mean", "none"])
def test_a_missing_sample_is_as_if_it_were_not_there(kind: str) -> None:
    gen, ref, valid = randn(1, 5, 4), randn(1, 4, seed=1), torch.tensor([[True, True, False, True, True]])
    holed, rest = torch.where(valid[..., None], gen, torch.nan), gen[:, [0, 1, 3, 4]]
    terms = alignment(holed, ref, valid_PG=valid), diversity(holed, valid_PG=valid)
    got = advantages(*terms, kind=kind, scale="samples", valid_PG=valid)
    want = advantages(alignment(rest, ref), diversity(rest), kind=kind, scale="samples")
    torch.testing.assert_close(got[:, [0, 1, 3, 4]], want)
    assert got[0, 2] == 0
    for unbiased in (False, True):
        distances = (
            feature_distance(holed, ref, unbiased=unbiased, valid_PG=valid),
            feature_distance(rest, ref, unbiased=unbiased),
        )
        torch.testing.assert_close(*distances)


def test_a_single_sample_equal_samples_and_no_sample_are_defined() -> None:
    one, ref = unit(randn(1, 1, 4)), unit(randn(1, 4, seed=1))
    terms = alignment(one, ref), diversity(one)
    assert terms[1].item() == 0
    for kind in ("independent", "leave_one_out", "none"):  # REINFORCE: nothing to compare with
        assert advantages(*terms, kind=kind, scale="samples").item() == pytest.approx(terms[0].item())
    assert advantages(*terms, kind="mean").item() == 0
    two = torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 8.0]])  # nothing is known of pairs without j: alignment alone
    assert baseline(*two).tolist() == [[3.0, 1.0]]
    same = one.float().expand(1, 4, 4)
    equal = alignment(same, ref.float()), diversity(same)
    assert advantages(*equal, scale="samples").abs().max() < 0.02  # rounding, and not rounding / 1e-8
    none = torch.zeros(1, 3).bool()
    holed = torch.full((1, 3, 4), torch.nan)
    terms = alignment(holed, ref.float(), valid_PG=none), diversity(holed, valid_PG=none)
    assert not advantages(*terms, scale="samples", valid_PG=none).any()
    out = feature_matching(holed.requires_grad_(), ref.float(), valid_PG=none).loss
    out.backward()
    assert out.item() == 0 and holed.grad is not None and not holed.grad.any()


def test_feature_matching_is_differentiated_by_the_samples_alone() -> None:
    gen, ref = randn(2, 3, 4).requires_grad_(), randn(2, 4, seed=1).requires_grad_()
    for unbiased in (False, True):
        assert torch.autograd.gradcheck(lambda x, u=unbiased: feature_matching(x, ref.detach(), unbiased=u).loss, gen)
    feature_matching(gen, ref).loss.backward()
    assert ref.grad is None and not alignment(gen, ref).requires_grad and not diversity(gen).requires_grad
    parts = sum(feature_matching(gen[i : i + 1], ref[i : i + 1], prompts=2).loss for i in range(2))
    torch.testing.assert_close(parts, feature_matching(gen, ref).loss)


# --- the combined loss ------------------------------------------------------------------------------------------------


def stream() -> dict[str, Any]:
    return {
        "logp_T": -randn(12).abs(),
        "adv_T": randn(12, seed=1),
        "mask_T": torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0]).bool(),
        "ce_T": torch.tensor([1, 1, 0, 0, 0, 0, 0.5, 1, 0, 0, 0.25, 1]).double(),
        "ref_logp_T": -randn(12, seed=2).abs(),
        "seq_T": torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]),
    }


COEFS: dict[str, Any] = {"rl_coef": 0.9, "ce_coef": 0.3, "kl_coef": 0.05}


def test_the_loss_by_hand() -> None:
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    mask, ce = torch.tensor([True, True, False, False]), torch.tensor([0, 0, 1.0, 0.5])
    adv = torch.tensor([1.0, 3.0, 7.0, 7.0])
    out = ebft_loss(logp, adv, mask, ce_T=ce, ce_coef=0.5)
    out.loss.backward()
    # policy: -(1 + 3)/2 = -2. cross-entropy: (3 + .5 * 4)/1.5 = 10/3
    assert {k: v.item() for k, v in out.sums.items()} == pytest.approx({"ebft/policy": -2.0, "ebft/ce": 10 / 3})
    assert out.loss.item() == pytest.approx(-2 + 0.5 * 10 / 3)
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-0.5, -1.5, -1 / 3, -1 / 6])


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
@pytest.mark.parametrize("sizes", [(5, 5, 2), (5, 7), (10, 2)])
def test_the_loss_is_the_same_under_every_partition(aggregate: str, sizes: tuple[int, ...]) -> None:
    data = stream()
    x = data.pop("logp_T").requires_grad_()
    whole = ebft_loss(x, **data, aggregate=aggregate, **COEFS).loss
    (want,) = torch.autograd.grad(whole, x)
    counts: dict[str, Any] = (
        {"tokens": 5, "ce_tokens": torch.tensor(4.75)} if aggregate == "token" else {"seqs": 2, "ce_seqs": 3}
    )
    parts = zip(x.split(sizes), *(v.split(sizes) for v in data.values()), strict=True)
    total = sum(
        ebft_loss(part[0], **dict(zip(data, part[1:], strict=True)), aggregate=aggregate, **COEFS, **counts).loss
        for part in parts
    )
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], want)


def test_both_surrogates_have_one_gradient_and_numerical_gradients_agree() -> None:
    data = stream()
    grads = []
    for surrogate in ("ratio", "logp"):
        x = data["logp_T"].clone().requires_grad_()
        ebft_loss(x, data["adv_T"], data["mask_T"], surrogate=surrogate).loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    x = data.pop("logp_T").requires_grad_()
    for aggregate in ("token", "sequence"):
        options = {"surrogate": "logp", "aggregate": aggregate}
        assert torch.autograd.gradcheck(lambda lp, o=options: ebft_loss(lp, **data, **o, **COEFS).loss, x)


def test_sequence_means_equal_the_token_mean_where_all_are_as_long() -> None:
    logp, adv, seq = -randn(9).abs(), randn(9, seed=1), torch.arange(3).repeat_interleave(3)
    mask = torch.tensor([0, 1, 1] * 3).bool()
    by_seq = ebft_loss(logp, adv, mask, seq_T=seq, aggregate="sequence").loss
    torch.testing.assert_close(by_seq, ebft_loss(logp, adv, mask).loss)


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_an_all_masked_call_is_a_finite_zero_with_a_graph(aggregate: str) -> None:
    nan = torch.full((4,), torch.nan)
    logp = nan.clone().requires_grad_()
    out = ebft_loss(logp, nan, torch.zeros(4).bool(), ce_T=torch.zeros(4), ref_logp_T=nan, ce_coef=1.0, kl_coef=1.0,
                    aggregate=aggregate, seq_T=torch.tensor([0, 0, 1, 2]))  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0 and logp.grad is not None and logp.grad.tolist() == [0] * 4


def test_a_sequence_without_tokens_adds_nothing_rather_than_its_unmasked_mean() -> None:
    """The authors' masked mean of an empty row is the mean of all its tokens: here it would be 100."""
    logp, adv = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([2.0, -100.0, -100.0])
    mask, seq = torch.tensor([True, False, False]), torch.tensor([0, 1, 1])
    assert ebft_loss(logp, adv, mask, seq_T=seq, aggregate="sequence").loss.item() == -2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_reduced_in_float32(dtype: torch.dtype) -> None:
    logp = torch.full((4096,), -1.001).to(dtype).requires_grad_()
    out = ebft_loss(logp, torch.ones(4096).to(dtype), torch.ones(4096).bool(), surrogate="logp").loss
    out.backward()
    assert out.dtype == torch.float32 and out.item() == pytest.approx(-logp[0].item(), abs=1e-6)
    assert logp.grad is not None and logp.grad.dtype == dtype
    gen = randn(3, 4).to(dtype)
    assert {f.dtype for f in (unit(gen), diversity(gen), *whiten(gen, gen[0]))} == {torch.float32}


def test_what_cannot_be_honoured_is_refused() -> None:
    x, mask, seq = torch.zeros(3), torch.ones(3).bool(), torch.zeros(3, dtype=torch.long)
    gen, ref = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    terms = torch.zeros(2, 3), torch.zeros(2, 3)
    for call in (
        lambda: ebft_loss(x, x, mask, ce_coef=0.1),
        lambda: ebft_loss(x, x, mask, kl_coef=0.1),
        lambda: ebft_loss(x, x, mask, aggregate="sequence"),
        lambda: ebft_loss(x, x, mask, aggregate="constant"),
        lambda: ebft_loss(x, x, mask, seqs=2),
        lambda: ebft_loss(x, x, mask, aggregate="sequence", seq_T=seq, tokens=2),
        lambda: ebft_loss(x, x, mask, surrogate="clip"),
        lambda: ebft_loss(x, x[:2], mask),
        lambda: ebft_loss(x, x, x),
        lambda: normalise(gen, by="batch"),
        lambda: normalise(x),
        lambda: pool(gen[0], seq, 1, method="first"),
        lambda: pool(gen[0], seq, 1, method="completion_mean"),
        lambda: pool(gen[0], seq, 1, method="mean", completion_T=mask),
        lambda: pool(gen[0], seq[:2], 1),
        lambda: pool(gen[0], seq, 1, completion_T=x),
        lambda: whiten(gen, ref, side="both"),
        lambda: whiten(gen, ref, reference="none"),
        lambda: whiten(gen, ref, tol=2.0),
        lambda: whiten(gen, gen),
        lambda: alignment(gen, ref, similarity="l2"),
        lambda: alignment(gen, ref[:1]),
        lambda: diversity(gen, valid_PG=mask),
        lambda: baseline(*terms, kind="rloo"),
        lambda: advantages(*terms, scale="group"),
        lambda: advantages(terms[0][:1], terms[1][:1], scale="blocks"),
        lambda: advantages(terms[0], terms[1][:1]),
    ):
        with pytest.raises(ValueError, match="expect"):
            call()
    with pytest.raises(torch.linalg.LinAlgError):
        whiten(gen + torch.nan, ref)
