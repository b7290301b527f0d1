"""Examples into packed micro-batches: pack, deal out over ranks, lay end to end, count.

Shapes: T tokens of a micro-batch (packed, 1-D), S sequences, L tokens of one sequence (ragged), M layers with routed
experts, K experts per token. A sequence of L tokens takes L - 1 positions: inputs are ``tokens_L[:-1]``, targets
``tokens_L[1:]``. This is the only shift there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ft.errors import DataError
from ft.types import Batch, Counts, Example

FILLER = 8  # positions an idle rank forwards


def positions(examples: Sequence[Example]) -> int:
    """How many positions these examples forward."""
    return sum(len(example) - 1 for example in examples)


def pack(examples: Sequence[Example], *, tokens: int) -> list[list[Example]]:
    """Best-fit decreasing: each unit, longest first, goes to the fullest pack that has room for it.

    A pure function of its arguments, in O(n log n + n log tokens). Units stay whole and side by side.

    Args:
        tokens: most positions of one pack (``batch.tokens``).

    Raises:
        DataError: a unit longer than ``tokens``, or an example in which there is nothing to predict.
    """
    units = _units(examples)
    sizes = [_size(unit, tokens) for unit in units]
    packs: list[list[Example]] = []
    rooms = _Rooms(tokens)
    for i in sorted(range(len(units)), key=lambda i: (-sizes[i], i)):
        room = rooms.take(sizes[i])
        if room is None:
            packs.append([])
            room = (tokens, len(packs) - 1)
        space, at = room
        packs[at].extend(units[i])
        rooms.put(space - sizes[i], at)
    return packs


def pack_rows(examples: Sequence[Example], *, tokens: int) -> list[list[Example]]:
    """The same for padded rows: rows x longest row <= ``tokens``, rows of like length together.

    Units stay whole; a unit whose own rectangle is larger than ``tokens`` gets a batch by itself.

    Raises:
        DataError: a unit of more than ``tokens`` positions even without padding.
    """
    units = _units(examples)
    for unit in units:
        _size(unit, tokens)
    packs: list[list[Example]] = []
    longest = 0
    for i in sorted(range(len(units)), key=lambda i: (-max(map(len, units[i])), i)):
        if packs and (len(packs[-1]) + len(units[i])) * longest <= tokens:
            packs[-1].extend(units[i])
        else:
            packs.append(list(units[i]))
            longest = max(map(len, units[i])) - 1
    return packs


def _units(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples of one unit together, in the order of their first one; an example without a unit is one by itself."""
    units: dict[Any, list[Example]] = {}
    for i, example in enumerate(examples):
        units.setdefault(("own", i) if example.unit is None else example.unit, []).append(example)
    return list(units.values())


def _size(unit: Sequence[Example], tokens: int) -> int:
    for example in unit:
        if len(example) < 2:
            raise DataError(
                "there is nothing to predict in this example",
                where=example.source,
                expected="at least 2 tokens",
                got=f"{len(example)}",
                fix="drop rows that train nothing before they are packed",
            )
    size = positions(unit)
    if size > tokens:
        raise _too_long(unit, size, tokens)
    return size


def _too_long(unit: Sequence[Example], size: int, tokens: int) -> DataError:
    """Names one example: the longest, which does not fit by itself or takes most of what its unit needs."""
    longest = max(unit, key=len)
    alone = len(longest) - 1
    its = "this example" if alone > tokens else f"its unit of {len(unit)} examples, which must share a batch,"
    most = f"data.max_tokens={tokens + 1} or less" if len(unit) == 1 else "a smaller data.max_tokens"
    return DataError(
        f"{its} is longer than a micro-batch",
        where=longest.source,
        expected=f"at most {tokens} positions (batch.tokens)",
        got=f"{alone}" + (f", and {size} with the others of its unit" if len(unit) > 1 else ""),
        fix=f"set batch.tokens={size} or more, or {most}",
    )


