"""How far a policy has moved: by hand, in parts, by offsets, and where nothing is trained.

Shapes: T packed tokens.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ft.losses import drift
from ft.losses.watch import Drift

torch.set_num_threads(1)
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
SEQ_T = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
MASK_T = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 1]).bool()
every_level = pytest.mark.parametrize("level", LEVELS)


def ratios(*values: float) -> tuple[Tensor, Tensor, Tensor]:
    """logp, old_logp and mask of trained tokens whose ratios are ``values``; every old probability is 0.25."""
    old_T = torch.full((len(values),), math.log(0.25), dtype=torch.float64)
    return old_T + torch.tensor(values, dtype=torch.float64).log(), old_T, torch.ones(len(values)).bool()


def sample(gap: float = 0.3) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return -noise[0].abs(), -noise[0].abs() + gap * noise[1]


def numbers(found: Drift) -> dict[str, float]:
    return {name: x.item() for name, x in {**found.sums, **found.maxes}.items()}


def test_of_tokens_by_hand() -> None:
    """r - 1 - log r of ratios 1.5 and 0.5, twice each."""
    k3 = (2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))) / 4
    expected = {"approx_kl": k3, "ratio": 1.0, "ratio_max": 1.5, "ratio_inverse_max": 2.0}
    assert numbers(drift(*ratios(1.5, 0.5, 1.5, 0.5))) == pytest.approx(expected)
    of_eight = {"approx_kl": k3 / 2, "ratio": 0.5, "ratio_max": 1.5, "ratio_inverse_max": 2.0}
    assert numbers(drift(*ratios(1.5, 0.5, 1.5, 0.5), tokens=8)) == pytest.approx(of_eight)


@pytest.mark.parametrize(
    ("level", "first", "second"),
    [("sequence", 2.0, 0.25), ("sequence_token", 2.0, 0.25), ("sequence_sum", 4.0, 0.25)],
)
def test_of_sequences_by_hand(level: str, first: float, second: float) -> None:
    """Answers of ratios 1 and 4 (a geometric mean of 2, a product of 4), and 1/4; the KL stays one of tokens."""
    found = numbers(drift(*ratios(1.0, 4.0, 0.25), seq_T=torch.tensor([0, 0, 1]), level=level))
    k3 = (3 - math.log(4) - 0.75 + math.log(4)) / 3
    expected = {"approx_kl": k3, "ratio": (2 * first + second) / 3, "ratio_max": first, "ratio_inverse_max": 4.0}
    assert found == pytest.approx(expected)


def test_it_is_exact_where_it_is_small() -> None:
    """k3 of d = 1e-3 is 5.0017e-7: a float32 exp(d) - 1 - d would be off by a tenth."""
    for level in ("token", "sequence"):
        found = drift(torch.full((64,), 1e-3), torch.zeros(64), torch.ones(64).bool(), cu_S1=CU_64, level=level)
        assert float(found.sums["approx_kl"]) == pytest.approx(math.expm1(1e-3) - 1e-3, rel=1e-3)


CU_64 = torch.tensor([0, 40, 64])


@every_level
@pytest.mark.parametrize("old", [True, False], ids=["the same", "none"])
def test_a_policy_that_has_not_moved_is_exactly_at_one(level: str, old: bool) -> None:
    logp_T = sample()[0].float()
    found = numbers(drift(logp_T, logp_T if old else None, MASK_T, seq_T=SEQ_T, level=level))
    assert found == {"approx_kl": 0.0, "ratio": 1.0, "ratio_max": 1.0, "ratio_inverse_max": 1.0}


@every_level
def test_parts_add_up_and_order_does_not_matter(level: str) -> None:
    logp_T, old_T = sample()
    whole = drift(logp_T, old_T, MASK_T, seq_T=SEQ_T, level=level)
    tokens = MASK_T.sum()
    for owner_S in ([0, 1, 0, 1], [2, 2, 0, 2]):  # the last leaves a part with nothing at all
        wheres = [torch.tensor(owner_S)[SEQ_T] == part for part in range(3)]
        parts = [
            drift(logp_T[w], old_T[w], MASK_T[w], seq_T=SEQ_T[w].unique(return_inverse=True)[1], level=level,
                  tokens=tokens) for w in wheres
        ]  # fmt: skip
        for name, value in whole.sums.items():
            torch.testing.assert_close(torch.stack([p.sums[name] for p in parts]).sum(), value)
        for name, value in whole.maxes.items():
            torch.testing.assert_close(torch.stack([p.maxes[name] for p in parts]).amax(), value)
    order_T = torch.tensor([9, 5, 3, 0, 6, 1, 7, 4, 2, 8])
    moved = drift(*(x[order_T] for x in (logp_T, old_T, MASK_T)), seq_T=SEQ_T[order_T], level=level)
    assert numbers(moved) == pytest.approx(numbers(whole))


@every_level
def test_offsets_give_what_ids_give(level: str) -> None:
    """The third of five sequences has no token, the second none that is trained. Filler holds NaN."""
    (logp_T, old_T), mask_T = sample(), MASK_T.clone()
    mask_T[3:5] = False
    by_id = drift(logp_T, old_T, mask_T, seq_T=SEQ_T, level=level)
    nan_T = torch.full((3,), math.nan)
    longer_T, older_T = (torch.cat([x, nan_T.to(x.dtype)]) for x in (logp_T, old_T))
    padded_T = torch.cat([mask_T, torch.zeros(3).bool()])
    by_offset = drift(longer_T, older_T, padded_T, cu_S1=torch.tensor([0, 3, 5, 5, 9, 10]), level=level)
    assert numbers(by_offset) == pytest.approx(numbers(by_id))


@every_level
@pytest.mark.parametrize("T", [0, 10])
def test_nothing_trained_is_zero(level: str, T: int) -> None:
    nan_T = torch.full((T,), math.nan)
    found = numbers(drift(nan_T, nan_T, torch.zeros(T).bool(), seq_T=SEQ_T[:T], level=level))
    assert found == dict.fromkeys(("approx_kl", "ratio", "ratio_max", "ratio_inverse_max"), 0.0)


@every_level
def test_untrained_places_are_never_seen_and_trained_ones_always(level: str) -> None:
    logp_T, old_T = sample()
    hole_T, old_hole_T = (torch.where(MASK_T, x, math.nan) for x in (logp_T, old_T))
    options: dict[str, Any] = {"seq_T": SEQ_T, "level": level}
    assert numbers(drift(hole_T, old_hole_T, MASK_T, **options)) == numbers(drift(logp_T, old_T, MASK_T, **options))
    logp_T[0] = math.nan
    assert all(math.isnan(x) for x in numbers(drift(logp_T, old_T, MASK_T, **options)).values())


@every_level
@pytest.mark.parametrize("gap", [500.0, -500.0])
def test_absurd_ratios_are_held_at_the_bound(level: str, gap: float) -> None:
    logp_T = torch.full((10,), -600.0)
    found = drift(logp_T, logp_T - gap, MASK_T, seq_T=SEQ_T, level=level)
    assert all(math.isfinite(x) for x in numbers(found).values())
    most = found.maxes["ratio_max" if gap > 0 else "ratio_inverse_max"]
    assert most.item() == pytest.approx(math.exp(20), rel=1e-5)


@every_level
def test_it_has_no_gradient_and_waits_for_no_device(level: str) -> None:
    logp_T, old_T = sample()
    found = drift(logp_T.requires_grad_(), old_T, MASK_T, seq_T=SEQ_T, level=level)
    assert not any(x.requires_grad for x in (*found.sums.values(), *found.maxes.values()))
    apart_T, old_apart_T, mask_T = (x.to("meta") for x in (logp_T, old_T, MASK_T))
    drift(apart_T, old_apart_T, mask_T, seq_T=SEQ_T.to("meta"), level=level)
    half = drift(logp_T.bfloat16(), old_T.bfloat16(), MASK_T, seq_T=SEQ_T, level=level)
    assert {x.dtype for x in (*half.sums.values(), *half.maxes.values())} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"level": "word"}, "level: expected one of token, sequence"),
        ({"level": "sequence"}, "expected seq_T"),
        ({"seq_T": SEQ_T, "cu_S1": torch.tensor([0, 10])}, "got both"),
        ({"old_logp_T": torch.zeros(1)}, "one length"),
        ({"mask_T": MASK_T.float()}, r"torch\.bool"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given: dict[str, Any], said: str) -> None:
    logp_T, old_T = sample()
    with pytest.raises(ValueError, match=said):
        drift(logp_T, **{"old_logp_T": old_T, "mask_T": MASK_T, **given})
