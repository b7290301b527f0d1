"""Routed experts where the host knows the routing (a CPU): chunk after chunk of experts, each in cache.

A chunk is a few experts' rows, padded to the longest: (C, P, .). Its rank-sized products are one batched product
each, and so are those of experts whose matrices follow each other in the stack: made singly they cost a call each,
and in 16 bits a call costs more than a small product's arithmetic. An NF4 matrix exists only while it is multiplied.
Nothing of the size of all routed rows is made but what backward needs.

Shapes: C experts of a chunk, P their padded rows; others as in the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.kernels.experts import LoRA, Params
from ft.kernels.experts.chunks import Chunk, Route, route
from ft.kernels.experts.projection import Act, Kind, Needs, Tensors, Weights, split, sum_dtype, weights, width
from ft.kernels.nf4 import dequantise, split_rows


def experts(
    hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, params: Params, lora: LoRA, *, keep: bool = False
) -> Tensor:
    """out_TD in ``hidden_TD``'s type, which is the weights' (any where they are NF4)."""
    up, up_tensors = split(params.up, lora.up)
    down, down_tensors = split(params.down, lora.down)
    widest = max(hidden_TD.shape[1], width(params.up))
    routed = route(index_TK, params.up.weight.shape[0], widest, narrow=hidden_TD.dtype.itemsize == 2)
    plan = _Plan(route=routed, up=up, down=down, act=params.act, keep=keep, trains=torch.is_grad_enabled())
    return _Experts.apply(plan, hidden_TD, weight_TK, *up_tensors, *down_tensors)  # type: ignore[no-any-return]


# --- one projection of a chunk ---------------------------------------------------------------------------------------


class Room:
    """Memory that one tensor of each chunk after the other lies in: warm in cache, and never given back between."""

    def __init__(self, like: Tensor) -> None:
        self.flat = like.new_empty(0)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        n = math.prod(shape)
        if len(self.flat) < n:
            self.flat = self.flat.new_empty(n)
        return self.flat[:n].view(shape)


def times(x_CPN: Tensor, found: Iterable[Tensor], out_CPM: Tensor, *, flip: bool) -> Tensor:
    """x_c W_c for each expert of the chunk (W_c^T with ``flip``); ``found`` yields matrices of successive experts."""
    start = 0
    for w in found:
        stop, w = start + len(w), w.mT if flip else w
        torch.bmm(x_CPN[start:stop], w, out=out_CPM[start:stop])
        start = stop
    assert start == len(x_CPN)
    return out_CPM


def matrices(w: Weights, chunk: Chunk, dtype: torch.dtype) -> Iterator[Tensor]:
    """The experts' matrices, (n, ., .) for n neighbours; of an NF4 stack one exists at a time."""
    if isinstance(w, Tensor):
        yield from (w[e : e + stop - start] for e, start, stop in chunk.runs())
    elif w.shape[1] * w.shape[2] % w.block:  # scales straddle experts
        yield dequantise(w, dtype)[chunk.expert_C]
    else:
        yield from (dequantise(one, dtype) for one in split_rows(w, chunk.experts))


