"""Importance weights and masks: by hand, against TRL, and where Axolotl differs. Shapes: T packed tokens."""

from __future__ import annotations

import math
from typing import Any

import oracles_grpo as oracle
import pytest
import torch
from torch import Tensor

from ft.losses.clipped import grpo
from ft.losses.importance import keep_by_kl, weights

torch.set_num_threads(1)


def of_ratios(*values: float) -> tuple[Tensor, Tensor, Tensor]:
    """logp_T, sampled_logp_T and mask_T of trained tokens whose ratios are ``values``."""
    ratio_T = torch.tensor(values, dtype=torch.float64)
    return ratio_T.log() - 3, torch.full_like(ratio_T, -3.0), torch.ones(len(values)).bool()


def test_truncation_and_masking_by_hand() -> None:
    args = of_ratios(1.0, 5.0, 0.1)
    options: dict[str, Any] = {"seq_T": None, "level": "token", "cap": 3.0}
    assert weights(*args, **options).tolist() == pytest.approx([1, 3, 0.1])
    assert weights(*args, **options, floor=0.5).tolist() == pytest.approx([1, 3, 0.5])
    assert weights(*args, **options, mode="mask").tolist() == pytest.approx([1, 0, 0.1])
    assert weights(*args, **options, mode="mask", floor=0.5).tolist() == pytest.approx([1, 0, 0])


def test_a_masked_outlier_stays_masked() -> None:
    """Axolotl masks r > cap to 0 and then clamps to at least 1 / cap: a ratio of 5, masked for being an outlier,
    trains at 1/3, and one of 0.1 is raised to 1/3. What is masked here weighs 0 and is counted."""
    cap = 3.0
    logp_T, sampled_T, mask_T = of_ratios(1.0, 5.0, 0.1)
    ratio_T = (logp_T - sampled_T).exp()
    axolotl = ratio_T.masked_fill(ratio_T > cap, 0.0).clamp(min=1 / cap)
    assert axolotl.tolist() == pytest.approx([1, 1 / 3, 1 / 3])
    ours = weights(logp_T, sampled_T, mask_T, None, level="token", mode="mask", cap=cap, floor=1 / cap)
    assert ours.tolist() == pytest.approx([1, 0, 0])
    out = grpo(logp_T, None, torch.ones(3), mask_T, is_weight_T=ours)
    assert out.sums["is_zero"].item() == pytest.approx(2 / 3)


def test_levels_by_hand() -> None:
    """Sequence 0 has ratios 2 and 2 (product 4, geometric mean 2), sequence 1 has 0.5; the untrained token has 9."""
    logp_T, sampled_T, _ = of_ratios(2.0, 0.5, 9.0, 2.0)
    mask_T, seq_T = torch.tensor([True, True, False, True]), torch.tensor([0, 1, 0, 0])
    options: dict[str, Any] = {"seq_T": seq_T, "cap": 10.0}
    for level, expected in {"token": [2, 0.5, 1, 2], "sequence": [4, 0.5, 1, 4], "geometric": [2, 0.5, 1, 2]}.items():
        assert weights(logp_T, sampled_T, mask_T, level=level, **options).tolist() == pytest.approx(expected), level


def test_a_product_over_a_long_answer_passes_any_cap() -> None:
    logp_T = torch.full((100,), -1.0)
    args = logp_T, logp_T - 0.012, torch.ones(100).bool(), torch.zeros(100).long()
    assert weights(*args, level="sequence", mode="mask", cap=3.0).sum() == 0
    assert weights(*args, level="geometric", mode="mask", cap=3.0)[0].item() == pytest.approx(math.exp(0.012), rel=1e-5)


def test_a_missing_sampler_logprob_is_a_ratio_of_one() -> None:
    logp_T = torch.tensor([-1.0, -2.0, math.nan], requires_grad=True)
    sampled_T = torch.tensor([math.nan, -2.0 - math.log(2), math.nan])
    mask_T, seq_T = torch.tensor([True, True, False]), torch.zeros(3).long()
    for level, expected in {"token": [1, 2, 1], "sequence": [2, 2, 1]}.items():
        w_T = weights(logp_T, sampled_T, mask_T, seq_T, level=level, cap=9.0)
        assert w_T.tolist() == pytest.approx(expected) and not w_T.requires_grad


