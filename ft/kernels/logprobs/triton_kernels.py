"""The Triton kernels of token_logps.

- ``statistics_kernel``: the product with the head and its online log-sum-exp in one, where no Jacobian is wanted (a
  trained head, or no gradient at all). No logit is written; each program's part of the vocabulary, a split, leaves
  its maximum, sum and first moment, which are combined afterwards.
- ``exponent_kernel``: where forward forms the Jacobian, a tile of logits comes from a matrix product and goes into
  another one; this is everything in between, in place.
- ``gradient_kernel``: the product again and d loss / d(product + bias) of one tile, for a trained head's backward.

All are deterministic. Products are of the wider input type, with float32 sums; those of float32 are not rounded.

Shapes: N positions, V vocabulary, D model width, r LoRA rank; R positions of a block and C tokens of a tile; S splits
of the vocabulary. Blocks of a program: n positions, v tokens, d columns of the products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ft.kernels.logprobs import tiles

FORBIDDEN = tl.constexpr(tiles.FORBIDDEN)
LORA_D = tl.constexpr(16)  # columns of LoRA's products at a time


@triton.jit
def _place(blocks_n, blocks_v, GROUP: tl.constexpr):
    """This program's block of positions and of tokens; GROUP blocks of positions go through the tokens together."""
    program = tl.program_id(0)
    group = program // (GROUP * blocks_v)
    height = tl.minimum(blocks_n - group * GROUP, GROUP)
    within = program % (GROUP * blocks_v)
    return group * GROUP + within % height, within // height


@triton.jit
def _add_product(acc_nv, a, b, row_n, col_v, N, V, K, a_row, b_row, BLOCK_D: tl.constexpr, PRODUCT: tl.constexpr):
    """acc + a[rows] @ b[cols].T. Rows beyond the end repeat the last one; who stores leaves them out."""
    a_n = a + tl.minimum(row_n, N - 1).to(tl.int64) * a_row
    b_v = b + tl.minimum(col_v, V - 1).to(tl.int64) * b_row
    for start in range(0, K, BLOCK_D):
        k_d = start + tl.arange(0, BLOCK_D)
        a_nd = tl.load(a_n[:, None] + k_d[None, :], mask=k_d[None, :] < K, other=0.0)
        b_dv = tl.load(b_v[None, :] + k_d[:, None], mask=k_d[:, None] < K, other=0.0)
        acc_nv = tl.dot(a_nd.to(PRODUCT), b_dv.to(PRODUCT), acc_nv, input_precision="ieee")
    return acc_nv


