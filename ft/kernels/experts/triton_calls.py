"""The Triton products of routed experts as calls: kernel, grid, arguments and tile, ready to run or to compile.

A call is made from tensors and says what a launch of it needs, so that what is compiled ahead of time, from tensors
without memory, is what runs. Tile sizes are a small table by device, type and mean rows of an expert; no GPU has
timed them. Shapes as in ``triton_products.py``; S = T * K slots of the routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor

from ft.kernels.experts import triton_products as products
from ft.kernels.experts.projection import Weights
from ft.kernels.launch import Launch, device, interpreted
from ft.kernels.nf4 import NF4Tensor, dynamic_map, nf4_code

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


_ELEMENTS = 2048  # that a program without products holds at a time


@frozen(kw_only=True, eq=False)
class Call:
    """One launch of a kernel that fills ``out``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    out: Tensor
    warps: int = 4
    stages: int = 2

    def run(self) -> Tensor:
        """``out``, filled."""
        if all(self.grid):
            options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
            with device(self.out):
                self.kernel[self.grid](**self.arguments, **self.constants, **options)
        return self.out

    def launch(self, name: str, *targets: str) -> Launch:
        """What Triton would compile for these arguments: it too takes an integer 1 for a constant."""
        fixed = {k: v for k, v in self.arguments.items() if v is None or (isinstance(v, int) and v == 1)}
        return Launch(
            name=name,
            kernel=self.kernel,
            signature={k: _type(v) for k, v in self.arguments.items() if k not in fixed},
            constants={**fixed, **self.constants},
            warps=self.warps,
            stages=self.stages,
            targets=targets,
        )


def _type(value: Tensor | int | float | None) -> str:
    if isinstance(value, Tensor):
        return _NAMES[value.dtype]
    if isinstance(value, int):
        return ("i32" if value < 2**31 else "i64") + ("" if value % 16 else ":16")
    return "fp32"


# --- tiles -----------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Tile:
    """rows x out of a product's result at a time, ``inner`` of what is summed over."""

    rows: int
    out: int
    inner: int
    warps: int
    stages: int


_TILES = (  # up to so many rows an expert on average
    (16, Tile(rows=16, out=128, inner=64, warps=4, stages=3)),
    (64, Tile(rows=32, out=128, inner=64, warps=4, stages=3)),
    (192, Tile(rows=64, out=128, inner=64, warps=8, stages=3)),
    (None, Tile(rows=128, out=128, inner=64, warps=8, stages=3)),
)


def tile(R: int, experts: int, dtype: torch.dtype, *, amd: bool = False) -> Tile:
    """The tile for R rows over so many experts: half-empty blocks of rows cost as much as full ones."""
    mean = R // experts
    found = next(t for most, t in _TILES if most is None or mean <= most)
    if dtype == torch.float32:  # no tensor cores: sums and factors are all in registers
        return evolve(found, rows=min(found.rows, 64), out=64, inner=32, warps=8, stages=2)
    return evolve(found, stages=2) if amd else found  # 64 KiB of shared memory


def _fit(size: int, most: int) -> int:
    """A power of two that covers ``size``: at least the 16 that a product needs, at most ``most``."""
    return max(16, min(most, triton.next_power_of_2(size)))


# --- routing: one sort, and a schedule of blocks ---------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Route:
    """Where each row of the sorted order belongs, and which rows each program takes. All int32."""

    K: int
    tile: Tile
    slot_R: Tensor  # place of each row in the flat (T, K) routing
    expert_R: Tensor
    ends_E: Tensor  # expert e owns rows ends_E[e - 1] : ends_E[e]
    expert_B: Tensor  # of each block of rows; E for a block without work
    row_B: Tensor  # the first row of each block


