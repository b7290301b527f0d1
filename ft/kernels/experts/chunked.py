"""Routed experts where the host knows the routing (a CPU): chunk after chunk of experts, each in cache.

A chunk is a few experts' rows, padded to the longest: (C, P, .). Its rank-sized products are one batched product
each, and so are those of experts whose matrices follow each other in the stack: made singly they cost a call each,
and in 16 bits a call costs more than a small product's arithmetic. NF4 matrices are dense only while they
are multiplied. Nothing of the size of all routed rows is made but what backward needs.

Shapes: C experts of a chunk, P their padded rows, U = T + 1 (padding writes to the last); others as in the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.kernels.experts import LoRA, Params
from ft.kernels.experts.chunks import Chunk, Route, route
from ft.kernels.experts.projection import Kind, Needs, Tensors, Weights, split, sum_dtype, weights, width
from ft.kernels.experts.rows import Gate, add_rows, gate
from ft.kernels.nf4 import dequantise, slice_rows

TOGETHER = 1 << 20  # values of NF4 matrices that are dense at a time, or one matrix: a call for each costs more


def experts(
    hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, params: Params, lora: LoRA, *, keep: bool = False
) -> Tensor:
    """out_TD in ``hidden_TD``'s type, which is the weights' (any where they are NF4)."""
    up, up_tensors = split(params.up, lora.up)
    down, down_tensors = split(params.down, lora.down)
    widest = max(hidden_TD.shape[1], width(params.up))
    routed = route(index_TK, params.up.weight.shape[0], widest, narrow=hidden_TD.dtype.itemsize == 2)
    plan = _Plan(route=routed, up=up, down=down, gate=gate(params.act), keep=keep, trains=torch.is_grad_enabled())
    return _Experts.apply(plan, hidden_TD, weight_TK, *up_tensors, *down_tensors)  # type: ignore[no-any-return]


class Room:
    """Memory that one tensor of each chunk after the other lies in: warm in cache, and never given back between."""

    def __init__(self, like: Tensor) -> None:
        self.flat = like.new_empty(0)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        n = math.prod(shape)
        if self.flat.numel() < n:
            self.flat = self.flat.new_empty(n)
        return self.flat.narrow(0, 0, n).view(shape)


# --- one projection of a chunk ---------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Side:
    """A projection's operands; all but ``weight`` in the type of the products."""

    weight: Weights
    transposed: bool
    bias_EM: Tensor | None
    A_ErN: Tensor | None
    B_EMr: Tensor | None
    scaling: float

    @property
    def widths(self) -> tuple[int, int]:
        """(N, M)"""
        first, second = self.weight.shape[1:]
        return (first, second) if self.transposed else (second, first)


def side(kind: Kind, tensors: Tensors, dtype: torch.dtype) -> Side:
    weight, *others = tensors
    bias_EM, A_ErN, B_EMr = (None if t is None else t.detach().to(dtype) for t in others)
    return Side(
        weight=weights(kind, weight), transposed=kind.transposed, bias_EM=bias_EM, A_ErN=A_ErN, B_EMr=B_EMr,
        scaling=kind.scaling,
    )  # fmt: skip


Found = Iterable[tuple[int, int, Tensor]]  # start, stop: the chunk's places whose experts have these matrices


