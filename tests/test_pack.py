"""Packing: hand-worked arrays, and the promises that hold for any examples."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft.data.pack import FILLER, collate, count, pack, pack_rows, positions, segment_sum, shard
from ft.errors import DataError
from ft.types import Counts, Example


def example(tokens, mask=None, **fields):
    tokens_L = np.array(tokens, np.int32)
    mask_L = np.ones(len(tokens), bool) if mask is None else np.array(mask, bool)
    return Example(tokens_L=tokens_L, mask_L=mask_L, **fields)


def of_length(n, **fields):
    return example(range(n), **fields)


def test_collate_by_hand():
    a = example([5, 6, 7], [0, 1, 1], source="a:1", unit=40, group=3)
    b = example([8, 9], [1, 0], source="a:2")
    c = example([1, 2, 3, 4], [1, 0, 0, 1], source="a:3", unit=40)
    batch = collate([a, b, c])
    assert batch.input_T.tolist() == [5, 6, 8, 1, 2, 3]
    assert batch.target_T.tolist() == [6, 7, 9, 2, 3, 4]
    assert batch.pos_T.tolist() == [0, 1, 0, 0, 1, 2]
    assert batch.seq_T.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.cu_S1.tolist() == [0, 2, 3, 6]
    assert batch.mask_T.tolist() == [True, True, False, False, False, True]
    assert batch.trained_N.tolist() == [0, 1, 5]
    assert batch.lengths == (2, 1, 3)
    assert batch.unit_S.tolist() == [0, 1, 0]
    assert batch.group_S.tolist() == [3, -1, -1]
    assert batch.sources == ("a:1", "a:2", "a:3")
    assert batch.sampled_logp_T is batch.adv_T is batch.ce_T is batch.label_S is batch.margin_S is None
    assert batch.cu_S1.dtype == torch.int32 and batch.mask_T.dtype == torch.bool
    for name in ("input_T", "target_T", "pos_T", "seq_T", "trained_N", "unit_S", "group_S"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert count(batch) == Counts(tokens=3, ce_tokens=0, seqs=3, units=2, inputs=6)


def test_streams_are_shifted_like_the_mask():
    a = example(
        [5, 6, 7], [1, 1, 0], sampled_logp_L=[0, -1, -2], adv_L=[9, 1, 2], ce_L=[9, 0.5, 2], label=1, margin=0.5
    )
    b = example([8, 9], sampled_logp_L=[0, -3], adv_L=[9, 3], ce_L=[9, 0.25], label=0, margin=1.5)
    batch = collate([a, b])
    assert batch.sampled_logp_T is not None and batch.sampled_logp_T.tolist() == [-1, -2, -3]
    assert batch.adv_T is not None and batch.adv_T.tolist() == [1, 2, 3]
    assert batch.ce_T is not None and batch.ce_T.dtype == torch.float32 and batch.ce_T.tolist() == [0.5, 2, 0.25]
    assert batch.label_S is not None and batch.label_S.tolist() == [1, 0]
    assert batch.margin_S is not None and batch.margin_S.tolist() == [0.5, 1.5]
    assert count(batch).ce_tokens == 0.75  # the 2 stands where nothing is trained


@pytest.mark.parametrize("field", ["sampled_logp_L", "adv_L", "ce_L", "label", "margin"])
def test_a_field_of_only_some_examples_is_an_error(field):
    value = 1.0 if field in ("label", "margin") else np.zeros(3, np.float32)
    with pytest.raises(DataError, match=f"b:2.*{field} is missing in 1 of the 2"):
        collate([of_length(3, source="b:1", **{field: value}), of_length(3, source="b:2")])


def test_filler():
    batch = collate([])
    assert len(batch.input_T) == FILLER and batch.lengths == () and batch.cu_S1.tolist() == [0]
    assert batch.seq_T.tolist() == [0] * FILLER  # S = 0: belongs to no sequence
    assert not batch.mask_T.any() and batch.trained_N.numel() == batch.unit_S.numel() == 0
    assert count(batch) == Counts()
    assert segment_sum(torch.full((FILLER,), torch.nan), batch.seq_T, 0).shape == (0,)


def test_best_fit_decreasing_by_hand():
    sizes = [3, 6, 5, 2, 4]  # budget 10: 6, 5 -> apart; 4 joins 6 (fuller than 5); 3 joins 5; 2 joins 5 + 3
    packs = pack([of_length(n + 1, source=str(n)) for n in sizes], tokens=10)
    assert [[e.source for e in p] for p in packs] == [["6", "4"], ["5", "3", "2"]]


def test_a_budget_is_met_exactly():
    assert len(pack([of_length(5), of_length(5)], tokens=8)) == 1
    assert len(pack([of_length(5), of_length(5)], tokens=7)) == 2


def test_too_long_says_where_and_what_to_do():
    with pytest.raises(DataError) as error:
        pack([of_length(4), of_length(12, source="f.jsonl:17")], tokens=10)
    for part in ("f.jsonl:17: this", "at most 10", "got: 11\n", "batch.tokens=11", "data.max_tokens=11 or less"):
        assert part in str(error.value)


def test_of_a_unit_that_is_too_long_the_longest_example_is_named():
    """Units of 6 + 7 and 6 + 12 positions."""
    for length, what, got in ((8, "its unit of 2 examples", "7, and 13"), (13, "this example", "12, and 18")):
        pair = [of_length(7, source="f.jsonl:1", unit=0), of_length(length, source="f.jsonl:2", unit=0)]
        with pytest.raises(DataError) as error:
            pack(pair, tokens=10)
        assert str(error.value).startswith(f"f.jsonl:2: {what}") and f"got: {got} with" in str(error.value)
        assert f"batch.tokens={5 + length} or more, or a smaller data.max_tokens" in str(error.value)


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_to_predict(length):
    with pytest.raises(DataError, match="g:3: there is nothing to predict"):
        pack([of_length(length, source="g:3")], tokens=10)


lists = st.lists(st.tuples(st.integers(2, 21), st.none() | st.integers(0, 5)), max_size=40)


def build(rows):
    """Examples of these (length, unit), known by their sources; units that would not fit lose their number."""
    totals: dict[int, int] = {}
    examples = []
    for i, (n, unit) in enumerate(rows):
        if unit is not None and totals.setdefault(unit, 0) + n - 1 > 20:
            unit = None
        if unit is not None:
            totals[unit] += n - 1
        examples.append(of_length(n, unit=unit, source=str(i)))
    return examples


@settings(max_examples=150, deadline=None)
@given(lists, st.integers(1, 5))
def test_promises(rows, world):
    examples = build(rows)
    packs = pack(examples, tokens=20)
    names = [[e.source for e in p] for p in packs]
    assert sorted(int(name) for p in names for name in p) == list(range(len(examples)))  # each exactly once
    assert all(0 < positions(p) <= 20 for p in packs)
    for unit in {e.unit for e in examples} - {None}:
        assert sum(any(e.unit == unit for e in p) for p in packs) == 1  # whole
    assert names == [[e.source for e in p] for p in pack(examples, tokens=20)]  # the same again
    assert all(positions(a) + positions(b) > 20 for a, b in itertools.combinations(packs, 2))  # none can be joined

    shards = [shard(packs, rank=rank, world=world) for rank in range(world)]
    assert {len(s) for s in shards} == {-(-len(packs) // world)}
    dealt = [[e.source for e in p] for s in shards for p in s if p]
    assert sorted(dealt) == sorted(names)
    totals = [sum(positions(p) for p in s) for s in shards]
    assert max(totals) - min(totals) <= 20  # within one pack


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60))
def test_best_fit_is_the_naive_best_fit(sizes):
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fits = [b for b in bins if sum(b) + size <= 30]
        best = max(fits, key=sum, default=None)
        if best is None:
            bins.append([size])
        else:
            best.append(size)
    ours = pack([of_length(n + 1) for n in sizes], tokens=30)
    assert sorted(positions(p) for p in ours) == sorted(sum(b) for b in bins)


def test_shard_takes_rounds_of_like_length():
    packs = [[of_length(n + 1)] for n in (1, 8, 7, 2, 6)]
    two = [[positions(p) for p in shard(packs, rank=r, world=2)] for r in range(2)]
    assert two == [[8, 2, 1], [7, 6, 0]]
    assert [shard(packs[:1], rank=r, world=3) for r in range(3)] == [[packs[0]], [[]], [[]]]
    assert shard([], rank=0, world=2) == []


def test_collate_of_packs_covers_every_example():
    rng = np.random.default_rng(0)
    examples = [example(rng.integers(0, 99, n), source=str(i)) for i, n in enumerate(rng.integers(2, 30, 50))]
    for p in pack(examples, tokens=64):
        batch = collate(p)
        for s, (e, length) in enumerate(zip(p, batch.lengths, strict=True)):
            at = slice(int(batch.cu_S1[s]), int(batch.cu_S1[s]) + length)
            assert batch.input_T[at].tolist() + batch.target_T[at].tolist()[-1:] == e.tokens_L.tolist()


def test_segment_sum_and_its_gradient():
    x_T = torch.tensor([1.0, 2, 3, 4, torch.nan], requires_grad=True)
    x_S = segment_sum(x_T, torch.tensor([0, 0, 2, 0, 3]), 3)
    assert x_S.tolist() == [7, 0, 3]
    (x_S * torch.tensor([1.0, 5, 10])).sum().backward()
    assert x_T.grad is not None and x_T.grad.tolist() == [1, 1, 10, 1, 0]


def test_segment_sum_keeps_float32_and_more():
    ones = torch.ones(1000, dtype=torch.bfloat16)  # bfloat16 stops counting at 256
    assert segment_sum(ones, torch.zeros(1000, dtype=torch.int64), 1).tolist() == [1000]
    assert segment_sum(ones.double(), torch.zeros(1000, dtype=torch.int64), 1).dtype == torch.float64
    assert segment_sum(torch.ones(3, 2), torch.tensor([0, 1, 1]), 2).tolist() == [[1, 1], [2, 2]]


def test_padded_rows_fill_a_rectangle_of_the_budget_at_most():
    def row(length: int, unit: int | None = None) -> Example:
        tokens, mask = np.zeros(length, np.int32), np.ones(length, bool)
        return Example(tokens_L=tokens, mask_L=mask, unit=unit)

    # positions 10, 9, 4, 3, 3, 1 under a budget of 20: [10, 9] fills 20; [4, 3, 3, 1] fills 16
    packs = pack_rows([row(n) for n in (4, 11, 4, 5, 10, 2)], tokens=20)
    assert [[len(e) - 1 for e in p] for p in packs] == [[10, 9], [4, 3, 3, 1]]
    assert all(len(p) * max(len(e) - 1 for e in p) <= 20 for p in packs)
    # a unit is never split, even where its own rectangle is over the budget
    assert [len(p) for p in pack_rows([row(15, 1), row(5, 1), row(3)], tokens=20)] == [2, 1]