class _Rooms:
    """Packs by the space left in them. A tree over spaces finds the least space >= size in O(log tokens)."""

    def __init__(self, tokens: int) -> None:
        self.leaves = 1 << tokens.bit_length()
        self.tree = [0] * (2 * self.leaves)  # how many packs lie below each node
        self.packs: dict[int, list[int]] = {}

    def put(self, space: int, pack: int) -> None:
        self.packs.setdefault(space, []).append(pack)
        self._add(space, 1)

    def take(self, size: int) -> tuple[int, int] | None:
        """(space, pack) of the fullest pack that has room, which leaves the tree; None if there is none."""
        space = self._least(size)
        if space is None:
            return None
        self._add(space, -1)
        return space, self.packs[space].pop()

    def _add(self, space: int, n: int) -> None:
        node = space + self.leaves
        while node:
            self.tree[node] += n
            node >>= 1

    def _least(self, size: int) -> int | None:
        node = size + self.leaves
        while not self.tree[node]:
            while node & 1:  # a right child: nothing larger below this parent
                node >>= 1
            if node == 0:
                return None
            node += 1
        while node < self.leaves:
            node = 2 * node if self.tree[2 * node] else 2 * node + 1
        return node - self.leaves


def shard(packs: Sequence[list[Example]], *, rank: int, world: int) -> list[list[Example]]:
    """This rank's packs: every rank gets the same number, missing ones being empty lists (filler batches).

    Ranks work in step, so that each round waits for its longest pack: rounds take packs of like length, longest
    first, and in a round the rank that has least so far gets the longest.
    """
    assert 0 <= rank < world
    order = sorted(range(len(packs)), key=lambda i: (-positions(packs[i]), i))
    totals = [0] * world
    mine: list[list[Example]] = []
    for start in range(0, len(order), world):
        ranks = sorted(range(world), key=lambda r: (totals[r], r))
        dealt = dict(zip(ranks, order[start : start + world], strict=False))
        mine.append(packs[dealt[rank]] if rank in dealt else [])
        for r, i in dealt.items():
            totals[r] += positions(packs[i])
    return mine


def collate(pack: Sequence[Example]) -> Batch:
    """Lay a pack end to end; an empty pack gives a filler batch, which has no sequences (S = 0).

    Per-token streams are shifted like the mask, so that ``x_T[t]`` belongs to ``target_T[t]``.

    Raises:
        DataError: only some of the examples have an optional field.
    """
    if not pack:
        return _filler()
    lengths = np.array([len(example) - 1 for example in pack], np.int64)
    shared = np.array([example.shared for example in pack], np.int64)
    cu_S1 = np.concatenate(([0], np.cumsum(lengths)))
    mask_T = _join(pack, lambda e: e.mask_L[1:], np.bool_)
    return Batch(
        input_T=torch.from_numpy(_join(pack, lambda e: e.tokens_L[:-1], np.int64)),
        target_T=torch.from_numpy(_join(pack, lambda e: e.tokens_L[1:], np.int64)),
        pos_T=torch.from_numpy(np.arange(cu_S1[-1]) - np.repeat(cu_S1[:-1] - shared, lengths)),
        seq_T=torch.from_numpy(np.repeat(np.arange(len(pack)), lengths)),
        cu_S1=torch.from_numpy(cu_S1.astype(np.int32)),
        mask_T=torch.from_numpy(mask_T),
        trained_N=torch.from_numpy(np.flatnonzero(mask_T)),
        lengths=tuple(lengths.tolist()),
        unit_S=torch.tensor(_unit_ids(pack), dtype=torch.int64),
        group_S=torch.tensor([-1 if e.group is None else e.group for e in pack], dtype=torch.int64),
        shared=tuple(shared.tolist()) if shared.any() else (),
        sources=tuple(e.source for e in pack),
        sampled_logp_T=_stream(pack, "sampled_logp_L"),
        old_logp_T=_stream(pack, "old_logp_L"),
        keep_T=_stream(pack, "keep_L"),
        ref_logp_T=_stream(pack, "ref_logp_L"),
        adv_T=_stream(pack, "adv_L"),
        routes_MTK=_routes(pack),
        ce_T=_stream(pack, "ce_L"),
        label_T=_stream(pack, "label_L"),
        label_S=_scalars(pack, "label"),
        margin_S=_scalars(pack, "margin"),
        against=collate(against) if (against := [e.against for e in pack if e.against is not None]) else None,
    )


