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

# Positions of a block, and logits of a tile. On a CPU smaller tiles would stay in a core's cache but be no faster, and
# each of their operations waits for all threads; on a GPU a tile must be large enough to fill it.
ROWS = {"cpu": 512, "other": 2048}
TILE = {"cpu": 1 << 22, "other": 1 << 24}

FORBIDDEN = -1e30  # a logit whose token has no share; unlike -inf it may be multiplied by 0


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
    kind = device.type if device.type in ROWS else "other"
    blocks = max(1, -(-N // ROWS[kind]))
    rows = max(1, -(-N // blocks))  # equal blocks: a small last one would read the whole head again
    cols = min(V, max(1, TILE[kind] // rows), max(4096, V // 16))
    memory = tuple(torch.empty(rows * cols, dtype=wide, device=device) for _ in range(tiles))
    own = wide != dtype or not memory
    product = torch.empty(rows * cols, dtype=dtype, device=device) if own else memory[0]
    return Work(dtype=dtype, wide=wide, rows=rows, cols=cols, product=product, tiles=memory)


def spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, n)) for start in range(0, n, size))


def low_rank(hidden_RD: Tensor, head: Head, dtype: torch.dtype) -> Tensor | None:
    """s * hidden @ A.T"""
    return None if head.A_rD is None else hidden_RD @ (head.A_rD.to(dtype).T * head.s)


def product(hidden_RD: Tensor, low_Rr: Tensor | None, part: Head, options: Options, work: Work) -> Tensor:
    """The products of one tile, in their own type, times what stands before tanh, or before z."""
    slope = options.scale / options.softcap if options.softcap else options.slope
    product_RC = work.view(work.product, len(hidden_RD), len(part.weight_VD))
    torch.addmm(product_RC, hidden_RD, part.weight_VD.T, beta=0, alpha=slope, out=product_RC)
    if low_Rr is not None and part.B_Vr is not None:
        product_RC.addmm_(low_Rr, part.B_Vr.T, alpha=slope)
    return product_RC


def logits(
    hidden_RD: Tensor, low_Rr: Tensor | None, part: Head, options: Options, work: Work, *, tanh: bool
) -> tuple[Tensor, Tensor | None]:
    """z of one tile, in the sums' type; and, if ``tanh`` and there is a softcap, tanh(x / softcap)."""
    slope = options.scale / options.softcap if options.softcap else options.slope
    product_RC = product(hidden_RD, low_Rr, part, options, work)
    R, C = product_RC.shape
    z_RC = work.view(work.tiles[0], R, C)
    if work.dtype != work.wide:
        z_RC.copy_(product_RC)
    if part.bias_V is not None:
        z_RC.add_(part.bias_V.clamp(min=FORBIDDEN), alpha=slope)
    if not options.softcap:
        return z_RC, None
    tanh_RC = torch.tanh(z_RC, out=work.view(work.tiles[1], R, C) if tanh else z_RC)
    return torch.mul(tanh_RC, options.softcap / options.temperature, out=z_RC), tanh_RC if tanh else None


def flatten_(x_RC: Tensor, tanh_RC: Tensor | None) -> Tensor:
    """x times the slope of the softcap, 1 - tanh^2, in place; ``tanh_RC`` is overwritten."""
    return x_RC if tanh_RC is None else x_RC.addcmul_(x_RC, tanh_RC.square_(), value=-1)


def flatness(z: Tensor, options: Options) -> Tensor | float:
    """The slope of the softcap at z."""
    return 1 - (z * (options.temperature / options.softcap)).square() if options.softcap else 1.0


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
