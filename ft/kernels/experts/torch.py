"""Routed experts by grouped products: rows sorted by expert once, one product per stack. Shapes as in the package.

Two engines do the products. On the CPU a loop over the experts that received rows: they are known there, the product
of one expert is a plain matrix product, and an NF4 stack is dequantised one expert at a time. Elsewhere
``torch.nn.functional.grouped_mm`` on whole stacks, which never asks the device which experts those are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.kernels.experts import Factors, LoRA, Params, Stack
from ft.kernels.nf4 import NF4Tensor, dequantise, slice_rows

Engine = Literal["auto", "loop", "grouped"]


def experts(
    hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, params: Params, lora: LoRA, *, engine: Engine = "auto"
) -> Tensor:
    """out_TD; see ``ft.kernels.experts.experts``. ``engine`` is for tests: both run anywhere."""
    weight = params.up.weight
    dtype = hidden_TD.dtype if isinstance(weight, NF4Tensor) else weight.dtype
    looped = engine == "loop" or (engine == "auto" and not _groups(hidden_TD.device, dtype, params))
    route = sort(index_TK, weight.shape[0], looped=looped)
    up, up_tensors = _split(params.up, lora.up, dtype, looped=looped)
    down, down_tensors = _split(params.down, lora.down, dtype, looped=looped)
    plan = _Plan(route=route, up=up, down=down, act=params.act)
    out_TD: Any = _Experts.apply(plan, hidden_TD.to(dtype), weight_TK, *up_tensors, *down_tensors)
    return out_TD.to(hidden_TD.dtype)


def _groups(device: torch.device, dtype: torch.dtype, params: Params) -> bool:
    """Whether grouped_mm takes these stacks: no float64, and rows of 16 bytes' multiples."""
    widths = (*params.up.weight.shape[1:], *params.down.weight.shape[1:])
    return device.type != "cpu" and dtype != torch.float64 and all(n * dtype.itemsize % 16 == 0 for n in widths)


def _split(stack: Stack, lora: Factors | None, dtype: torch.dtype, *, looped: bool) -> tuple[_Kind, _Tensors]:
    """A projection as what autograd need not see and the four tensors that it may differentiate."""
    quantised = stack.weight if isinstance(stack.weight, NF4Tensor) else None
    weight = stack.weight if isinstance(stack.weight, Tensor) else None
    kind = _Kind(quantised=quantised, transposed=stack.transposed, scaling=lora.scaling if lora else 0.0)
    bias_EM = None if stack.bias_EM is None else stack.bias_EM.to(dtype)
    return kind, (weight, bias_EM, *(_factors(lora, dtype, looped=looped) if lora else (None, None)))