def _filler() -> Batch:
    nothing, zeros = torch.zeros(0, dtype=torch.int64), torch.zeros(FILLER, dtype=torch.int64)
    return Batch(
        input_T=zeros,
        target_T=zeros.clone(),
        pos_T=torch.arange(FILLER),
        seq_T=zeros.clone(),
        cu_S1=torch.zeros(1, dtype=torch.int32),
        mask_T=torch.zeros(FILLER, dtype=torch.bool),
        trained_N=nothing,
        lengths=(),
        unit_S=nothing.clone(),
        group_S=nothing.clone(),
    )


def _join(pack: Sequence[Example], part: Callable[[Example], np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([part(example) for example in pack], dtype=dtype, casting="unsafe")


def _unit_ids(pack: Sequence[Example]) -> list[int]:
    """0, 1, ... by first appearance; an example without a unit is a unit by itself."""
    ids: dict[Any, int] = {}
    keys = [("own", i) if e.unit is None else e.unit for i, e in enumerate(pack)]
    return [ids.setdefault(key, len(ids)) for key in keys]


def _all_or_none(pack: Sequence[Example], name: str) -> bool:
    """Whether the pack has this field: all examples do, or none does."""
    missing = [e for e in pack if getattr(e, name) is None]
    if missing and len(missing) < len(pack):
        raise DataError(
            f"{name} is missing in {len(missing)} of the {len(pack)} examples of a micro-batch",
            where=missing[0].source,
            expected=f"{name} in all examples of a run, or in none",
            fix="fill it in where the examples are made (0 is a weight, too)",
        )
    return not missing


def _stream(pack: Sequence[Example], name: str) -> Tensor | None:
    if not _all_or_none(pack, name):
        return None
    for e in pack:
        assert len(getattr(e, name)) == len(e), f"{e.source}: {name} has not one value per token"
    return torch.from_numpy(_join(pack, lambda e: getattr(e, name)[1:], np.float32))


def _routes(pack: Sequence[Example]) -> Tensor | None:
    """Not shifted, since they are of what is forwarded; -1 for an example without them."""
    some = next((e.routes_LMK for e in pack if e.routes_LMK is not None), None)
    if some is None:
        return None

    def part(e: Example) -> np.ndarray:
        routes_LMK = np.full((len(e), *some.shape[1:]), -1) if e.routes_LMK is None else e.routes_LMK
        assert routes_LMK.shape == (len(e), *some.shape[1:]), f"{e.source}: routes_LMK has not its experts per token"
        return routes_LMK[:-1]

    return torch.from_numpy(_join(pack, part, np.int16)).transpose(0, 1).contiguous()


def _scalars(pack: Sequence[Example], name: str) -> Tensor | None:
    if not _all_or_none(pack, name):
        return None
    return torch.tensor([getattr(e, name) for e in pack], dtype=torch.float32)


def count(batch: Batch) -> Counts:
    """Denominators of one micro-batch: plain numbers for a batch on the CPU; nothing waits for another device.

    ``ce_tokens`` sums ce_T over trained positions, since no other position is scored.
    """
    ce = 0 if batch.ce_T is None else _number(torch.where(batch.mask_T, batch.ce_T, 0.0).sum(dtype=torch.float64))
    return Counts(
        tokens=batch.trained_N.numel(),
        ce_tokens=ce,
        seqs=len(batch.lengths),
        units=_number(batch.unit_S.max() + 1) if batch.lengths else 0,
        desirable=0 if batch.label_S is None else _number((batch.label_S > 0.5).sum()),
        baseline=0 if batch.baseline_S is None else _number(batch.baseline_S.sum(dtype=torch.float64)),
        baselines=0 if batch.baseline_S is None else batch.baseline_S.numel(),
        inputs=sum(batch.lengths),
    )


def _number(x: Tensor) -> Any:
    return x.item() if x.device.type == "cpu" else x


def segment_sum(x_T: Tensor, seq_T: Tensor, S: int) -> Tensor:
    """x_S: the sum of ``x_T`` over each sequence, x_S[s] = sum over t with seq_T[t] = s of x_T[t].

    Filler (seq_T = S) is summed apart and dropped, so that not even a NaN there is seen. Summed in float32 (float64
    stays float64) and returned so. Differentiable. Dimensions after the first are kept.
    """
    x_T = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    return x_T.new_zeros(S + 1, *x_T.shape[1:]).index_add(0, seq_T, x_T)[:S]
