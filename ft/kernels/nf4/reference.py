"""Quantise and dequantise in plain torch, piece by piece so that temporaries stay at a few MB.

Bit-exactness: everything is computed in float32 in the order bitsandbytes computes it. Shapes: B blocks of a piece,
R rows of dimension 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.nf4.format import BLOCKS, DTYPES, NESTED_BLOCK, NF4Tensor, dynamic_map, nf4_code, numel

_TINY = 1e-38  # the smallest scale that is divided by
_CELLS = 8192  # cells per unit of the lookup grid in _codes; a power of two, so that scaling by it is exact
_DOUBT = 0x80  # marks a grid cell that lies on or near a boundary between two codes
_EITHER = 0x8080 - 0x10000  # the mark in either half of a 16-bit number


def _piece(device: torch.device) -> int:
    """Values per piece, a multiple of every block size: cache-sized on a CPU, launch-bound elsewhere."""
    return 1 << (17 if device.type == "cpu" else 24)


# ---- quantise -------------------------------------------------------------------------------------------------------


Codes = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@torch.no_grad()
def quantise(w: Tensor, *, block: int = 64, double: bool = True, codes: Codes | None = None) -> NF4Tensor:
    """As ``ops.quantise``; ``codes(w, block)`` may be another way to make codes and absmax."""
    _check(w, block)
    packed, absmax = (codes or _all_codes)(w, block)
    absmax2 = offset = None
    if double:
        offset = absmax.mean()
        absmax, absmax2 = _quantise_scales(absmax - offset)
    return NF4Tensor(
        packed=packed,
        absmax=absmax,
        absmax2=absmax2,
        offset=offset,
        shape=tuple(w.shape),
        dtype=w.dtype,
        block=block,
    )


def check_finite(absmax_B: Tensor) -> None:
    if not absmax_B.isfinite().all():
        raise ModelError("a weight holds NaN or infinity, and cannot be quantised", fix="check the model's files")


def _all_codes(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(packed codes, float32 absmax of each block)"""
    flat = w.reshape(-1)
    n, piece = flat.numel(), _piece(w.device)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block), dtype=torch.float32, device=w.device)
    for start in range(0, n, piece):
        x = flat[start : start + piece].float()
        scaled, absmax_B = _scale(x, block)
        check_finite(absmax_B)  # before codes are looked up by values that depend on it
        absmax[start // block :][: len(absmax_B)] = absmax_B
        codes = _codes(scaled)
        packed[start // 2 :][: len(codes) // 2] = _pack(codes)
    return packed, absmax


def _check(w: Tensor, block: int) -> None:
    if block not in BLOCKS:
        raise ModelError("no such NF4 block size", expected=f"one of {', '.join(map(str, BLOCKS))}", got=str(block))
    if w.dtype not in DTYPES:
        raise ModelError("only weights in 16 or 32-bit floats can be quantised", got=str(w.dtype))
    if not w.numel():
        raise ModelError("a weight without values cannot be quantised", got=f"shape {tuple(w.shape)}")


def _scale(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Values divided by their block's absmax, padded with a zero to an even number; and the absmax of each block."""
    full = len(x) - len(x) % block
    whole = x[:full].view(-1, block)
    absmax_B = whole.abs().amax(-1)
    scaled = (whole * (1.0 / absmax_B.clamp(min=_TINY))[:, None]).view(-1)
    if full < len(x):
        last = x[full:].abs().max().clamp(min=_TINY)
        absmax_B = torch.cat([absmax_B, last[None]])
        scaled = F.pad(torch.cat([scaled, x[full:] / last]), (0, len(x) % 2))
    return scaled, absmax_B


def _codes(scaled: Tensor) -> Tensor:
    """uint8 code of each value in [-1, 1]: how many midpoints between neighbouring codes it exceeds.

    A binary search per value is slow in torch, so a fine grid answers for all but the few values in a cell that a
    midpoint touches, and the search is made for those.
    """
    grid, midpoints = _grid(scaled.device)
    codes = grid.index_select(0, (scaled * _CELLS).add_(_CELLS).int())
    # Searching codes for marks is slow too, so they are looked at in pairs, as 16-bit numbers.
    pair = (codes.view(torch.int16) & _EITHER).nonzero().view(-1)
    doubtful = scaled.view(-1, 2).index_select(0, pair)
    codes.view(-1, 2)[pair] = torch.bucketize(doubtful, midpoints, out_int32=True).to(torch.uint8)
    return codes


@cache
def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell [i, i + 1) / _CELLS - 1 its code, or _DOUBT where its ends, widened for rounding, disagree."""
    code = nf4_code()
    midpoints = (code[1:] + code[:-1]) / 2
    left = torch.arange(-_CELLS, _CELLS + 2, device="cpu").double() / _CELLS
    margin = 1 / (8 * _CELLS)
    low, high = (torch.bucketize(edge, midpoints.double()) for edge in (left - margin, left + 1 / _CELLS + margin))
    grid = torch.where(low == high, low, _DOUBT).to(torch.uint8)
    return grid.to(device), midpoints.to(device)


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high half. Read as little-endian pairs, the first is the low byte."""
    pairs = codes.view(torch.int16)
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)


def _quantise_scales(centred: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 codes of the dynamic map, float32 absmax of each 256 values)."""
    piece = _piece(centred.device)
    codes = torch.empty(len(centred), dtype=torch.uint8, device=centred.device)
    absmax2 = torch.empty(-(-len(centred) // NESTED_BLOCK), dtype=torch.float32, device=centred.device)
    for start in range(0, len(centred), piece):
        x = centred[start : start + piece]
        blocks = F.pad(x, (0, -len(x) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        most = blocks.abs().amax(-1, keepdim=True)
        found = _nearest(blocks * (1.0 / most.clamp(min=_TINY))).masked_fill_(most == 0, 0)
        codes[start : start + piece] = found.view(-1)[: len(x)]
        absmax2[start // NESTED_BLOCK :][: len(most)] = most[:, 0]
    return codes, absmax2


def _nearest(x: Tensor) -> Tensor:
    """uint8 index into the dynamic map of the value nearest to each x in [-1, 1].

    On a CPU bitsandbytes rounds x to a grid of 65536 points first, which moves one code in 600 to a neighbour; so
    must this, to be equal bit for bit. Elsewhere it searches exactly.
    """
    midpoints, grid = _dynamic_grid(x.device)
    if x.device.type != "cpu":
        return torch.bucketize(x, midpoints, out_int32=True).to(torch.uint8)
    return grid.index_select(0, ((x + 1) * 32767.5 + 0.5).int().view(-1)).view(x.shape)


@cache
def _dynamic_grid(device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbours of the dynamic map, and the nearest code at each of 65536 points of [-1, 1]."""
    values = dynamic_map()
    midpoints = (values[1:] + values[:-1]) / 2
    points = torch.arange(65536, device="cpu").float() / 32767.5 - 1
    return midpoints.to(device), torch.bucketize(points, midpoints).to(torch.uint8).to(device)


# ---- dequantise -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def dequantise(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight: code times scale in float32, rounded to ``q.dtype``, then converted to ``dtype`` if given."""
    n, device = numel(q), q.packed.device
    out = torch.empty(n, dtype=q.dtype, device=device)
    piece = max(2, min(_piece(device), n + n % 2))
    index = torch.empty(piece // 2, dtype=torch.int32, device=device)
    scale_B = _scales(q)  # at once: 4 bytes a block are little, and calls are not
    # float32 values are made in their place, unless a last byte holds a value too many.
    values = None if q.dtype == torch.float32 and n % 2 == 0 else torch.empty(piece, device=device)
    for start in range(0, n, piece):
        stop = min(start + piece, n)
        to = out[start:stop]
        into = to if values is None else values[: len(to) + len(to) % 2]
        _lookup(q.packed[start // 2 : -(-stop // 2)], index, into)
        _multiply(into, scale_B[start // q.block : -(-stop // q.block)], q.block)
        if values is not None:
            to.copy_(into[: len(to)])
    return out.view(q.shape).to(dtype or q.dtype)


def _lookup(packed: Tensor, index: Tensor, out: Tensor) -> None:
    """The float32 values of all bytes' two codes, into ``out``; ``index`` is scratch."""
    index = index[: len(packed)].copy_(packed)
    torch.index_select(_pairs(packed.device), 0, index, out=out.view(torch.float64))


def _multiply(values: Tensor, scale_B: Tensor, block: int) -> None:
    """In place, each ``block`` values by their scale; the last may be fewer."""
    full = len(values) // block
    values[: full * block].view(-1, block).mul_(scale_B[:full, None])
    if full * block < len(values):
        values[full * block :].mul_(scale_B[-1])


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two float32 values of every byte, held as one 8-byte element: one lookup then serves two weights."""
    code, byte = nf4_code(), torch.arange(256, device="cpu")
    return torch.stack([code[byte >> 4], code[byte & 15]], -1).view(torch.float64).view(-1).to(device)


def _scales(q: NF4Tensor) -> Tensor:
    """float32 scale of every block."""
    if q.absmax2 is None or q.offset is None:
        return q.absmax
    scale_B = _dynamic(q.absmax.device).index_select(0, q.absmax.int())
    _multiply(scale_B, q.absmax2, NESTED_BLOCK)
    return scale_B.add_(q.offset)


_dynamic = cache(dynamic_map)


# ---- some rows only -------------------------------------------------------------------------------------------------


@torch.no_grad()
def slice_rows(q: NF4Tensor, first: int, n: int = 1) -> NF4Tensor:
    """``n`` neighbouring rows of dimension 0, sharing the bytes of ``q``; scales are shared too, where theirs are whole
    blocks of 256, and float32 elsewhere.

    Raises:
        ModelError: a row is not a whole number of blocks, or there are no such rows.
    """
    row = row_size(q)
    if not 0 <= first <= first + n <= q.shape[0]:
        raise ModelError("no such rows", expected=f"0 .. {q.shape[0] - 1}", got=f"{first} .. {first + n - 1}")
    packed, shape = q.packed[first * row // 2 : (first + n) * row // 2], (n, *q.shape[1:])
    start, stop = first * row // q.block, (first + n) * row // q.block
    absmax, nested, offset = q.absmax[start:stop], q.absmax2, q.offset
    if nested is not None and start % NESTED_BLOCK:
        absmax = _row_scales(q, torch.arange(first, first + n, device=q.packed.device)).view(-1)
        nested = offset = None
    if nested is not None:
        nested = nested[start // NESTED_BLOCK : -(-stop // NESTED_BLOCK)]
    return NF4Tensor(
        packed=packed, absmax=absmax, absmax2=nested, offset=offset, shape=shape, dtype=q.dtype, block=q.block
    )


@torch.no_grad()
def take_rows(q: NF4Tensor, index_R: Tensor) -> NF4Tensor:
    """Rows ``index_R`` of dimension 0 as a weight of their own, with float32 scales."""
    row = row_size(q)
    return NF4Tensor(
        packed=q.packed.view(q.shape[0], row // 2).index_select(0, index_R).view(-1),
        absmax=_row_scales(q, index_R).view(-1),
        shape=(len(index_R), *q.shape[1:]),
        dtype=q.dtype,
        block=q.block,
    )


def _row_scales(q: NF4Tensor, index_R: Tensor) -> Tensor:
    """float32 scale of each block of the rows named, (R, blocks of a row)."""
    absmax_RB = q.absmax.view(q.shape[0], -1).index_select(0, index_R)
    if q.absmax2 is None or q.offset is None:
        return absmax_RB
    blocks = absmax_RB.shape[1]
    scale_B = _dynamic(absmax_RB.device).index_select(0, absmax_RB.view(-1).int())
    if blocks % NESTED_BLOCK == 0:
        _multiply(scale_B, q.absmax2.view(q.shape[0], -1).index_select(0, index_R).view(-1), NESTED_BLOCK)
    else:  # blocks of scales straddle rows
        index_RB = index_R[:, None] * blocks + torch.arange(blocks, device=index_R.device)
        scale_B.mul_(q.absmax2.index_select(0, index_RB.view(-1) // NESTED_BLOCK))
    return scale_B.add_(q.offset).view_as(absmax_RB)


def row_size(q: NF4Tensor) -> int:
    """Values in one row of dimension 0, which must be a whole number of blocks."""
    row = math.prod(q.shape[1:])
    if not q.shape or row % q.block:
        raise ModelError(
            "NF4 blocks straddle the rows of this weight, so rows cannot be taken apart",
            expected=f"rows of a multiple of {q.block} values",
            got=f"{row} values a row, shape {q.shape}",
            fix="quantise each row on its own, or choose a block size that divides the row",
        )
    return row