@triton.jit
def _curve(x, bias, col, V, slope, cap, SOFTCAP: tl.constexpr):
    """(z, slope of the softcap): from x, the product times ``slope``, to z, with the bias in between."""
    if bias is not None:
        bias_v = tl.maximum(tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32), FORBIDDEN)
        x += (bias_v * slope)[None, :]
    if SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        return tanh * cap, 1.0 - tanh * tanh
    return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def statistics_kernel(
    hidden, head, low, B, bias, target, target_z, stats,
    N, V, D, r, hidden_row, head_row, low_row, B_row, slope, cap,
    SOFTCAP: tl.constexpr, PRODUCT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """stats (3, S, N): each split's maximum, sum of exp(z - maximum) and first moment, of the tokens but the target."""
    splits = tl.cdiv(V, BLOCK_V)
    block, split = _place(tl.cdiv(N, BLOCK_N), splits, GROUP)
    row_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    col_v = split * BLOCK_V + tl.arange(0, BLOCK_V)
    x_nv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    x_nv = _add_product(x_nv, hidden, head, row_n, col_v, N, V, D, hidden_row, head_row, BLOCK_D, PRODUCT)
    if low is not None:
        x_nv = _add_product(x_nv, low, B, row_n, col_v, N, V, r, low_row, B_row, LORA_D, PRODUCT)
    z_nv, _ = _curve(x_nv * slope, bias, col_v, V, slope, cap, SOFTCAP)
    here_n = row_n < N
    target_n = tl.load(target + row_n, mask=here_n, other=-1)
    hit_nv = (col_v[None, :] == target_n[:, None]) & (col_v[None, :] < V)
    found_n = (target_n >= split * BLOCK_V) & (target_n < tl.minimum((split + 1) * BLOCK_V, V))
    tl.store(target_z + row_n, tl.sum(tl.where(hit_nv, z_nv, 0.0), 1), mask=found_n & here_n)
    z_nv = tl.where(hit_nv | (col_v[None, :] >= V), FORBIDDEN, z_nv)
    most_n = tl.maximum(tl.max(z_nv, 1), 0.1 * FORBIDDEN)
    z_nv -= most_n[:, None]
    exp_nv = tl.exp(z_nv)
    split = split.to(tl.int64)
    tl.store(stats + split * N + row_n, most_n, mask=here_n)
    tl.store(stats + (split + splits) * N + row_n, tl.sum(exp_nv, 1), mask=here_n)
    tl.store(stats + (split + 2 * splits) * N + row_n, tl.sum(z_nv * exp_nv, 1), mask=here_n)


@triton.jit
def exponent_kernel(
    tile, bias, target, target_z, most, total, moment, shrink,
    R, C, start, slope, cap,
    SOFTCAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of products becomes exp(z - most) times the softcap's slope, 0 at the target; the sums go on."""
    row_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    here_r = row_r < R
    target_r = tl.load(target + row_r, mask=here_r, other=-1) - start
    tile_r1 = tile + row_r.to(tl.int64)[:, None] * C
    new_r = tl.load(most + row_r, mask=here_r, other=0.0)
    old_r = new_r
    found_r = tl.zeros([BLOCK_R], tl.int32)
    target_z_r = tl.zeros([BLOCK_R], tl.float32)
    for c in range(0, C, BLOCK_C):
        col_c = c + tl.arange(0, BLOCK_C)
        inside_rc = here_r[:, None] & (col_c[None, :] < C)
        x_rc = tl.load(tile_r1 + col_c[None, :], mask=inside_rc, other=0.0).to(tl.float32)
        z_rc, _ = _curve(x_rc, bias, col_c, C, slope, cap, SOFTCAP)
        hit_rc = (col_c[None, :] == target_r[:, None]) & inside_rc
        found_r += tl.sum(hit_rc.to(tl.int32), 1)
        target_z_r += tl.sum(tl.where(hit_rc, z_rc, 0.0), 1)
        new_r = tl.maximum(new_r, tl.max(tl.where(hit_rc | (col_c[None, :] >= C), FORBIDDEN, z_rc), 1))
    sum_r = tl.zeros([BLOCK_R], tl.float32)
    moment_r = tl.zeros([BLOCK_R], tl.float32)
    for c in range(0, C, BLOCK_C):
        col_c = c + tl.arange(0, BLOCK_C)
        inside_rc = here_r[:, None] & (col_c[None, :] < C)
        x_rc = tl.load(tile_r1 + col_c[None, :], mask=inside_rc, other=0.0).to(tl.float32)
        z_rc, flat_rc = _curve(x_rc, bias, col_c, C, slope, cap, SOFTCAP)
        hit_rc = (col_c[None, :] == target_r[:, None]) & inside_rc
        z_rc = tl.where(hit_rc | (col_c[None, :] >= C), FORBIDDEN, z_rc) - new_r[:, None]
        exp_rc = tl.exp(z_rc)
        sum_r += tl.sum(exp_rc, 1)
        moment_r += tl.sum(z_rc * exp_rc, 1)
        tl.store(tile_r1 + col_c[None, :], (exp_rc * flat_rc).to(tile.dtype.element_ty), mask=inside_rc)
    change_r = old_r - new_r
    shrink_r = tl.exp(change_r)
    total_r = tl.load(total + row_r, mask=here_r, other=0.0)
    moment_r += shrink_r * (tl.load(moment + row_r, mask=here_r, other=0.0) + total_r * change_r)
    tl.store(target_z + row_r, target_z_r, mask=here_r & (found_r > 0))
    tl.store(most + row_r, new_r, mask=here_r)
    tl.store(total + row_r, shrink_r * total_r + sum_r, mask=here_r)
    tl.store(moment + row_r, moment_r, mask=here_r)
    tl.store(shrink + row_r, shrink_r, mask=here_r)


@triton.jit
def gradient_kernel(
    hidden, head, low, B, bias, target, lse, grad, grad_target, tile, bias_sums,
    R, C, D, r, hidden_row, head_row, low_row, B_row, slope, cap, start,
    SOFTCAP: tl.constexpr, PRODUCT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """tile = grad * (onehot - p) times the softcap's slope; bias_sums (blocks of positions, C): sums of its columns."""
    block, part = _place(tl.cdiv(R, BLOCK_N), tl.cdiv(C, BLOCK_V), GROUP)
    row_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    col_v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    x_nv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    x_nv = _add_product(x_nv, hidden, head, row_n, col_v, R, C, D, hidden_row, head_row, BLOCK_D, PRODUCT)
    if low is not None:
        x_nv = _add_product(x_nv, low, B, row_n, col_v, R, C, r, low_row, B_row, LORA_D, PRODUCT)
    z_nv, flat_nv = _curve(x_nv * slope, bias, col_v, C, slope, cap, SOFTCAP)
    here_n = row_n < R
    grad_n = tl.load(grad + row_n, mask=here_n, other=0.0)
    lse_n = tl.load(lse + row_n, mask=here_n, other=float("inf"))
    target_n = tl.load(target + row_n, mask=here_n, other=-1) - start
    on_target_n = tl.load(grad_target + row_n, mask=here_n, other=0.0)
    share_nv = -grad_n[:, None] * tl.exp(z_nv - lse_n[:, None])
    out_nv = tl.where(col_v[None, :] == target_n[:, None], on_target_n[:, None], share_nv) * flat_nv
    inside_nv = here_n[:, None] & (col_v[None, :] < C)
    at_nv = tile + row_n.to(tl.int64)[:, None] * C + col_v[None, :]
    tl.store(at_nv, out_nv.to(tile.dtype.element_ty), mask=inside_nv)
    if bias_sums is not None:
        tl.store(bias_sums + block * C + col_v, tl.sum(out_nv, 0), mask=col_v < C)