def _project(
    x_CPN: Tensor, found: Iterable[Tensor], kind: Kind, tensors: Tensors, chunk: Chunk, room: Room | None
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + b + s (x A^T) B^T, and x A^T; y lies in ``room``, or in memory of its own."""
    shape = (*x_CPN.shape[:2], _out_width(kind, tensors))
    y_CPM = times(x_CPN, found, x_CPN.new_empty(shape) if room is None else room(shape), flip=not kind.transposed)
    _, bias_EM, A_ErN, B_EMr = tensors
    if bias_EM is not None:
        y_CPM += bias_EM[chunk.expert_C].to(x_CPN.dtype)[:, None]
    if A_ErN is None or B_EMr is None:
        return y_CPM, None
    xa_CPr = x_CPN @ _chosen(A_ErN, chunk, x_CPN.dtype).mT
    return y_CPM.baddbmm_(xa_CPr, _chosen(B_EMr, chunk, x_CPN.dtype).mT, alpha=kind.scaling), xa_CPr


def _project_back(
    g_CPM: Tensor, found: Iterable[Tensor], kind: Kind, tensors: Tensors, chunk: Chunk, room: Room
) -> tuple[Tensor, Tensor | None]:
    """dx = g W + s (g B) A, in ``room``, and g B."""
    dx_CPN = times(g_CPM, found, room((*g_CPM.shape[:2], _in_width(kind, tensors))), flip=kind.transposed)
    _, _, A_ErN, B_EMr = tensors
    if A_ErN is None or B_EMr is None:
        return dx_CPN, None
    gb_CPr = g_CPM @ _chosen(B_EMr, chunk, g_CPM.dtype)
    return dx_CPN.baddbmm_(gb_CPr, _chosen(A_ErN, chunk, g_CPM.dtype), alpha=kind.scaling), gb_CPr


def _chosen(w: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    found = chunk.whole()
    return (w.index_select(0, chunk.expert_C) if found is None else w[found]).to(dtype)


def _out_width(kind: Kind, tensors: Tensors) -> int:
    return weights(kind, tensors[0]).shape[2 if kind.transposed else 1]


def _in_width(kind: Kind, tensors: Tensors) -> int:
    return weights(kind, tensors[0]).shape[1 if kind.transposed else 2]


def _add_grads(
    into: Tensors,
    chunk: Chunk,
    kind: Kind,
    g_CPM: Tensor,
    x_CPN: Tensor,
    xa_CPr: Tensor | None,
    gb_CPr: Tensor | None,
    w_CP1: Tensor | None,
) -> None:
    """Write the chunk's gradients of weight, bias, A and B, each row's share times ``w``, applied to the narrower."""
    dW, dbias_EM, dA_ErN, dB_EMr = into
    if dW is not None:
        left, right = (_scaled(x_CPN, w_CP1), g_CPM) if kind.transposed else (g_CPM, _scaled(x_CPN, w_CP1))
        for e, g, x in zip(chunk.experts, left.unbind(), right.unbind(), strict=True):
            torch.mm(g.t(), x, out=dW[e])
    if dbias_EM is not None:
        _put(dbias_EM, chunk, _scaled(g_CPM.to(sum_dtype(g_CPM.dtype)), w_CP1).sum(1))
    if dA_ErN is not None and gb_CPr is not None:
        _put(dA_ErN, chunk, _scaled(gb_CPr * kind.scaling, w_CP1).mT @ x_CPN)
    if dB_EMr is not None and xa_CPr is not None:
        _put(dB_EMr, chunk, g_CPM.mT @ _scaled(xa_CPr * kind.scaling, w_CP1))


def _put(into: Tensor, chunk: Chunk, value: Tensor) -> None:
    found = chunk.whole()
    if found is None:
        into.index_copy_(0, chunk.expert_C, value.to(into.dtype))
    else:
        into[found] = value


def _scaled(x: Tensor, w_CP1: Tensor | None) -> Tensor:
    return x if w_CP1 is None else x * w_CP1.to(x.dtype)


def _grads(tensors: Tensors, needs: Needs, idle: Tensor) -> Tensors:
    """Room for the gradients wanted; zeros for experts that received nothing."""
    made = (torch.empty_like(t) if t is not None and need else None for t, need in zip(tensors, needs, strict=True))
    return [None if t is None else t.index_fill_(0, idle, 0) for t in made]


# --- the whole -------------------------------------------------------------------------------------------------------


Pair = tuple[Iterable[Tensor], Iterable[Tensor]]


@frozen(kw_only=True, eq=False)
class _Plan:
    route: Route
    up: Kind
    down: Kind
    act: Act
    keep: bool
    trains: bool


class _Experts(torch.autograd.Function):
    """Keeps hidden_TD, the up projection's output and rank-sized products; gathers, activates and dequantises again.

    With u_r = W_down^T g_t, the gradient of a routing weight, <down(a_r), g_t>, is <a_r, u_r> (plus the bias's share),
    and that of a_r is w_r u_r: so neither down's output nor a weighted copy of g is kept or made.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden_TD: Tensor, weight_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        up, down, saved = tensors[:4], tensors[4:], []
        x_UD, w_S = _extended(hidden_TD), _weights_S(weight_TK, hidden_TD.dtype)
        out_UD = torch.zeros(len(x_UD), _out_width(plan.down, down), dtype=w_S.dtype, device=x_UD.device)
        ctx.kept, x_room, y_room = [], Room(x_UD), Room(x_UD)
        for chunk in plan.route.chunks:
            W_up, W_down = _both(plan, up, down, chunk, hidden_TD.dtype)
            W_up, W_down = (list(W_up), list(W_down)) if plan.keep else (W_up, W_down)
            h_CPM, up_xa_CPr = _project(_rows(x_UD, chunk, x_room), W_up, plan.up, up, chunk, None)
            a_CPI = _activated(plan, h_CPM)
            y_CPD, down_xa_CPr = _project(a_CPI, W_down, plan.down, down, chunk, y_room)
            y_CPD = y_CPD.to(w_S.dtype).mul_(w_S[chunk.slot_CP][..., None])
            out_UD.index_add_(0, chunk.token_CP.flatten(), y_CPD.flatten(0, 1))
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
        plan, needs, up, down = ctx.plan, ctx.needs_input_grad, tensors[:4], tensors[4:]
        dup, ddown = _grads(up, needs[3:7], plan.route.idle), _grads(down, needs[7:], plan.route.idle)
        x_UD, g_UD, w_S = _extended(hidden_TD), _extended(grads[0]), _weights_S(weight_TK, hidden_TD.dtype)
        dx_UD, dw_S = torch.zeros_like(x_UD, dtype=w_S.dtype), torch.zeros_like(w_S)
        g_room, u_room, dx_room, x_room = (Room(x_UD) for _ in range(4))
        below = needs[1] or any(needs[3:7])
        for i, chunk in enumerate(plan.route.chunks):
            h_CPM, up_xa_CPr, down_xa_CPr = saved[10 + 3 * i :][:3]
            W_up, W_down = ctx.kept[i] or _both(plan, up, down, chunk, g_UD.dtype)
            g_CPD, w_CP1 = _rows(g_UD, chunk, g_room), w_S[chunk.slot_CP][..., None]
            with torch.enable_grad():
                h_CPM = h_CPM.detach().requires_grad_()
                a_CPI = _activated(plan, h_CPM)
            u_CPI, gb_CPr = _project_back(g_CPD, W_down, plan.down, down, chunk, u_room)
            if needs[2]:
                dw_S[chunk.slot_CP] = _routing_grad(a_CPI.detach(), u_CPI, g_CPD, down[1], chunk)
            _add_grads(ddown, chunk, plan.down, g_CPD, a_CPI.detach(), down_xa_CPr, gb_CPr, w_CP1)
            if not below:
                continue
            (dh_CPM,) = torch.autograd.grad(a_CPI, h_CPM, _scaled(u_CPI, w_CP1))
            dx_CPD, gb_CPr = _project_back(dh_CPM, W_up, plan.up, up, chunk, dx_room)
            dx_UD.index_add_(0, chunk.token_CP.flatten(), dx_CPD.flatten(0, 1).to(dx_UD.dtype))
            if any(needs[3:7]):
                _add_grads(dup, chunk, plan.up, dh_CPM, _rows(x_UD, chunk, x_room), up_xa_CPr, gb_CPr, None)
        dhidden_TD = dx_UD[:-1].to(hidden_TD.dtype) if needs[1] else None
        dweight_TK = dw_S[:-1].view_as(weight_TK).to(weight_TK.dtype) if needs[2] else None
        return None, dhidden_TD, dweight_TK, *dup, *ddown


def _both(plan: _Plan, up: Tensors, down: Tensors, chunk: Chunk, dtype: torch.dtype) -> Pair:
    """The chunk's matrices of up and of down."""
    return matrices(weights(plan.up, up[0]), chunk, dtype), matrices(weights(plan.down, down[0]), chunk, dtype)


def _activated(plan: _Plan, h_CPM: Tensor) -> Tensor:
    return plan.act(h_CPM.flatten(0, 1)).unflatten(0, h_CPM.shape[:2])


def _extended(x_TD: Tensor) -> Tensor:
    """One row of zeros more, which is what padding reads."""
    return F.pad(x_TD, (0, 0, 0, 1))


def _rows(x_UD: Tensor, chunk: Chunk, room: Room) -> Tensor:
    out_CPD = room((*chunk.token_CP.shape, x_UD.shape[1]))
    torch.index_select(x_UD, 0, chunk.token_CP.flatten(), out=out_CPD.flatten(0, 1))
    return out_CPD


def _weights_S(weight_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Routing weights of the slots in the type of sums, and a zero for padding."""
    return F.pad(weight_TK.flatten().to(sum_dtype(dtype)), (0, 1))


def _routing_grad(a_CPI: Tensor, u_CPI: Tensor, g_CPD: Tensor, bias_ED: Tensor | None, chunk: Chunk) -> Tensor:
    """d out / d weight of each row, in float32 (float64 for float64)."""
    dtype = sum_dtype(a_CPI.dtype)
    d_CP = torch.linalg.vecdot(a_CPI.to(dtype), u_CPI.to(dtype))
    if bias_ED is not None:
        d_CP += (g_CPD.to(dtype) @ bias_ED[chunk.expert_C].to(dtype)[..., None])[..., 0]
    return d_CP
