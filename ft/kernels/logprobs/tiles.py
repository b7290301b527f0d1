"""One tile of logits: how large it is, where it lies in memory, how it is computed and how it is multiplied.

Shapes: N positions, V vocabulary, D model width, r LoRA rank; R positions of a block and C tokens of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from attrs import evolve, field, frozen, validators
from torch import Tensor

from ft.errors import ModelError

# A tile of float32 logits should stay in a core's cache, and on a GPU be large enough to fill it.
_ROWS, _TILE = {"cpu": 512}, {"cpu": 1 << 20}
_ROWS_ELSE, _TILE_ELSE = 2048, 1 << 24


def _positive(_: Any, attribute: Any, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ModelError(f"{attribute.name} must be positive", where="token_logps", got=str(value))


@frozen(kw_only=True)
class Options:
    """How a logit x becomes z, and whether entropy is wanted."""

    temperature: float = field(default=1.0, validator=_positive)
    softcap: float | None = field(default=None, validator=_positive)
    scale: float = field(default=1.0, validator=validators.instance_of((int, float)))
    entropy: bool = False

    @property
    def slope(self) -> float:
        """dz / d(product) at 0."""
        return self.scale / self.temperature


@frozen(kw_only=True, eq=False)
class Head:
    """What turns hidden states into logits; ``s`` is folded into the low-rank activations."""

    weight_VD: Tensor
    bias_V: Tensor | None
    A_rD: Tensor | None
    B_Vr: Tensor | None
    s: float

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Head:
        """The tokens start..stop, weights in ``dtype``."""
        return evolve(
            self,
            weight_VD=self.weight_VD[start:stop].to(dtype),
            bias_V=None if self.bias_V is None else self.bias_V[start:stop],
            B_Vr=None if self.B_Vr is None else self.B_Vr[start:stop].to(dtype),
        )


@frozen(kw_only=True, eq=False)
class Work:
    """Types and reused memory of a call: a tile in the products' type, and one or more in the sums' type."""

    dtype: torch.dtype  # of the products
    wide: torch.dtype  # of the sums
    rows: int
    cols: int
    product: Tensor
    tiles: tuple[Tensor, ...]

    def view(self, tile: Tensor, R: int, C: int) -> Tensor:
        return tile[: R * C].view(R, C)


def make_work(hidden_ND: Tensor, head_VD: Tensor, tiles: int) -> Work:
    (N, _), V, device = hidden_ND.shape, len(head_VD), hidden_ND.device
    dtype = torch.promote_types(hidden_ND.dtype, head_VD.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    most = _ROWS.get(device.type, _ROWS_ELSE)
    rows = max(1, -(-N // max(1, -(-N // most))))  # equal blocks: a small last one would read the whole head again
    cols = min(V, max(1, _TILE.get(device.type, _TILE_ELSE) // rows))
    memory = tuple(torch.empty(rows * cols, dtype=wide, device=device) for _ in range(tiles))
    product = memory[0] if wide == dtype else torch.empty(rows * cols, dtype=dtype, device=device)
    return Work(dtype=dtype, wide=wide, rows=rows, cols=cols, product=product, tiles=memory)


def spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, n)) for start in range(0, n, size))


def low_rank(hidden_RD: Tensor, head: Head, dtype: torch.dtype) -> Tensor | None:
    """s * hidden @ A.T"""
    return None if head.A_rD is None else hidden_RD @ (head.A_rD.to(dtype).T * head.s)


def logits(hidden_RD: Tensor, low_Rr: Tensor | None, part: Head, options: Options, work: Work) -> Tensor:
    """z of one tile, in the sums' type, in the first tile's memory."""
    slope = options.scale / options.softcap if options.softcap else options.slope
    R, C = len(hidden_RD), len(part.weight_VD)
    z_RC, product_RC = work.view(work.tiles[0], R, C), work.view(work.product, R, C)
    torch.addmm(product_RC, hidden_RD, part.weight_VD.T, beta=0, alpha=slope, out=product_RC)
    if low_Rr is not None and part.B_Vr is not None:
        product_RC.addmm_(low_Rr, part.B_Vr.T, alpha=slope)
    if work.dtype != work.wide:
        z_RC.copy_(product_RC)
    if part.bias_V is not None:
        z_RC.add_(part.bias_V, alpha=slope)
    if options.softcap:
        z_RC.tanh_().mul_(options.softcap / options.temperature)
    return z_RC


def flatness(z: Tensor, options: Options, out: Tensor | None = None) -> Tensor:
    """1 - tanh(x / softcap)^2, the slope of the cap at z relative to its slope at 0."""
    assert options.softcap is not None
    tanh = torch.mul(z, options.temperature / options.softcap, out=out)
    return tanh.square_().neg_().add_(1)


def accumulate(sum_RX: Tensor, tile_RC: Tensor, weight_CX: Tensor, work: Work) -> None:
    """sum += tile @ weight; a product in 16 bits is rounded once a tile, sums are not."""
    if work.dtype == work.wide:
        sum_RX.addmm_(tile_RC, weight_CX)
    else:
        sum_RX.add_(tile_RC @ weight_CX)


def as_product(tile_RC: Tensor, work: Work) -> Tensor:
    """The tile in the products' type."""
    return tile_RC if work.dtype == work.wide else work.view(work.product, *tile_RC.shape).copy_(tile_RC)


def place(target_R1: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(column of each target in this tile, or any column; whether it is in this tile)."""
    inside_R1 = (target_R1 >= start) & (target_R1 < stop)
    return (target_R1 - start).clamp_(0, stop - start - 1), inside_R1
