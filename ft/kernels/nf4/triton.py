"""NF4 by Triton: quantise, dequantise (all of a weight, or some rows), and products with a weight never written dense.

The products pay where few rows meet a weight: reading 4 bits instead of writing and reading 16 is then all the work.
Many rows keep the matrix units busy, which the library's product of dense matrices does better, so ``products`` says
for which inputs they are meant. All arithmetic on weights is float32 in the reference's order, unfused, so values are
equal to it bit for bit.

Shapes: B blocks of a program, H bytes of a block (half as many as values), M rows of the input, K its width, N width
of the output. Blocks of a program of a product: m, n and k.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor

from ft.kernels.launch import Launch, device, interpreted
from ft.kernels.nf4.format import NESTED_BLOCK, NF4Tensor, dynamic_map, nf4_code, numel
from ft.kernels.nf4.reference import check_finite

_NESTED = tl.constexpr(NESTED_BLOCK)
_TINY = tl.constexpr(1e-38)  # the smallest scale that is divided by, as in the reference
VALUES = 2048  # a program's share in dequantise and quantise, or one block where blocks are larger
FEW = 64  # rows of an input that ``products`` takes
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _scale(absmax, absmax2, offset, table, block, mask):
    """float32 scale of each block named."""
    if absmax2 is None:
        scale = tl.load(absmax + block, mask, 0.0)
    else:
        value = tl.load(table + tl.load(absmax + block, mask, 0).to(tl.int32))
        scale = value * tl.load(absmax2 + block // _NESTED, mask, 0.0) + tl.load(offset)
    return scale


@triton.jit
def dequantise_kernel(
    packed, absmax, absmax2, offset, code, table, index, out, n, bytes, row_blocks,
    HALF: tl.constexpr, BLOCKS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """out = code * scale rounded to ROUND, of n values in ``bytes``; of the rows ``index`` where it is given, each
    ``row_blocks`` blocks long."""
    block_B = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside_B = block_B * (2 * HALF) < n
    source_B = block_B
    if index is not None:
        source_B = tl.load(index + block_B // row_blocks, inside_B, 0) * row_blocks + block_B % row_blocks
    byte_H = tl.arange(0, HALF)
    # Compared with a count of bytes, which Triton knows to be a multiple of 16 where it is, loads are of many bytes.
    inside_BH = block_B[:, None] * HALF + byte_H[None, :] < bytes
    byte_BH = tl.load(packed + source_B[:, None] * HALF + byte_H[None, :], inside_BH, 0)
    scale_B = _scale(absmax, absmax2, offset, table, source_B, inside_B)
    high_BH, low_BH = (byte_BH >> 4).to(tl.int32), (byte_BH & 15).to(tl.int32)
    value = tl.interleave(tl.load(code + high_BH), tl.load(code + low_BH)) * scale_B[:, None]
    at = block_B[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + at, value.to(ROUND).to(out.dtype.element_ty), at < n)


@triton.jit
def quantise_kernel(w, midpoints, packed, absmax, n, bytes, HALF: tl.constexpr, BLOCKS: tl.constexpr):
    """Codes, two a byte, and the absmax of each block; NaN where a block holds one."""
    block_B = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block_B[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    x = tl.load(w + at, at < n, 0.0).to(tl.float32)
    most_B = tl.max(tl.abs(x), 1)
    partial_B = (block_B + 1) * (2 * HALF) > n
    divisor_B = tl.maximum(most_B, _TINY)
    reciprocal_B = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), divisor_B)
    divided = tl.div_rn(x, tl.broadcast_to(divisor_B[:, None], x.shape))
    scaled = tl.where(partial_B[:, None], divided, x * reciprocal_B[:, None])
    codes = tl.zeros(x.shape, tl.int32)
    for i in tl.static_range(15):  # type: ignore[reportGeneralTypeIssues]
        codes += (scaled > tl.load(midpoints + i)).to(tl.int32)
    high_BH, low_BH = tl.split(tl.reshape(codes, [BLOCKS, HALF, 2]))
    byte_H = tl.arange(0, HALF)
    byte_at = block_B[:, None] * HALF + byte_H[None, :]
    tl.store(packed + byte_at, ((high_BH << 4) | low_BH).to(tl.uint8), byte_at < bytes)
    nans_B = tl.sum((x != x).to(tl.int32), 1)
    found_B = tl.where(nans_B != 0, float("nan"), tl.where(partial_B, divisor_B, most_B))
    tl.store(absmax + block_B, found_B, block_B * (2 * HALF) < n)


@triton.jit
def _tile(
    packed, absmax, absmax2, offset, code, table, row_n, k, N, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """float32 weights of rows ``row_n`` and columns k .. k + BLOCK_K, which lie within one block of each row."""
    first_n = row_n.to(tl.int64) * K + k
    inside_n = row_n < N
    scale_n = _scale(absmax, absmax2, offset, table, first_n // BLOCK, inside_n)
    byte_at = (first_n // 2)[:, None] + tl.arange(0, BLOCK_K // 2)[None, :]
    byte = tl.load(packed + byte_at, inside_n[:, None], 0).to(tl.int32)
    # Looked up among a warp's registers: loads here would be pipelined like those of the weight, each on its own.
    code = tl.broadcast_to(tl.load(code + tl.arange(0, 16))[None, :], (row_n.shape[0], 16))
    return tl.interleave(tl.gather(code, byte >> 4, 1), tl.gather(code, byte & 15, 1)) * scale_n[:, None]


@triton.jit
def forward_kernel(
    x, packed, absmax, absmax2, offset, code, table, bias, y, M, N, K,
    BLOCK: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y_MN = x_MK @ w_NK.T + bias_N, with float32 sums."""
    row_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_m = x + row_m.to(tl.int64)[:, None] * K
    acc_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x_mk = tl.load(x_m + k + tl.arange(0, BLOCK_K)[None, :], row_m[:, None] < M, 0.0)
        w_nk = _tile(packed, absmax, absmax2, offset, code, table, row_n, k, N, K, BLOCK, BLOCK_K)
        acc_mn = tl.dot(x_mk, tl.trans(w_nk.to(ROUND).to(x_mk.dtype)), acc_mn)
    if bias is not None:
        acc_mn += tl.load(bias + row_n, row_n < N, 0.0).to(tl.float32)[None, :]
    inside = (row_m[:, None] < M) & (row_n[None, :] < N)
    tl.store(y + row_m.to(tl.int64)[:, None] * N + row_n[None, :], acc_mn.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    grad_y, packed, absmax, absmax2, offset, code, table, grad_x, M, N, K,
    BLOCK: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x_MK = grad_y_MN @ w_NK, with float32 sums."""
    row_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K
    grad_m = grad_y + row_m.to(tl.int64)[:, None] * N
    acc_mk = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, N, BLOCK_N):
        row_n = start + tl.arange(0, BLOCK_N)
        grad_mn = tl.load(grad_m + row_n[None, :], (row_m[:, None] < M) & (row_n[None, :] < N), 0.0)
        w_nk = _tile(packed, absmax, absmax2, offset, code, table, row_n, k, N, K, BLOCK, BLOCK_K)
        acc_mk = tl.dot(grad_mn, w_nk.to(ROUND).to(grad_mn.dtype), acc_mk)
    at = row_m.to(tl.int64)[:, None] * K + k + tl.arange(0, BLOCK_K)[None, :]
    tl.store(grad_x + at, acc_mk.to(grad_x.dtype.element_ty), row_m[:, None] < M)


# ---- what ships -----------------------------------------------------------------------------------------------------


@frozen
class Tiles:
    """How a product is cut: rows of the input and of the weight in a program, warps, and loads under way."""

    m: int
    n: int
    warps: int
    stages: int


def tiles(rows: int) -> Tiles:
    """Narrow where few programs would be left: a weight of 4096 rows then still makes 128 of them."""
    return Tiles(16, 32, 4, 4) if rows <= 16 else Tiles(64, 64, 4, 3)


def _simple(kernel: Any, block: int, **constants: Any) -> Launch:
    """The launch of a kernel that goes over all blocks, some of them in a program."""
    shape = {"HALF": block // 2, "BLOCKS": max(1, VALUES // block)}
    return Launch(name=f"nf4.{kernel.__name__}", kernel=kernel, signature={}, constants=shape | constants, stages=1)


def _product(kernel: Any, cut: Tiles, block: int, dtype: torch.dtype) -> Launch:
    constants = {"BLOCK": block, "ROUND": _TRITON[dtype], "BLOCK_M": cut.m, "BLOCK_N": cut.n, "BLOCK_K": min(block, 64)}
    name = f"nf4.{kernel.__name__} m{cut.m}"
    return Launch(name=name, kernel=kernel, signature={}, constants=constants, warps=cut.warps, stages=cut.stages)


def launches() -> list[Launch]:
    """What is compiled ahead of time: blocks of 64 and bfloat16, the usual ones, and the variants of each kernel."""
    tables = {"code": "*fp32", "table": "*fp32"}
    double = {"packed": "*u8", "absmax": "*u8", "absmax2": "*fp32", "offset": "*fp32", **tables}
    single = {"packed": "*u8", "absmax": "*fp32", **tables}
    absent = {"absmax2": None, "offset": None}
    size = {"n": "i32:16", "bytes": "i32:16", "row_blocks": "i32"}
    large = {"M": "i32", "N": "i32:16", "K": "i32:16"}

    def made(launch: Launch, variant: str, signature: dict[str, str], **constants: Any) -> Launch:
        constants = {**launch.constants, **constants}
        return evolve(launch, name=f"{launch.name} {variant}", signature=signature, constants=constants)

    whole = _simple(dequantise_kernel, 64, ROUND=tl.bfloat16)
    found = [
        made(whole, "double", {**double, **size, "out": "*bf16"}, index=None),
        made(whole, "single", {**single, **size, "out": "*bf16"}, index=None, **absent),
        made(whole, "rows", {**double, **size, "out": "*bf16", "index": "*i64"}),
        made(_simple(dequantise_kernel, 4096, ROUND=tl.float32), "block 4096, float32",
             {**single, **size, "out": "*fp32"}, index=None, **absent),
        made(_simple(quantise_kernel, 64), "", {"w": "*bf16", "midpoints": "*fp32", "packed": "*u8",
                                                "absmax": "*fp32", "n": "i32:16", "bytes": "i32:16"}),
    ]  # fmt: skip
    for rows in (16, FEW):
        up = _product(forward_kernel, tiles(rows), 64, torch.bfloat16)
        down = _product(backward_kernel, tiles(rows), 64, torch.bfloat16)
        found.append(made(up, "double", {**double, **large, "x": "*bf16", "y": "*bf16"}, bias=None))
        found.append(
            made(up, "single, bias", {**single, **large, "x": "*bf16", "y": "*bf16", "bias": "*bf16"}, **absent)
        )
        found.append(made(down, "double", {**double, **large, "grad_y": "*bf16", "grad_x": "*bf16"}))
    return found


# ---- on tensors -----------------------------------------------------------------------------------------------------


_code = cache(nf4_code)
_table = cache(dynamic_map)


@cache
def _midpoints(device: torch.device) -> Tensor:
    code = nf4_code(device)
    return (code[1:] + code[:-1]) / 2


def _parts(q: NF4Tensor) -> dict[str, Tensor | None]:
    """A weight's tensors, and the tables, under the names of the kernels' arguments."""
    at = q.packed.device
    parts = {"packed": q.packed, "absmax": q.absmax, "absmax2": q.absmax2, "offset": q.offset}
    return {**parts, "code": _code(at), "table": _table(at)}


def _run(launch: Launch, grid: tuple[int, ...], at: Tensor, **arguments: Any) -> None:
    with device(at):
        launch.kernel[grid](**arguments, **launch.constants, **launch.options)


@torch.no_grad()
def dequantise(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As ``reference.dequantise``."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device)
    _dequantise(q, out, None, 1)
    return out


@torch.no_grad()
def dequantise_rows(q: NF4Tensor, index_R: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As ``ops.dequantise_rows``; rows are a whole number of blocks. Nothing but the result is allocated."""
    out = torch.empty((len(index_R), *q.shape[1:]), dtype=dtype or q.dtype, device=q.packed.device)
    _dequantise(q, out, index_R.contiguous(), numel(q) // q.shape[0] // q.block)
    return out


def _dequantise(q: NF4Tensor, out: Tensor, index: Tensor | None, row_blocks: int) -> None:
    launch = _simple(dequantise_kernel, q.block, ROUND=_TRITON[q.dtype])
    n = out.numel()
    if n:
        grid = (triton.cdiv(n, q.block * launch.constants["BLOCKS"]),)
        _run(launch, grid, out, **_parts(q), index=index, out=out, n=n, bytes=(n + 1) // 2, row_blocks=row_blocks)


@torch.no_grad()
def codes(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(packed codes, float32 absmax of each block) of a weight. Raises ModelError where a value is not finite."""
    w = w.contiguous()
    n = w.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block), dtype=torch.float32, device=w.device)
    launch = _simple(quantise_kernel, block)
    grid = (triton.cdiv(n, block * launch.constants["BLOCKS"]),)
    _run(launch, grid, w, w=w, midpoints=_midpoints(w.device), packed=packed, absmax=absmax, n=n, bytes=len(packed))
    check_finite(absmax)
    return packed, absmax


def products(x: Tensor, q: NF4Tensor) -> bool:
    """Whether ``forward`` and ``backward`` are meant for this input: few rows, in 16 bits, rows of whole blocks."""
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    if interpreted() and x.dtype == torch.bfloat16:
        return False  # the interpreter's matrix product takes the bits of bfloat16 for integers
    return 0 < rows <= FEW and x.dtype.itemsize == 2 and len(q.shape) == 2 and q.shape[1] % q.block == 0


@torch.no_grad()
def forward(x: Tensor, q: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ w.T + bias`` in x's type."""
    (N, K), flat = q.shape, x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty((len(flat), N), dtype=x.dtype, device=x.device)
    cut = tiles(len(flat))
    launch = _product(forward_kernel, cut, q.block, q.dtype)
    grid = (triton.cdiv(N, cut.n), triton.cdiv(len(flat), cut.m))
    _run(launch, grid, y, x=flat, **_parts(q), bias=bias, y=y, M=len(flat), N=N, K=K)
    return y.view(*x.shape[:-1], N)


@torch.no_grad()
def backward(grad_y: Tensor, q: NF4Tensor) -> Tensor:
    """``grad_y @ w`` in grad_y's type."""
    (N, K), flat = q.shape, grad_y.reshape(-1, grad_y.shape[-1]).contiguous()
    grad_x = torch.empty((len(flat), K), dtype=grad_y.dtype, device=grad_y.device)
    cut = tiles(len(flat))
    launch = _product(backward_kernel, cut, q.block, q.dtype)
    grid = (K // launch.constants["BLOCK_K"], triton.cdiv(len(flat), cut.m))
    _run(launch, grid, grad_x, grad_y=flat, **_parts(q), grad_x=grad_x, M=len(flat), N=N, K=K)
    return grad_x.view(*grad_y.shape[:-1], K)