def matrices(w: Weights, chunk: Chunk, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """The experts' matrices, (n, ., .) for n neighbours; of an NF4 stack TOGETHER values at most exist at a time."""
    if isinstance(w, Tensor):
        yield from ((start, stop, w[e : e + stop - start]) for e, start, stop in chunk.runs)
    elif w.shape[1] * w.shape[2] % w.block:  # scales straddle experts
        yield 0, len(chunk.experts), dequantise(w, dtype)[chunk.expert_C]
    else:
        most = max(1, TOGETHER // (w.shape[1] * w.shape[2]))
        for e, start, stop in chunk.runs:
            for i in range(start, stop, most):
                n = min(most, stop - i)
                yield i, i + n, dequantise(slice_rows(w, e + i - start, n), dtype)


def times(x_CPN: Tensor, found: Found, out_CPM: Tensor, *, flip: bool, add: bool) -> None:
    """Into out: x_c W_c for each expert of the chunk (W_c^T with ``flip``), or that in addition to what is there."""
    for start, stop, w in found:
        out_nPM, x_nPN, w = out_CPM[start:stop], x_CPN[start:stop], w.mT if flip else w
        if add:
            torch.baddbmm(out_nPM, x_nPN, w, out=out_nPM)
        else:
            torch.bmm(x_nPN, w, out=out_nPM)


def _project(x_CPN: Tensor, found: Found, to: Side, chunk: Chunk, out_CPM: Tensor) -> Tensor | None:
    """Into out: y = x W^T + b + s (x A^T) B^T. Returns s x A^T.

    LoRA's share comes first, since the large product adds up at no cost what would else be read and written again.
    """
    xa_CPr = None
    if to.A_ErN is not None and to.B_EMr is not None:
        xa_CPr = torch.bmm(x_CPN, chunk.of(to.A_ErN).mT).mul_(to.scaling)
        torch.bmm(xa_CPr, chunk.of(to.B_EMr).mT, out=out_CPM)
    times(x_CPN, found, out_CPM, flip=not to.transposed, add=xa_CPr is not None)
    if to.bias_EM is not None:
        out_CPM += chunk.of(to.bias_EM)[:, None]
    return xa_CPr


def _project_back(g_CPM: Tensor, found: Found, to: Side, chunk: Chunk, out_CPN: Tensor) -> Tensor | None:
    """Into out: dx = g W + s (g B) A. Returns s g B."""
    gb_CPr = None
    if to.A_ErN is not None and to.B_EMr is not None:
        gb_CPr = torch.bmm(g_CPM, chunk.of(to.B_EMr)).mul_(to.scaling)
        torch.bmm(gb_CPr, chunk.of(to.A_ErN), out=out_CPN)
    times(g_CPM, found, out_CPN, flip=to.transposed, add=gb_CPr is not None)
    return gb_CPr


def _add_grads(
    into: Tensors,
    chunk: Chunk,
    to: Side,
    g_CPM: Tensor,
    x_CPN: Tensor,
    xa_CPr: Tensor | None,
    gb_CPr: Tensor | None,
    w_CP1: Tensor | None,
) -> None:
    """Write the chunk's gradients of weight, bias, A and B, each row's share times ``w``, applied to the narrower."""
    dW, dbias_EM, dA_ErN, dB_EMr = into
    if dW is not None:
        left, right = (_scaled(x_CPN, w_CP1), g_CPM) if to.transposed else (g_CPM, _scaled(x_CPN, w_CP1))
        for e, g, x in zip(chunk.experts, left.unbind(), right.unbind(), strict=True):
            torch.mm(g.t(), x, out=dW[e])
    if dbias_EM is not None:
        chunk.put(dbias_EM, _scaled(g_CPM.to(sum_dtype(g_CPM.dtype)), w_CP1).sum(1))
    if dA_ErN is not None and gb_CPr is not None:
        chunk.put(dA_ErN, torch.bmm(_scaled(gb_CPr, w_CP1).mT, x_CPN))
    if dB_EMr is not None and xa_CPr is not None:  # the transpose, since products with few rows are the faster ones
        chunk.put(dB_EMr, torch.bmm(_scaled(xa_CPr, w_CP1).mT, g_CPM).mT)


def _scaled(x: Tensor, w_CP1: Tensor | None) -> Tensor:
    return x if w_CP1 is None else x * w_CP1.to(x.dtype)


def _grads(tensors: Tensors, needs: Needs, idle: Tensor) -> Tensors:
    """Room for the gradients wanted; zeros for experts that received nothing."""
    made = (torch.empty_like(t) if t is not None and need else None for t, need in zip(tensors, needs, strict=True))
    return [None if t is None else t.index_fill_(0, idle, 0) for t in made]


# --- the whole -------------------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class _Plan:
    route: Route
    up: Kind
    down: Kind
    gate: Gate
    keep: bool
    trains: bool

    def sides(self, tensors: Tensors, dtype: torch.dtype) -> tuple[Side, Side]:
        return side(self.up, tensors[:4], dtype), side(self.down, tensors[4:], dtype)


class _Experts(torch.autograd.Function):
    """Keeps hidden_TD, the up projection's output and rank-sized products; gathers, activates and dequantises again.

    With u_r = W_down^T g_t, the gradient of a routing weight, <down(a_r), g_t>, is <a_r, u_r> (plus the bias's share),
    and that of a_r is w_r u_r: so neither down's output nor a weighted copy of g is kept or made.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden_TD: Tensor, weight_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        (up, down), saved = plan.sides(tensors, hidden_TD.dtype), []
        w_S = _weights_S(weight_TK, hidden_TD.dtype)
        out_UD = hidden_TD.new_zeros(len(hidden_TD) + 1, down.widths[1], dtype=w_S.dtype)
        x_room, a_room, y_room = (Room(hidden_TD) for _ in range(3))
        ctx.kept = []
        for chunk in plan.route.chunks:
            W_up, W_down = _both(up, down, chunk, hidden_TD.dtype, plan.keep)
            h_CPM = hidden_TD.new_empty(*chunk.shape, up.widths[1])
            up_xa_CPr = _project(_rows(hidden_TD, chunk, x_room), W_up, up, chunk, h_CPM)
            a_CPI, y_CPD = plan.gate.forward(h_CPM, a_room), y_room((*chunk.shape, down.widths[1]))
            down_xa_CPr = _project(a_CPI, W_down, down, chunk, y_CPD)
            add_rows(out_UD, chunk.token_R, y_CPD.flatten(0, 1), w_S[chunk.slot_R])
            if plan.trains:
                saved += [h_CPM, up_xa_CPr, down_xa_CPr]
                ctx.kept.append((W_up, W_down) if plan.keep else None)
        ctx.plan = plan
        ctx.save_for_backward(hidden_TD, weight_TK, *tensors, *saved)
        return out_UD[:-1].to(hidden_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        hidden_TD, weight_TK, *tensors = saved[:10]
        plan, needs, g_TD = ctx.plan, ctx.needs_input_grad, grads[0]
        up, down = plan.sides(tensors, hidden_TD.dtype)
        idle = plan.route.idle
        dup, ddown = _grads(tensors[:4], needs[3:7], idle), _grads(tensors[4:], needs[7:], idle)
        w_S = _weights_S(weight_TK, hidden_TD.dtype)
        dx_UD = hidden_TD.new_zeros(len(hidden_TD) + 1, up.widths[0], dtype=w_S.dtype)
        dw_S = torch.zeros_like(w_S)
        g_room, a_room, u_room, h_room, dx_room, x_room = (Room(hidden_TD) for _ in range(6))
        below = needs[1] or any(needs[3:7])
        for i, chunk in enumerate(plan.route.chunks):
            h_CPM, up_xa_CPr, down_xa_CPr = saved[10 + 3 * i :][:3]
            W_up, W_down = ctx.kept[i] or _both(up, down, chunk, hidden_TD.dtype)
            g_CPD, w_CP = _rows(g_TD, chunk, g_room), w_S[chunk.slot_R].view(chunk.shape)
            u_CPI = u_room((*chunk.shape, down.widths[0]))
            gb_CPr = _project_back(g_CPD, W_down, down, chunk, u_CPI)
            a_CPI, d_CP, dh_CPM = plan.gate.backward(h_CPM, u_CPI, w_CP, a_room, h_room)
            dw_S[chunk.slot_R] = _plus_bias(d_CP, g_CPD, down, chunk).flatten()
            _add_grads(ddown, chunk, down, g_CPD, a_CPI, down_xa_CPr, gb_CPr, w_CP[..., None])
            if not below:
                continue
            dx_CPD = dx_room((*chunk.shape, up.widths[0]))
            gb_CPr = _project_back(dh_CPM, W_up, up, chunk, dx_CPD)
            add_rows(dx_UD, chunk.token_R, dx_CPD.flatten(0, 1), None)
            if any(needs[3:7]):
                _add_grads(dup, chunk, up, dh_CPM, _rows(hidden_TD, chunk, x_room), up_xa_CPr, gb_CPr, None)
        dhidden_TD = dx_UD[:-1].to(hidden_TD.dtype) if needs[1] else None
        dweight_TK = dw_S[:-1].view_as(weight_TK).to(weight_TK.dtype) if needs[2] else None
        return None, dhidden_TD, dweight_TK, *dup, *ddown


def _both(up: Side, down: Side, chunk: Chunk, dtype: torch.dtype, keep: bool = False) -> tuple[Found, Found]:
    """The chunk's matrices of up and of down; each is made when it is multiplied, unless all are to be kept."""
    both = (matrices(one.weight, chunk, dtype) for one in (up, down))
    first, second = (list(found) if keep else found for found in both)
    return first, second


def _rows(x_TD: Tensor, chunk: Chunk, room: Room) -> Tensor:
    """The chunk's rows; padding is zeros."""
    out_CPD = room((*chunk.shape, x_TD.shape[1]))
    out_RD = out_CPD.flatten(0, 1)
    torch.index_select(x_TD, 0, chunk.source_R, out=out_RD)
    if chunk.padding is not None:
        out_RD.index_fill_(0, chunk.padding, 0)
    return out_CPD


def _weights_S(weight_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Routing weights of the slots in the type of sums, and a zero for padding."""
    flat = weight_TK.flatten().to(sum_dtype(dtype))
    return torch.cat([flat, flat.new_zeros(1)])


def _plus_bias(d_CP: Tensor, g_CPD: Tensor, down: Side, chunk: Chunk) -> Tensor:
    """d out / d weight of each row, given <a, u>."""
    if down.bias_EM is None:
        return d_CP
    return d_CP + (g_CPD.to(d_CP.dtype) @ chunk.of(down.bias_EM).to(d_CP.dtype)[..., None])[..., 0]
