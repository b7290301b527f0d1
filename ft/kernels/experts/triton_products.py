"""Triton kernels of routed experts: grouped products over rows sorted by expert, and what goes between them.

A stored stack is (E, P, Q), dense with any strides or NF4, whose blocks a program dequantises as it multiplies. Every
program works on rows of one expert, which a schedule made on the device tells it, so nothing waits for the host.
Rows are read through ``slot_R`` where they are still tokens (slot // K), and written through it where they go back.
float32 is multiplied in IEEE precision; sums are float32 always. MMA is the type that products are taken in: the rows'
own, but float32 under the interpreter, whose product of bfloat16 is one of its bits.

Shapes: T tokens, K experts per token, R = T * K routed rows, E experts, D width of a token, I expert width, P and Q
the stored matrix, B blocks of rows of one expert. Sizes of a tile: BR rows, BO outputs, BI of the summed dimension.
"""
# Kernels are in Triton's language, which a type checker of Python misreads.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside):
    """The float32 scale of each block of values, from 8 bits where it is quantised itself."""
    if absmax2_ptr is None:
        return tl.load(absmax_ptr + block, mask=inside, other=0.0)
    else:
        value = tl.load(map_ptr + tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32))
        return value * tl.load(absmax2_ptr + block // 256, mask=inside, other=0.0) + tl.load(offset_ptr)


@triton.jit
def _nf4(
    w_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, map_ptr, base, row, first, P, Q,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Values (row, first : first + BQ) of the matrix that begins at value ``base``; finite rubbish outside of it.

    SPAN: how many scales the tile needs in a row, where blocks begin and end with rows; 0 where they straddle rows.
    Then every byte asks for its scale: both its values are of one row and one block, Q and BLOCK being even.
    """
    column = first + 2 * tl.arange(0, BQ // 2)[None, :]
    at, inside = row * Q + column, (row < P) & (column < Q)
    byte = tl.load(w_ptr + base // 2 + at // 2, mask=inside, other=0).to(tl.int32)
    high, low = tl.load(code_ptr + (byte >> 4)), tl.load(code_ptr + (byte & 15))
    if SPAN == 0:
        scale = _scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, (base + at) // BLOCK, inside)
        return tl.interleave(high * scale, low * scale)
    else:
        start = first + BLOCK * tl.arange(0, SPAN)[None, :]
        block = base // BLOCK + (row * Q + start) // BLOCK
        scale = _scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, (row < P) & (start < Q))
        value = tl.interleave(high, low).reshape(row.shape[0], SPAN, BQ // SPAN) * scale[:, :, None]
        return value.reshape(row.shape[0], BQ)


@triton.jit
def times_kernel(
    x_ptr, w_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, map_ptr, bias_ptr, low_ptr, lift_ptr, out_ptr,
    expert_B, row_B, ends_E, slot_R,
    K, P, Q, RANK, w_e, w_p, w_q, lift_e, lift_r, lift_o, scale, experts,
    FLIP: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, KEPT: tl.constexpr,
    MMA: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """out_r = x_r W_e + bias_e + scale * low_r lift_e, with W_e^T where FLIP. BLOCK is 0 for dense weights.

    Programs that follow each other share their rows of x and their expert.
    """
    IN, OUT = (Q, P) if FLIP else (P, Q)
    tiles = tl.cdiv(OUT, BO)
    block = tl.program_id(0) // tiles
    e = tl.load(expert_B + block)
    if e >= experts:
        return
    row = tl.load(row_B + block) + tl.arange(0, BR)
    here = row < tl.load(ends_E + e)
    slot = row
    if GATHER or SCATTER:
        slot = tl.load(slot_R + row, mask=here, other=0)
    x_row = ((slot // K if GATHER else row).to(tl.int64) * IN)[:, None]
    out = (tl.program_id(0) % tiles) * BO + tl.arange(0, BO)
    inner = tl.arange(0, BI)
    e = e.to(tl.int64)
    acc = tl.zeros((BR, BO), tl.float32)
    if low_ptr is not None:
        for start in range(0, RANK, BL):
            rank = start + tl.arange(0, BL)
            low_at = row.to(tl.int64)[:, None] * RANK + rank[None, :]
            low = tl.load(low_ptr + low_at, mask=here[:, None] & (rank < RANK)[None, :], other=0.0)
            lift_at = e * lift_e + rank[:, None] * lift_r + out[None, :] * lift_o
            lift = tl.load(lift_ptr + lift_at, mask=(rank < RANK)[:, None] & (out < OUT)[None, :], other=0.0)
            acc = tl.dot(low.to(MMA), lift.to(low.dtype).to(MMA), acc, input_precision="ieee")
        acc *= scale
    for start in range(0, IN, BI):
        index = start + inner
        x = tl.load(x_ptr + x_row + index[None, :], mask=here[:, None] & (index < IN)[None, :], other=0.0)
        if BLOCK == 0:
            p, q = (out[None, :], index[:, None]) if FLIP else (index[:, None], out[None, :])
            w = tl.load(w_ptr + e * w_e + p * w_p + q * w_q, mask=(p < P) & (q < Q), other=0.0)
        elif FLIP:
            w = _nf4(w_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, map_ptr, e * w_e,
                     out[:, None], start, P, Q, BLOCK, SPAN, BI).to(KEPT).trans()  # fmt: skip
        else:
            w = _nf4(w_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, map_ptr, e * w_e,
                     index[:, None], (tl.program_id(0) % tiles) * BO, P, Q, BLOCK, SPAN, BO).to(KEPT)  # fmt: skip
        acc = tl.dot(x.to(MMA), w.to(x.dtype).to(MMA), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + e * OUT + out, mask=out < OUT, other=0.0).to(tl.float32)[None, :]
    out_row = (slot if SCATTER else row).to(tl.int64)[:, None] * OUT
    value = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row + out[None, :], value, mask=here[:, None] & (out < OUT)[None, :])


@triton.jit
def outer_kernel(
    left_ptr, right_ptr, weight_ptr, out_ptr, ends_E, slot_R, K, P, Q, scale,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, WEIGH_LEFT: tl.constexpr,
    MMA: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out_e = scale * sum over e's rows of weight_r left_r^T right_r, (E, P, Q); zeros for an expert without rows."""
    across = tl.cdiv(Q, BQ)
    tiles = tl.cdiv(P, BP) * across
    e, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    p, q = tile // across * BP + tl.arange(0, BP), tile % across * BQ + tl.arange(0, BQ)
    end = tl.load(ends_E + e)
    acc = tl.zeros((BP, BQ), tl.float32)
    for start in range(tl.load(ends_E + e - 1, mask=e > 0, other=0), end, BR):
        row = start + tl.arange(0, BR)
        here = row < end
        slot = tl.load(slot_R + row, mask=here, other=0)
        left_row = (slot // K if GATHER_LEFT else row).to(tl.int64)
        right_row = (slot // K if GATHER_RIGHT else row).to(tl.int64)
        left = tl.load(left_ptr + left_row[None, :] * P + p[:, None], mask=here[None, :] & (p < P)[:, None], other=0.0)
        right = tl.load(
            right_ptr + right_row[:, None] * Q + q[None, :], mask=here[:, None] & (q < Q)[None, :], other=0.0
        )
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + slot, mask=here, other=0.0).to(tl.float32)
            if WEIGH_LEFT:
                left = (left * weight[None, :]).to(left.dtype)
            else:
                right = (right * weight[:, None]).to(right.dtype)
        acc = tl.dot(left.to(MMA), right.to(MMA), acc, input_precision="ieee")
    at = e.to(tl.int64) * P * Q + p[:, None].to(tl.int64) * Q + q[None, :]
    tl.store(out_ptr + at, (acc * scale).to(out_ptr.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])


@triton.jit
def sums_kernel(
    x_ptr, weight_ptr, out_ptr, ends_E, slot_R, K, P, GATHER: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr
):
    """out_e = sum over e's rows of weight_r x_r, (E, P)."""
    e, column = tl.program_id(0), tl.program_id(1) * BO + tl.arange(0, BO)
    end = tl.load(ends_E + e)
    acc = tl.zeros((BR, BO), tl.float32)
    for start in range(tl.load(ends_E + e - 1, mask=e > 0, other=0), end, BR):
        row = start + tl.arange(0, BR)
        here = row < end
        slot = tl.load(slot_R + row, mask=here, other=0)
        x_row = (slot // K if GATHER else row).to(tl.int64)
        x = tl.load(
            x_ptr + x_row[:, None] * P + column[None, :], mask=here[:, None] & (column < P)[None, :], other=0.0
        ).to(tl.float32)
        if weight_ptr is not None:
            x *= tl.load(weight_ptr + slot, mask=here, other=0.0).to(tl.float32)[:, None]
        acc += x
    tl.store(out_ptr + e * P + column, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=column < P)


@triton.jit
def combine_kernel(y_ptr, weight_ptr, out_ptr, T, K, D, BT: tl.constexpr, BD: tl.constexpr):
    """out_t = sum_k weight_tk y_tk; y is (T, K, D)."""
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (t < T)[:, None] & (d < D)[None, :]
    acc = tl.zeros((BT, BD), tl.float32)
    for k in range(K):
        slot = t.to(tl.int64) * K + k
        y = tl.load(y_ptr + slot[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + slot, mask=t < T, other=0.0).to(tl.float32)[:, None]
        acc += y
    at = t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weigh_kernel(
    a_ptr, u_ptr, weight_ptr, dweight_ptr, bias_ptr, g_ptr, expert_R, slot_R, R, K, I, D,
    BR: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dweight at r's slot = <a_r, u_r> + <bias_e, g_t>, and u_r becomes weight_r u_r.

    In place is safe because a tile has more elements than a program has threads: one thread alone reads an element.
    """
    row, column = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BI)
    here = row < R
    slot = tl.load(slot_R + row, mask=here, other=0)
    weight = tl.load(weight_ptr + slot, mask=here, other=0.0).to(tl.float32)
    acc = tl.zeros((BR, BI), tl.float32)
    for start in range(0, I, BI):
        at = row.to(tl.int64)[:, None] * I + (start + column)[None, :]
        inside = here[:, None] & (start + column < I)[None, :]
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
        acc += u * tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(u_ptr + at, (u * weight[:, None]).to(u_ptr.dtype.element_ty), mask=inside)
    if bias_ptr is not None:
        e = tl.load(expert_R + row, mask=here, other=0).to(tl.int64)
        for start in range(0, D, BI):
            index = start + column
            inside = here[:, None] & (index < D)[None, :]
            g = tl.load(g_ptr + (slot // K).to(tl.int64)[:, None] * D + index[None, :], mask=inside, other=0.0)
            bias = tl.load(bias_ptr + e[:, None] * D + index[None, :], mask=inside, other=0.0)
            acc += g.to(tl.float32) * bias.to(tl.float32)
    tl.store(dweight_ptr + slot, tl.sum(acc, 1), mask=here)