def route(index_TK: Tensor, experts: int, tile: Tile) -> Route:
    """Sort the routed rows by expert, in token order within one, and cut them into blocks of one expert.

    Each expert with rows ends in at most one partial block, so R // rows + min(E, R) blocks are always enough.
    """
    expert_R, slot_R = index_TK.flatten().int().sort(stable=True)
    at, R = expert_R.device, expert_R.numel()
    ends_E = torch.searchsorted(expert_R, torch.arange(experts, device=at, dtype=torch.int32), right=True)
    starts = F.pad(ends_E, (1, 0))  # E + 1 of them, so that a block without work finds one too
    blocks = F.pad(((ends_E - starts[:-1] + tile.rows - 1) // tile.rows).cumsum(0), (1, 0))
    block_B = torch.arange(R // tile.rows + min(experts, R), device=at)
    expert_B = torch.searchsorted(blocks[1:], block_B, right=True)
    row_B = starts[expert_B] + (block_B - blocks[expert_B]) * tile.rows
    return Route(
        K=index_TK.shape[1],
        tile=tile,
        slot_R=slot_R.int(),
        expert_R=expert_R,
        ends_E=ends_E.int(),
        expert_B=expert_B.int(),
        row_B=row_B.int(),
    )


# --- calls -----------------------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Lift:
    """A term scale * low_r lift_e to add to a product; ``lift`` is (E, rank, out), with any strides."""

    low_Rr: Tensor
    lift: Tensor
    scale: float


def times(
    x: Tensor,
    w: Weights,
    route: Route,
    *,
    flip: bool,
    gather: bool = False,
    scatter: bool = False,
    bias: Tensor | None = None,
    lift: Lift | None = None,
) -> Call:
    """x_r W_e for each row, W_e = ``w[e]`` (``w[e]^T`` with ``flip``), in x's type.

    ``gather``: x holds a row per token, not per routed row; ``scatter``: results go to slots, (S, out).
    """
    (E, P, Q), t = w.shape, route.tile
    out = torch.empty(route.slot_R.numel(), P if flip else Q, dtype=x.dtype, device=x.device)
    BO, BI = _fit(out.shape[1], t.out), _fit(x.shape[1], t.inner)
    rank = 0 if lift is None else lift.low_Rr.shape[1]
    blocked = isinstance(w, NF4Tensor)
    strides = (P * Q, 0, 0) if blocked else w.stride()
    return Call(
        kernel=products.times_kernel,
        grid=(route.expert_B.numel() * triton.cdiv(out.shape[1], BO),),
        arguments={
            "x_ptr": x, **_storage(w), "bias_ptr": _whole(bias), "low_ptr": lift.low_Rr if lift else None,
            "lift_ptr": lift.lift if lift else None, "out_ptr": out, "expert_B": route.expert_B, "row_B": route.row_B,
            "ends_E": route.ends_E, "slot_R": route.slot_R, "K": route.K, "P": P, "Q": Q, "RANK": rank,
            **_named("w", "epq", strides), **_named("lift", "ero", lift.lift.stride() if lift else (0, 0, 0)),
            "scale": lift.scale if lift else 0.0, "experts": E,
        },
        constants={
            "FLIP": flip, "GATHER": gather, "SCATTER": scatter, "MMA": _mma(x.dtype), "BR": t.rows,
            "BO": BO, "BI": BI, "BL": _fit(rank, 64), "BLOCK": w.block if blocked else 0,
            "KEPT": TYPES[w.dtype], "SPAN": _span(w, BI if flip else BO) if blocked else 0,
        },
        out=out,
        warps=t.warps,
        stages=t.stages,
    )  # fmt: skip


def _mma(dtype: torch.dtype) -> Any:
    return tl.float32 if interpreted() else TYPES[dtype]


def _whole(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _named(name: str, axes: str, strides: tuple[int, ...]) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}


def _storage(w: Weights) -> dict[str, Tensor | None]:
    if isinstance(w, Tensor):
        return {"w_ptr": w} | dict.fromkeys(("absmax_ptr", "absmax2_ptr", "offset_ptr", "code_ptr", "map_ptr"))
    tables = _tables(w.packed.device)
    return {
        "w_ptr": w.packed, "absmax_ptr": w.absmax, "absmax2_ptr": w.absmax2, "offset_ptr": w.offset,
        "code_ptr": tables[0], "map_ptr": None if w.absmax2 is None else tables[1],
    }  # fmt: skip


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return nf4_code(device), dynamic_map(device)


def _span(w: NF4Tensor, columns: int) -> int:
    """How many scales a tile of so many columns needs in a row; 0 where blocks straddle rows."""
    return 0 if w.shape[2] % w.block else max(1, columns // w.block)


def outer(
    left: Tensor,
    right: Tensor,
    route: Route,
    *,
    dtype: torch.dtype,
    gather_left: bool = False,
    gather_right: bool = False,
    weight_S: Tensor | None = None,
    scale: float = 1.0,
) -> Call:
    """scale * sum over each expert's rows of w_r left_r^T right_r: (E, P, Q). The narrower side is weighed."""
    E, P, Q = route.ends_E.numel(), left.shape[1], right.shape[1]
    out = torch.empty(E, P, Q, dtype=dtype, device=left.device)
    most = 64 if left.dtype == torch.float32 else 128
    BP, BQ = _fit(P, most), _fit(Q, most)
    return Call(
        kernel=products.outer_kernel,
        grid=(E * triton.cdiv(P, BP) * triton.cdiv(Q, BQ),),
        arguments={
            "left_ptr": left, "right_ptr": right, "weight_ptr": weight_S, "out_ptr": out, "ends_E": route.ends_E,
            "slot_R": route.slot_R, "K": route.K, "P": P, "Q": Q, "scale": scale,
        },
        constants={
            "GATHER_LEFT": gather_left, "GATHER_RIGHT": gather_right, "WEIGH_LEFT": P < Q,
            "MMA": _mma(left.dtype), "BP": BP, "BQ": BQ, "BR": 32 if left.dtype == torch.float32 else 64,
        },
        out=out,
        warps=8 if min(BP, BQ) >= 128 else 4,
    )  # fmt: skip


def sums(x: Tensor, route: Route, *, dtype: torch.dtype, gather: bool = False, weight_S: Tensor | None = None) -> Call:
    """sum over each expert's rows of w_r x_r: (E, P)."""
    E, P = route.ends_E.numel(), x.shape[1]
    out = torch.empty(E, P, dtype=dtype, device=x.device)
    BO = _fit(P, 128)
    return Call(
        kernel=products.sums_kernel,
        grid=(E, triton.cdiv(P, BO)),
        arguments={
            "x_ptr": x, "weight_ptr": weight_S, "out_ptr": out, "ends_E": route.ends_E, "slot_R": route.slot_R,
            "K": route.K, "P": P,
        },
        constants={"GATHER": gather, "BR": 32, "BO": BO},
        out=out,
    )  # fmt: skip


def combine(y_SD: Tensor, weight_TK: Tensor | None, K: int) -> Call:
    """sum_k w_tk y_tk, summed in float32, in y's type: (T, D)."""
    T, D = y_SD.shape[0] // K, y_SD.shape[1]
    out = torch.empty(T, D, dtype=y_SD.dtype, device=y_SD.device)
    BD = _fit(D, 256)
    BT = _ELEMENTS // BD
    return Call(
        kernel=products.combine_kernel,
        grid=(triton.cdiv(T, BT), triton.cdiv(D, BD)),
        arguments={"y_ptr": y_SD, "weight_ptr": weight_TK, "out_ptr": out, "T": T, "K": K, "D": D},
        constants={"BT": BT, "BD": BD},
        out=out,
    )


def weigh(a_RI: Tensor, u_RI: Tensor, weight_TK: Tensor, bias_ED: Tensor | None, g_TD: Tensor, route: Route) -> Call:
    """d out / d weight_TK in float32; and u_r becomes w_r u_r, in place."""
    out, (R, I), D = torch.empty(weight_TK.shape, dtype=torch.float32, device=a_RI.device), a_RI.shape, g_TD.shape[1]
    BI = _fit(I, 256)
    BR = _ELEMENTS // BI
    return Call(
        kernel=products.weigh_kernel,
        grid=(triton.cdiv(R, BR),),
        arguments={
            "a_ptr": a_RI, "u_ptr": u_RI, "weight_ptr": weight_TK, "dweight_ptr": out, "bias_ptr": _whole(bias_ED),
            "g_ptr": g_TD, "expert_R": route.expert_R, "slot_R": route.slot_R, "R": R, "K": route.K, "I": I, "D": D,
        },
        constants={"BR": BR, "BI": BI},
        out=out,
    )  # fmt: skip
