"""The routing of a chunked product: one sort, then experts of like length together.

Shapes: T tokens, K experts per token, R = T * K routed rows, E experts, C experts of a chunk, P their padded rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from ft.errors import ModelError

ROOM = 1 << 19  # values of the widest tensor of a chunk: 1 to 2 MB, the size of a core's cache
WASTE = {False: 0.1, True: 0.5}  # padding to rows, in 32 and in 16 bits, where products of padding cost little
SLACK = {False: 48, True: 128}  # rows of padding that cost less than one chunk more
STEP = 8  # what 16-bit lengths are multiples of


@frozen(kw_only=True, eq=False)
class Chunk:
    """Experts and their rows; padding has the token after the last and the slot after the last."""

    experts: tuple[int, ...]
    expert_C: Tensor
    slot_CP: Tensor  # places in the flat (T, K) routing
    token_CP: Tensor

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first expert, start, stop): places start .. stop - 1 hold experts that follow each other in the stacks."""
        start = 0
        for i in range(1, len(self.experts) + 1):
            if i == len(self.experts) or self.experts[i] != self.experts[i - 1] + 1:
                yield self.experts[start], start, i
                start = i

    def whole(self) -> slice | None:
        """The experts as one slice of a stack, where they follow each other."""
        first, _, stop = next(self.runs())
        return slice(first, first + stop) if stop == len(self.experts) else None


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
        token_CP = slot_CP // index_TK.shape[1]
        made.append(Chunk(experts=ids, expert_C=expert_C, slot_CP=slot_CP, token_CP=token_CP))
    return Route(chunks=tuple(made), idle=(count_E == 0).nonzero()[:, 0])


Cut = tuple[tuple[int, ...], int]  # experts, and the padded rows of each


def cuts(counts: list[int], room: int, narrow: bool) -> list[Cut]:
    """Chunks of at most ``room`` rows, unless one expert has more.

    In the order of the stacks, so that a chunk's share of a stack is a view and not a copy; by length, where that
    makes less than half as many chunks, as it does where a few experts get most rows.
    """
    ids = [e for e, n in enumerate(counts) if n]
    in_order = list(_cut(ids, counts, room, narrow))
    by_length = list(_cut(sorted(ids, key=lambda e: -counts[e]), counts, room, narrow))
    return by_length if 2 * len(by_length) < len(in_order) else in_order


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