def _factors(lora: Factors, dtype: torch.dtype, *, looped: bool) -> tuple[Tensor, Tensor]:
    """A and B in the type their products are made in.

    In the loop that is float32 at least: rank-sized products of 16-bit matrices are ten times slower on a CPU.
    grouped_mm takes one type, and ranks of 16 bytes' multiples: it gets zeros to fill up.
    """
    dtype = torch.promote_types(torch.float32, dtype) if looped else dtype
    missing = 0 if looped else -lora.A_ErN.shape[1] % (16 // dtype.itemsize)
    A_ErN, B_EMr = lora.A_ErN.to(dtype), lora.B_EMr.to(dtype)
    return (F.pad(A_ErN, (0, 0, 0, missing)), F.pad(B_EMr, (0, missing))) if missing else (A_ErN, B_EMr)


# --- routing: one sort -----------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Route:
    """Where each row of the sorted order comes from and goes to."""

    token_R: Tensor  # the token of each row
    slot_R: Tensor  # its place in the flat (T, K) routing
    expert_R: Tensor
    row_TK: Tensor  # the row of each slot: the inverse of slot_R
    ends_E: Tensor  # int32; expert e owns rows ends_E[e - 1] : ends_E[e]
    hit: tuple[int, ...] | None  # experts with rows, on the host, and how many; None for grouped_mm
    rows: tuple[int, ...] | None


def sort(index_TK: Tensor, experts: int, *, looped: bool) -> Route:
    """Sort the routed rows by expert, in token order within one."""
    expert_R, slot_R = index_TK.flatten().sort(stable=True)
    row_R = torch.empty_like(slot_R)
    row_R[slot_R] = torch.arange(slot_R.numel(), device=slot_R.device)
    ids_E = torch.arange(experts, device=expert_R.device, dtype=expert_R.dtype)
    ends_E = torch.searchsorted(expert_R, ids_E, right=True, out_int32=True)
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist() if looped else None
    return Route(
        token_R=slot_R // index_TK.shape[1],
        slot_R=slot_R,
        expert_R=expert_R,
        row_TK=row_R.view_as(index_TK),
        ends_E=ends_E,
        hit=None if counts is None else tuple(e for e, n in enumerate(counts) if n),
        rows=None if counts is None else tuple(n for n in counts if n),
    )


def combine(y_RD: Tensor, weight_TK: Tensor | None, route: Route) -> Tensor:
    """sum_k w_tk * y[row_tk], in float32 (float64 for float64)."""
    dtype = torch.promote_types(torch.float32, y_RD.dtype)
    weight_TK = None if weight_TK is None else weight_TK.to(dtype)
    return F.embedding_bag(route.row_TK, y_RD.to(dtype), mode="sum", per_sample_weights=weight_TK)


# --- grouped products ------------------------------------------------------------------------------------------------

Weights = Tensor | NF4Tensor


def times(
    x_RN: Tensor, w: Weights, route: Route, *, flip: bool, into: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """x_r W_e for each row, W_e = ``w[e]`` (``w[e]^T`` with ``flip``); ``into`` has scale * that added in place."""
    if route.hit is None or route.rows is None:
        w = dequantise(w, x_RN.dtype) if isinstance(w, NF4Tensor) else w
        y_RM = F.grouped_mm(x_RN, w.mT if flip else w, offs=route.ends_E)
        return y_RM if into is None else into.add_(y_RM, alpha=scale)
    dtype = w.dtype if isinstance(w, Tensor) else x_RN.dtype
    out_RM = x_RN.new_empty(len(x_RN), w.shape[1 if flip else 2], dtype=dtype) if into is None else into
    pieces = zip(x_RN.split(route.rows), _matrices(w, route.hit, x_RN.dtype), out_RM.split(route.rows), strict=True)
    for x, w_e, out in pieces:
        x, w_e = x.to(dtype), w_e.t() if flip else w_e
        if into is None:
            torch.mm(x, w_e, out=out)
        elif out.dtype == dtype:
            out.addmm_(x, w_e, alpha=scale)
        else:
            out.add_(x @ w_e, alpha=scale)
    return out_RM


def _matrices(w: Weights, hit: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """The matrices of some experts; of an NF4 stack one exists at a time, unless a scale straddles two."""
    if isinstance(w, NF4Tensor) and w.shape[1] * w.shape[2] % w.block == 0:
        yield from (dequantise(slice_rows(w, e, e + 1), dtype)[0] for e in hit)
    else:
        matrices = (dequantise(w, dtype) if isinstance(w, NF4Tensor) else w).unbind()
        yield from (matrices[e] for e in hit)


def outer(g_RM: Tensor, x_RN: Tensor, route: Route) -> Tensor:
    """sum over each expert's rows of g_r x_r^T: (E, M, N), zero for an expert without rows."""
    if route.hit is None or route.rows is None:
        return F.grouped_mm(g_RM.t(), x_RN, offs=route.ends_E)
    dtype = torch.promote_types(g_RM.dtype, x_RN.dtype)
    out_EMN = g_RM.new_zeros(len(route.ends_E), g_RM.shape[1], x_RN.shape[1], dtype=dtype)
    outs = out_EMN.unbind()
    for e, g, x in zip(route.hit, g_RM.split(route.rows), x_RN.split(route.rows), strict=True):
        torch.mm(g.t().to(dtype), x.to(dtype), out=outs[e])
    return out_EMN


# --- one projection --------------------------------------------------------------------------------------------------

_Tensors = Sequence[Tensor | None]  # four: weight, bias_EM, A_ErN, B_EMr
_Needs = Sequence[bool]  # which of those want a gradient


@frozen(kw_only=True, eq=False)
class _Kind:
    quantised: NF4Tensor | None  # the weight, where it is NF4
    transposed: bool
    scaling: float


def _project(x_RN: Tensor, kind: _Kind, tensors: _Tensors, route: Route) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + b + s (x A^T) B^T, and x A^T."""
    weight, bias_EM, A_ErN, B_EMr = tensors
    y_RM = times(x_RN, _weights(kind, weight), route, flip=not kind.transposed)
    if bias_EM is not None:
        y_RM += bias_EM[route.expert_R]
    if A_ErN is None or B_EMr is None:
        return y_RM, None
    xa_Rr = times(x_RN, A_ErN, route, flip=True)
    return times(xa_Rr, B_EMr, route, flip=True, into=y_RM, scale=kind.scaling), xa_Rr


def _project_back(g_RM: Tensor, kind: _Kind, tensors: _Tensors, route: Route) -> tuple[Tensor, Tensor | None]:
    """dx = g W + s (g B) A, and g B."""
    weight, _, A_ErN, B_EMr = tensors
    dx_RN = times(g_RM, _weights(kind, weight), route, flip=kind.transposed)
    if A_ErN is None or B_EMr is None:
        return dx_RN, None
    gb_Rr = times(g_RM, B_EMr, route, flip=False)
    return times(gb_Rr, A_ErN, route, flip=False, into=dx_RN, scale=kind.scaling), gb_Rr


def _weights(kind: _Kind, weight: Tensor | None) -> Weights:
    weights = kind.quantised if weight is None else weight
    assert weights is not None
    return weights


def _project_grads(
    g_RM: Tensor,
    x_RN: Tensor,
    xa_Rr: Tensor | None,
    gb_Rr: Tensor | None,
    w_R: Tensor | None,
    kind: _Kind,
    route: Route,
    needs: _Needs,
) -> _Tensors:
    """Gradients of weight, bias, A and B, each row's share times ``w_R``, which always scales the narrower factor."""
    dW = dbias_EM = dA_ErN = dB_EMr = None
    if needs[0]:
        xw_RN = _scaled(x_RN, w_R)
        dW = outer(xw_RN, g_RM, route) if kind.transposed else outer(g_RM, xw_RN, route)
    if needs[1]:  # eight equal columns, since grouped_mm wants rows of 16 bytes
        dbias_EM = outer(g_RM, _scaled(g_RM.new_ones(len(g_RM), 8), w_R), route)[..., 0]
    if needs[2]:
        assert gb_Rr is not None
        dA_ErN = outer(_scaled(gb_Rr, w_R), x_RN, route).mul_(kind.scaling)
    if needs[3]:
        assert xa_Rr is not None
        dB_EMr = outer(g_RM, _scaled(xa_Rr, w_R), route).mul_(kind.scaling)
    return dW, dbias_EM, dA_ErN, dB_EMr


def _scaled(x_RN: Tensor, w_R: Tensor | None) -> Tensor:
    return x_RN if w_R is None else x_RN * w_R[:, None].to(x_RN.dtype)


# --- the whole -------------------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class _Plan:
    route: Route
    up: _Kind
    down: _Kind
    act: Callable[[Tensor], Tensor]


class _Experts(torch.autograd.Function):
    """Keeps hidden_TD, the up projection's output and rank-sized products; gathers, activates and dequantises again.

    With u_r = W_down^T g_t, the gradient of a routing weight, <down(a_r), g_t>, is <a_r, u_r> (plus the bias's share),
    and that of a_r is w_r u_r: so neither down's output nor a weighted copy of g is kept or made.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden_TD: Tensor, weight_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        up, down, route = tensors[:4], tensors[4:], plan.route
        h_RM, up_xa_Rr = _project(hidden_TD[route.token_R], plan.up, up, route)
        y_RD, down_xa_Rr = _project(plan.act(h_RM), plan.down, down, route)
        ctx.plan = plan
        ctx.save_for_backward(hidden_TD, weight_TK, h_RM, up_xa_Rr, down_xa_Rr, *tensors)
        return combine(y_RD, weight_TK, route).to(hidden_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TD, weight_TK, h_RM, up_xa_Rr, down_xa_Rr, *tensors = ctx.saved_tensors
        plan, needs, up, down = ctx.plan, ctx.needs_input_grad, tensors[:4], tensors[4:]
        route = plan.route
        w_R = weight_TK.flatten()[route.slot_R]
        g_RD = grads[0][route.token_R]
        with torch.enable_grad():
            h_RM = h_RM.detach().requires_grad_()
            a_RI = plan.act(h_RM)
        u_RI, down_gb_Rr = _project_back(g_RD, plan.down, down, route)
        dweight_TK = _routing_grad(a_RI.detach(), u_RI, g_RD, down[1], route) if needs[2] else None
        ddown = _project_grads(g_RD, a_RI.detach(), down_xa_Rr, down_gb_Rr, w_R, plan.down, route, needs[7:])
        dhidden_TD, dup = None, (None,) * 4
        if needs[1] or any(needs[3:7]):
            (dh_RM,) = torch.autograd.grad(a_RI, h_RM, _scaled(u_RI, w_R))
            dh_RM = dh_RM.contiguous()
            dx_RD, up_gb_Rr = _project_back(dh_RM, plan.up, up, route)
            dhidden_TD = combine(dx_RD, None, route).to(hidden_TD.dtype) if needs[1] else None
            x_RD = hidden_TD[route.token_R] if needs[3] or needs[5] else hidden_TD  # else not looked at
            dup = _project_grads(dh_RM, x_RD, up_xa_Rr, up_gb_Rr, None, plan.up, route, needs[3:7])
        return None, dhidden_TD, None if dweight_TK is None else dweight_TK.to(weight_TK.dtype), *dup, *ddown


def _routing_grad(a_RI: Tensor, u_RI: Tensor, g_RD: Tensor, bias_ED: Tensor | None, route: Route) -> Tensor:
    """d out / d weight_TK, in float32 (float64 for float64)."""
    dtype = torch.promote_types(torch.float32, a_RI.dtype)
    d_R = torch.linalg.vecdot(a_RI.to(dtype), u_RI.to(dtype))
    if bias_ED is not None:
        d_R += torch.linalg.vecdot(bias_ED.to(dtype)[route.expert_R], g_RD.to(dtype))
    return d_R[route.row_TK]
