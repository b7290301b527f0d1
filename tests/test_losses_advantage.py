"""Advantages by hand and against the standard library's statistics. Shapes: S samples, K rewards, T tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ft.losses import advantage as adv

torch.set_num_threads(1)
NAN = math.nan


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


GROUP_S = torch.tensor([7, 7, 7, 42, 42, -1])  # any numbers; the last is a group of its own
REWARD_S = t(1, 0, 2, 3, 5, 9)
LENGTH_S = t(1, 2, 1, 1, 3, 4)
ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group_mean": adv.group_mean,
    "group_zscore": adv.group_zscore,
    "zscore_batch": partial(adv.group_zscore, scale="batch"),
    "leave_one_out": adv.leave_one_out,
    "opo": lambda r_S, g_S: adv.opo(r_S, torch.arange(1.0, 1 + len(r_S)), g_S),
    "maxrl": adv.maxrl,
    "gdpo": lambda r_S, g_S: adv.gdpo(r_S[:, None], g_S),
}
every = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())


def test_estimators_by_hand() -> None:
    """Means 1 and 4; deviations 1 and sqrt 2; others' means 1, 1.5, 0.5 and 5, 3; the lone sample is 0 throughout."""
    expected = {
        "group_mean": [0, -1, 1, -1, 1, 0],
        "group_zscore": [0, -1, 1, -1 / math.sqrt(2), 1 / math.sqrt(2), 0],
        "leave_one_out": [0, -1.5, 1.5, -2, 2, 0],
        "maxrl": [0, -1, 1, -0.25, 0.25, 0],
    }
    ours = {name: ESTIMATORS[name](REWARD_S, GROUP_S).tolist() for name in expected}
    ours["group_zscore"] = adv.group_zscore(REWARD_S, GROUP_S, eps=0).tolist()
    for name, values in expected.items():
        assert ours[name] == pytest.approx(values), name
    assert adv.opo(REWARD_S, LENGTH_S, GROUP_S).tolist() == pytest.approx([0.25, -0.75, 1.25, -1.5, 0.5, 0])
    assert torch.equal(adv.group_zscore(REWARD_S, GROUP_S, scale="none"), adv.group_mean(REWARD_S, GROUP_S))


def test_scale_and_eps_are_those_of_trl() -> None:
    """TRL: deviation with n - 1, eps 1e-4; over the batch it is that of the rewards, not of the centred ones."""
    group = statistics.stdev([1, 0, 2]) + 1e-4
    batch = statistics.stdev(REWARD_S.tolist()) + 1e-4
    assert adv.group_zscore(REWARD_S, GROUP_S)[1].item() == pytest.approx(-1 / group, rel=1e-12)
    assert adv.group_zscore(REWARD_S, GROUP_S, scale="batch")[1].item() == pytest.approx(-1 / batch, rel=1e-12)
    raw = [0, -1.5, 1.5, -2, 2, 0]
    expected = [(x - statistics.mean(raw)) / (statistics.stdev(raw) + 1e-4) for x in raw]
    assert adv.leave_one_out(REWARD_S, GROUP_S, scale="batch").tolist() == pytest.approx(expected)


def test_a_sample_that_was_not_scored_is_in_no_mean() -> None:
    """The group of 1, None, 2: mean 1.5, others' means 2 and 1. Counting None as 0 would give a mean of 1."""
    reward_S, group_S = adv.from_list([1, None, 2], dtype=torch.float64), torch.zeros(3).long()
    assert adv.group_mean(reward_S, group_S).tolist() == [-0.5, 0, 0.5]
    assert adv.leave_one_out(reward_S, group_S).tolist() == [-1, 0, 1]
    assert adv.opo(reward_S, t(1, 100, 3), group_S).tolist() == pytest.approx([-0.75, 0, 0.25])
    assert adv.group_zscore(reward_S, group_S, eps=0).tolist() == pytest.approx([-math.sqrt(0.5), 0, math.sqrt(0.5)])