def test_weights_stay_finite_and_empty_calls_work() -> None:
    apart = torch.tensor([-1e4, -1.0]), torch.tensor([-1.0, -torch.inf]), torch.ones(2).bool()
    assert weights(*apart, None, level="token", cap=3.0).tolist() == pytest.approx([0, 3], abs=1e-8)
    empty = torch.zeros(0), torch.zeros(0), torch.zeros(0).bool(), torch.zeros(0).long()
    assert weights(*empty, level="sequence", cap=3.0).shape == (0,)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_weights_are_those_of_trl(level: str, mode: str) -> None:
    """TRL computes them amid generation, so its formula is restated: exp of the masked difference, summed over rows."""
    c = oracle.case(drift=0.5)
    difference_BW = (c.old_BW - c.sampled_BW) * c.mask_BW
    if level == "sequence":
        difference_BW = difference_BW.sum(1, keepdim=True).expand_as(difference_BW)
    ratio_BW = difference_BW.exp()
    clipped_BW = ratio_BW.clamp(0.7, 1.5) if mode == "truncate" else ratio_BW.masked_fill(
        (ratio_BW < 0.7) | (ratio_BW > 1.5), 0.0
    )  # fmt: skip
    ours = c.is_weight_T(level=level, mode=mode, cap=1.5, floor=0.7)
    mask_T = c.args[3]
    torch.testing.assert_close(ours[mask_T], c.pack(clipped_BW)[mask_T])
    assert (ours[mask_T] != c.pack(ratio_BW)[mask_T]).any()


def test_sequences_left_behind_are_dropped_where_their_advantage_is_negative() -> None:
    """Sequence 0: the policy's log-probs fell by 0.4 and 0 (mean 0.2), A < 0. Sequence 1 fell by 1, A > 0."""
    sampled_T = torch.tensor([-1.0, -1.0, -1.0, math.nan])
    logp_T = sampled_T - torch.tensor([0.4, 0.0, 1.0, 5.0])
    adv_T, seq_T = torch.tensor([-1.0, -1.0, 1.0, -1.0]), torch.tensor([0, 0, 1, 2])
    mask_T = torch.ones(4).bool()
    assert keep_by_kl(logp_T, sampled_T, adv_T, mask_T, seq_T, threshold=0.1).tolist() == [False, False, True, True]
    assert keep_by_kl(logp_T, sampled_T, adv_T, mask_T, seq_T, threshold=0.3).tolist() == [True] * 4
    assert not keep_by_kl(logp_T, sampled_T, adv_T, ~mask_T, seq_T, threshold=0.3).any()


def test_the_sequence_mask_is_trls() -> None:
    pytest.importorskip("trl")
    from trl import GRPOTrainer

    c = oracle.case(drift=0.5)
    sampled_BW = c.sampled_BW.clone()
    sampled_BW[1, 1] = math.nan
    mask_BW = c.mask_BW.float()
    seen = set()
    for threshold in (-0.2, 0.0, 0.2):
        theirs_B1 = GRPOTrainer.get_off_policy_mask(c.adv_B[:, None], c.logp_BW, sampled_BW, mask_BW, threshold)
        logp_T, _, adv_T, mask_T = c.args
        ours = keep_by_kl(logp_T, c.pack(sampled_BW), adv_T, mask_T, c.seq_T, threshold=threshold)
        assert torch.equal(ours[mask_T], c.pack(theirs_B1.bool().expand_as(c.mask_BW))[mask_T])
        seen.add(tuple(theirs_B1.flatten().tolist()))
    assert len(seen) > 1


def test_nothing_waits_for_the_device() -> None:
    """Tensors without storage cannot be asked for a value, so whatever would wait for a device fails on them."""
    x_T, seq_T = torch.zeros(4, device="meta"), torch.zeros(4, device="meta").long()
    for level in ("token", "sequence", "geometric"):
        assert weights(x_T, x_T, x_T.bool(), seq_T, level=level, mode="mask", cap=3.0, floor=0.1).shape == (4,)
    assert keep_by_kl(x_T, x_T, x_T, x_T.bool(), seq_T, threshold=0.1).shape == (4,)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "level": ({"level": "batch", "cap": 3.0}, "level: expected one of token"),
    "mode": ({"level": "token", "cap": 3.0, "mode": "drop"}, "mode: expected one of truncate"),
    "cap": ({"level": "token", "cap": 0.0}, "cap: expected a number"),
    "floor over cap": ({"level": "token", "cap": 3.0, "floor": 4.0}, "floor: expected a number"),
    "no ids": ({"level": "sequence", "cap": 3.0}, "expected seq_T"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights(*of_ratios(1.0, 2.0), None, **options)
