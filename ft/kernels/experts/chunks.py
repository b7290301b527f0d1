"""The routing of a chunked product: one sort, then experts of like length together.

Shapes: T tokens, K experts per token, R = T * K routed rows, E experts, C experts of a chunk, P their padded rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor

from ft.errors import ModelError

ROOM = 1 << 19  # values of the widest tensor of a chunk: 1 to 2 MB, the size of a core's cache
WASTE = {False: 0.1, True: 0.5}  # padding to rows, in 32 and in 16 bits, where products of padding cost little
SLACK = {False: 48, True: 128}  # rows of padding that cost less than one chunk more
STEP = 8  # what 16-bit lengths are multiples of


Run = tuple[int, int, int]  # (first expert, start, stop): places start .. stop - 1 hold neighbours in the stacks


@frozen(kw_only=True, eq=False)
class Chunk:
    """Experts and their rows, C x P of them; R = C * P here."""

    experts: tuple[int, ...]
    expert_C: Tensor
    runs: Sequence[Run]
    shape: tuple[int, int]  # C, P
    slot_R: Tensor  # places in the flat (T, K) routing; of padding, the one after the last
    token_R: Tensor  # of padding, the one after the last
    source_R: Tensor  # the row of the hidden states to read; of padding, the first
    padding: Tensor | None  # its rows, where there is any

    def of(self, stack: Tensor) -> Tensor:
        """The experts' entries of a stack: a view, where they follow each other."""
        if len(self.runs) > 1:
            return stack.index_select(0, self.expert_C)
        first, _, n = self.runs[0]
        return stack.narrow(0, first, n)

    def put(self, into: Tensor, value: Tensor) -> None:
        """Write the experts' entries of a stack."""
        if len(self.runs) > 1:
            into.index_copy_(0, self.expert_C, value.to(into.dtype))
        else:
            first, _, n = self.runs[0]
            into.narrow(0, first, n).copy_(value)


def _runs(experts: tuple[int, ...]) -> Iterator[Run]:
    start = 0
    for i in range(1, len(experts) + 1):
        if i == len(experts) or experts[i] != experts[i - 1] + 1:
            yield experts[start], start, i
            start = i


@frozen(kw_only=True, eq=False)
class Route:
    chunks: tuple[Chunk, ...]
    idle: Tensor  # experts without rows


def route(index_TK: Tensor, experts: int, widest: int, *, narrow: bool) -> Route:
    """Sort the routed rows by expert, and cut the experts that have any into chunks.

    ``narrow``: the products are in 16 bits. See ``cuts`` and ``padded``.

    Raises:
        ModelError: an index outside 0 .. experts - 1.
    """
    expert_R, slot_R = index_TK.flatten().sort(stable=True)
    if expert_R.numel() and not 0 <= int(expert_R[0]) <= int(expert_R[-1]) < experts:
        got = f"{int(expert_R[0])} .. {int(expert_R[-1])}"
        raise ModelError("a token is routed to an expert that does not exist", expected=f"0 .. {experts - 1}", got=got)
    count_E = torch.bincount(expert_R, minlength=experts)
    start_E, counts = count_E.cumsum(0) - count_E, count_E.tolist()
    slots = torch.cat([slot_R, slot_R.new_tensor([len(slot_R)])])
    made = []
    for ids, length in cuts(counts, max(1, ROOM // widest), narrow):
        expert_C = torch.tensor(ids, device=index_TK.device)
        place_P = torch.arange(length, device=index_TK.device)
        outside_CP = place_P >= count_E[expert_C, None]
        slot_CP = slots[(start_E[expert_C, None] + place_P).masked_fill_(outside_CP, len(slot_R))]
        token_CP, full = slot_CP // index_TK.shape[1], length * len(ids) == sum(counts[e] for e in ids)
        made.append(
            Chunk(
                experts=ids,
                expert_C=expert_C,
                runs=tuple(_runs(ids)),
                shape=(len(ids), length),
                slot_R=slot_CP.flatten(),
                token_R=token_CP.flatten(),
                source_R=(token_CP if full else token_CP.masked_fill(outside_CP, 0)).flatten(),
                padding=None if full else outside_CP.flatten().nonzero()[:, 0],
            )
        )
    return Route(chunks=tuple(made), idle=(count_E == 0).nonzero()[:, 0])


Cut = tuple[tuple[int, ...], int]  # experts, and the padded rows of each


def cuts(counts: list[int], room: int, narrow: bool) -> list[Cut]:
    """Chunks of at most ``room`` rows, unless one expert has more.

    In the order of the stacks, so that a chunk's share of a stack is a view and not a copy, and its neighbours'
    products one call; by length where that is worth more: in 32 bits, where it saves padding, and in 16 bits, where
    calls cost more, only where it makes less than half as many chunks, as it does where few experts get most rows.
    """
    ids = [e for e, n in enumerate(counts) if n]
    in_order = list(_cut(ids, counts, room, narrow))
    by_length = list(_cut(sorted(ids, key=lambda e: -counts[e]), counts, room, narrow))
    less = 2 * len(by_length) < len(in_order) if narrow else _cost(by_length) < _cost(in_order)
    return by_length if less else in_order


def _cost(cuts: list[Cut]) -> int:
    """In rows: padded ones, and SLACK for each chunk."""
    return sum(len(ids) * length + SLACK[False] for ids, length in cuts)


def _cut(ids: list[int], counts: list[int], room: int, narrow: bool) -> Iterator[Cut]:
    chunk: list[int] = []
    longest = rows = 0
    for e in ids:
        most, real = max(longest, padded(counts[e], narrow)), rows + counts[e]
        filled = most * (len(chunk) + 1)
        if chunk and filled > min(room, real + max(SLACK[narrow], WASTE[narrow] * real)):
            yield tuple(chunk), longest
            chunk, most, real = [], padded(counts[e], narrow), counts[e]
        chunk.append(e)
        longest, rows = most, real
    if chunk:
        yield tuple(chunk), longest


def padded(count: int, narrow: bool) -> int:
    """``count``, in 16 bits rounded up to a multiple of 8 and of an eighth of the power of two below.

    oneDNN, which multiplies 16-bit matrices, compiles a kernel for every shape, at 100 times the cost of a product.
    """
    step = max(STEP, (1 << count.bit_length() - 1) // 8) if narrow else 1
    return -(-count // step) * step