@every
def test_a_sample_alone_has_no_advantage(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    """verl gives a lone sample its raw reward (GRPO: mean 0, deviation 1; its RLOO too, where its vectorised RLOO says
    0): a prompt sampled once would push its answer up whatever the answer. Here it is 0, as in TRL."""
    verl = (3.0 - 0.0) / (1.0 + 1e-6)
    assert verl == pytest.approx(3.0)
    assert estimator(t(3, 4, 6), torch.tensor([-1, -1, -1])).tolist() == [0, 0, 0]
    assert estimator(t(3, NAN, NAN), torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_exactly_no_advantage(
    estimator: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """0.1 added up seven times and divided by 7 need not be 0.1; over an eps of 1e-4 the rest would be an advantage."""
    reward_S = torch.full((7,), 0.1, dtype=dtype)
    assert estimator(reward_S, torch.zeros(7).long()).tolist() == [0] * 7


@every
def test_permuting_samples_permutes_advantages(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    order_S = torch.tensor([4, 0, 5, 2, 3, 1])
    if estimator is ESTIMATORS["opo"]:
        ours = adv.opo(REWARD_S[order_S], LENGTH_S[order_S], GROUP_S[order_S])
        torch.testing.assert_close(ours, adv.opo(REWARD_S, LENGTH_S, GROUP_S)[order_S])
        return
    ours = estimator(REWARD_S[order_S], GROUP_S[order_S])
    torch.testing.assert_close(ours, estimator(REWARD_S, GROUP_S)[order_S])


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in ("zscore_batch", "gdpo")])
def test_groups_do_not_touch_each_other(name: str) -> None:
    estimator = ESTIMATORS[name]
    alone = estimator(REWARD_S[:3], GROUP_S[:3])
    torch.testing.assert_close(estimator(REWARD_S, GROUP_S)[:3], alone)


@every
def test_all_unscored_empty_and_half_precision(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert estimator(t(NAN, math.inf, NAN), torch.tensor([0, 0, 1])).tolist() == [0, 0, 0]
    assert estimator(torch.zeros(0), torch.zeros(0).long()).shape == (0,)
    assert estimator(REWARD_S.bfloat16(), GROUP_S).dtype == torch.float32
    assert not estimator(REWARD_S.clone().requires_grad_(), GROUP_S).requires_grad


@every
def test_nothing_waits_for_the_device(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Tensors without storage cannot be asked for a value, so whatever would wait for a device fails on them."""
    with torch.device("meta"):
        assert estimator(torch.zeros(4), torch.zeros(4).long()).shape == (4,)
        seq_T, x_T = torch.zeros(6).long(), torch.zeros(6)
        assert adv.reinforce_pp(torch.zeros(4), seq_T, x_T.bool(), kl_T=x_T, kl_coef=0.1).shape == (6,)


def test_maxrl_of_a_prompt_never_solved_is_zero() -> None:
    assert adv.maxrl(t(0, 0, -1, -3), torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


def test_several_rewards_added_and_normalised_first() -> None:
    """Reward 1 is 0 or 1, reward 2 is 100 or 0: added, the second decides; normalised first, its weight does."""
    reward_SK = torch.tensor([[1.0, 0.0], [0.0, 100.0], [1.0, 0.0], [0.0, 100.0], [NAN, NAN]], dtype=torch.float64)
    group_S = torch.zeros(5).long()
    assert adv.total(reward_SK, weights=[1, 0.5]).tolist() == pytest.approx([1, 50, 1, 50, NAN], nan_ok=True)
    weighted = adv.gdpo(reward_SK, group_S, weights=[2, 1])
    assert weighted.tolist() == pytest.approx([math.sqrt(0.75), -math.sqrt(0.75)] * 2 + [0], abs=1e-3)
    with pytest.raises(ValueError, match="one for each of 2 rewards"):
        adv.gdpo(reward_SK, group_S, weights=[1])


def test_gdpo_by_the_statistics_module() -> None:
    rewards, eps = [[1.0, 4.0], [2.0, 0.0], [0.0, 2.0], [5.0, 5.0]], 1e-4
    groups = [[0, 1], [2, 3]]
    sums = [0.0] * 4
    for k, weight in enumerate([1.0, 0.3]):
        for members in groups:
            values = [rewards[s][k] for s in members]
            for s in members:
                sums[s] += weight * (rewards[s][k] - statistics.mean(values)) / (statistics.stdev(values) + eps)
    expected = [(x - statistics.mean(sums)) / (statistics.stdev(sums) + eps) for x in sums]
    ours = adv.gdpo(torch.tensor(rewards, dtype=torch.float64), torch.tensor([0, 0, 1, 1]), weights=[1.0, 0.3])
    assert ours.tolist() == pytest.approx(expected, rel=1e-9)


def test_reinforce_pp_whitens_over_trained_tokens() -> None:
    """Returns 1 1 | 3 over trained tokens (the second of sequence 0 is not): mean 5/3, variance 4/3."""
    seq_T, mask_T = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([1, 0, 1, 1, 0]).bool()
    ours = adv.reinforce_pp(t(1, 3), seq_T, mask_T, eps=0)
    low, high = (1 - 5 / 3) / math.sqrt(4 / 3), (3 - 5 / 3) / math.sqrt(4 / 3)
    assert ours.tolist() == pytest.approx([low, 0, low, high, 0])
    assert adv.reinforce_pp(t(2, 2), seq_T, mask_T).tolist() == [0] * 5
    assert adv.reinforce_pp(t(NAN, 3), seq_T, mask_T).tolist() == [0] * 5


def test_reinforce_pp_charges_the_kl_still_to_come() -> None:
    """KL 1 2 4 | 8 at 0.5 each: to go 3.5 3 2 | 4, so returns -2.5 -2 -1 | -1."""
    seq_T, mask_T = torch.tensor([0, 0, 0, 1]), torch.ones(4).bool()
    ours = adv.reinforce_pp(t(1, 3), seq_T, mask_T, kl_T=t(1, 2, 4, 8), kl_coef=0.5, eps=0)
    returns = [-2.5, -2, -1, -1]
    expected = [(x - statistics.mean(returns)) / statistics.stdev(returns) for x in returns]
    assert ours.tolist() == pytest.approx(expected)
    split = torch.tensor([3, 0, 1, 2])  # sequence 1 first: the same numbers at their new places
    moved = adv.reinforce_pp(t(1, 3), seq_T[split], mask_T, kl_T=t(1, 2, 4, 8)[split], kl_coef=0.5, eps=0)
    assert moved.tolist() == pytest.approx([expected[i] for i in split.tolist()])
    with pytest.raises(ValueError, match="together"):
        adv.reinforce_pp(t(1, 3), seq_T, mask_T, kl_coef=0.5)


def test_reinforce_pp_baseline_by_hand() -> None:
    """Group means 1 and 4: centred 0 | -1 over two tokens | 1 | alone 0, whitened over five tokens."""
    seq_T = torch.tensor([0, 1, 1, 2, 3])
    ours = adv.reinforce_pp_baseline(t(1, 0, 2, 9), torch.tensor([5, 5, 5, 6]), seq_T, torch.ones(5).bool(), eps=0)
    values = [0, -1, -1, 1, 0]
    assert ours.tolist() == pytest.approx([(x - statistics.mean(values)) / statistics.stdev(values) for x in values])


def test_advantages_are_laid_on_tokens_and_filler_has_none() -> None:
    assert adv.per_token(t(1, 2), torch.tensor([0, 0, 1, 2])).tolist() == [1, 1, 2, 0]


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "scale": (lambda: adv.group_zscore(REWARD_S, GROUP_S, scale="all"), "scale: expected one of group"),
    "loo scale": (lambda: adv.leave_one_out(REWARD_S, GROUP_S, scale="group"), "scale: expected one of none"),
    "lengths": (lambda: adv.group_mean(REWARD_S, GROUP_S[:3]), "one length"),
    "matrix": (lambda: adv.gdpo(REWARD_S, GROUP_S), r"expected shape \[S, K\]"),
    "eps": (lambda: adv.group_zscore(REWARD_S, GROUP_S, eps=-1), "eps: expected a number"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_honoured_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
