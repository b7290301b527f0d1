"""Masks by selects, values with slopes and sums by runs give what the plain forms give. Shapes: T tokens."""

from __future__ import annotations

import math

import pytest
import torch

from ft.losses.aggregate import Sequences
from ft.losses.elementwise import Mask, greater, less, where_over, where_within, with_slope
from ft.losses.reduce import keep

SEQ_T = torch.tensor([2, 2, 0, 5, 5, 2])  # 2 comes back: order does not matter
X_T = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mask_keeps_what_where_keeps(dtype: torch.dtype) -> None:
    mask_T = torch.tensor([True, False, False, True, False])
    x_T = torch.tensor([1.5, math.nan, math.inf, -2.0, 3.0], dtype=dtype)
    ours_T, plain_T = Mask(mask_T).keep(x_T), keep(x_T, mask_T)
    assert torch.equal(ours_T, plain_T) and ours_T.dtype == plain_T.dtype and x_T[1].isnan()
    assert Mask(mask_T).trained_T.tolist() == [1, 0, 0, 1, 0]
    in_place_T = plain_T.new_tensor(x_T.tolist())
    assert torch.equal(Mask(mask_T).keep_(in_place_T), plain_T) and torch.equal(in_place_T, plain_T)


def test_selects_by_another_tensor_leave_out_its_bounds_and_what_is_not_finite() -> None:
    x_T, y_T = torch.tensor([1.0, math.nan, 2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0, -3.0])
    assert where_over(x_T, y_T, 1.0).tolist() == [0, 0, 2, 0]
    assert where_within(torch.ones(4), torch.tensor([-2.0, 2.0, 1.9, -1.9]), 2.0).tolist() == [0, 0, 1, 1]


def test_comparisons_and_slopes() -> None:
    x_T = torch.tensor([-30.0, -1.0, 5.0, 30.0, math.nan], requires_grad=True)
    assert greater(x_T, 5).tolist() == [0, 0, 0, 1, 0] and less(x_T, 5).tolist() == [1, 1, 0, 0, 0]
    cubed = with_slope(x_T, x_T.detach() ** 3, 3 * x_T.detach() ** 2)[1:3].sum()
    assert cubed.item() == 124
    grad_T = torch.autograd.grad(cubed, x_T, create_graph=True)[0]
    assert grad_T[1:3].tolist() == [3, 75]
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        torch.autograd.grad(grad_T[2], x_T)
    laid = with_slope(x_T, torch.tensor(7.0), torch.tensor([2.0]), scale=0.5, lay=lambda slope_N: slope_N.expand(5))
    assert laid.item() == 7 and torch.autograd.grad(3 * laid, x_T)[0].tolist() == [3] * 5
    whole = with_slope(x_T, torch.tensor(7.0), torch.arange(5.0))
    assert whole.item() == 7 and torch.autograd.grad(2 * whole, x_T)[0].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("by_runs", [True, False])
def test_sums_and_means_of_sequences_by_hand(by_runs: bool) -> None:
    sequences = Sequences(SEQ_T, torch.tensor([True, True, True, True, False, True]))
    if not by_runs:
        sequences.__dict__["_runs"] = None  # as on a device
    x_T = X_T.clone().requires_grad_()
    assert sequences.sum(x_T).tolist() == [35, 35, 4, 24, 24, 35]
    assert sequences.mean(x_T).tolist() == pytest.approx([35 / 3, 35 / 3, 4, 24, 24, 35 / 3])
    assert sequences.length_T.tolist() == [3, 3, 1, 1, 1, 3] and sequences.trained.item() == 3
    grad_T = torch.autograd.grad(sequences.mean(x_T)[0], x_T)[0]
    assert grad_T.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0, 0, 1 / 3])


def test_sums_by_offsets_by_hand() -> None:
    """Sequences of 2, 0 and 3 tokens, and one token of filler."""
    sequences = Sequences(None, torch.tensor([True, True, False, True, True, False]), torch.tensor([0, 2, 2, 5]))
    assert sequences.sums(X_T).tolist() == [3, 0, 28]
    assert sequences.lay(torch.tensor([5.0, 6.0, 7.0])).tolist() == [5, 5, 7, 7, 7, 0]
    assert sequences.trained_S.tolist() == [2, 0, 2] and sequences.trained.item() == 2
    assert sequences.mean(X_T).tolist() == [1.5, 1.5, 14, 14, 14, 0]


def test_sequences_of_one_length_are_summed_as_rows_to_the_same() -> None:
    """Of two tokens each: rows where nothing is left over, runs where a token of filler follows."""
    mask_T, cu_S1 = torch.tensor([True, True, False, True, False, False]), torch.tensor([0, 2, 4, 6])
    rows, runs = Sequences(None, mask_T, cu_S1), Sequences(None, torch.cat([mask_T, mask_T[:1]]), cu_S1)
    by_ids = Sequences(torch.tensor([7, 7, 3, 3, 0, 0]) % 7, mask_T)  # 0, 3 and 0 again: rows of two runs' sums
    assert rows._runs is not None and rows._runs.width == 2 and runs._runs is not None and runs._runs.width is None
    assert rows.sums(X_T).tolist() == runs.sums(torch.cat([X_T, X_T[:1]])).tolist() == [3, 12, 48]
    assert rows.lay(torch.tensor([5.0, 6.0, 7.0])).tolist() == [5, 5, 6, 6, 7, 7]
    assert rows.lay_trained(torch.tensor([5.0, 6.0, 7.0])).tolist() == [5, 5, 0, 6, 0, 0]
    for sequences in (rows, by_ids):
        halves_S = 0.5 * torch.arange(3)
        expected_T = X_T * sequences.lay(halves_S)
        assert torch.equal(sequences.weighed_(X_T.clone(), halves_S), expected_T)
    assert rows.trained_S.tolist() == [2, 1, 0] and by_ids.sum(X_T).tolist() == [51, 51, 12, 12, 51, 51]
    single = Sequences(None, mask_T[:1], torch.tensor([0, 1]))
    value_S = torch.tensor([5.0])
    assert single.lay(value_S).mul_(2).tolist() == [10] and value_S.tolist() == [5]  # a copy, not a view


@pytest.mark.parametrize("bad", [-1, 7])
def test_ids_outside_the_tokens_are_refused(bad: int) -> None:
    seq_T = torch.where(SEQ_T == 5, bad, SEQ_T)
    with pytest.raises(ValueError, match=r"seq_T: expected ids in 0 \.\. 6"):
        Sequences(seq_T, SEQ_T > 0).sum(X_T)
