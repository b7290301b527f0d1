"""Routed experts in torch: the choice between two engines, and the one for devices that the host does not wait for.

On the CPU the host knows which experts received rows: see chunked.py. Elsewhere, here, rows sorted by expert once and
``torch.nn.functional.grouped_mm`` on whole stacks, which never asks the device which experts those are.
Shapes as in the package.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.kernels.experts import LoRA, Params, chunked
from ft.kernels.experts.projection import Act, Kind, Needs, Tensors, Weights, split, sum_dtype, weights
from ft.kernels.nf4 import NF4Tensor, dequantise

Engine = Literal["auto", "chunked", "grouped"]


def experts(
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    params: Params,
    lora: LoRA,
    *,
    keep: bool = False,
    engine: Engine = "auto",
) -> Tensor:
    """out_TD; see ``ft.kernels.experts.experts``. ``engine`` is for tests: both run anywhere."""
    weight = params.up.weight
    dtype = hidden_TD.dtype if isinstance(weight, NF4Tensor) else weight.dtype
    groups = engine == "grouped" or (engine == "auto" and grouped_mm_fits(hidden_TD.device, dtype, params))
    run = _grouped if groups else chunked.experts
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return run(hidden_TD.to(dtype), index_TK, weight_TK, params, lora, keep=keep).to(hidden_TD.dtype)


def grouped_mm_fits(device: torch.device, dtype: torch.dtype, params: Params) -> bool:
    """Whether grouped_mm serves: off the CPU, no float64, and rows of 16 bytes' multiples."""
    widths = (*params.up.weight.shape[1:], *params.down.weight.shape[1:])
    return device.type != "cpu" and dtype != torch.float64 and all(n * dtype.itemsize % 16 == 0 for n in widths)


def _grouped(
    hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, params: Params, lora: LoRA, *, keep: bool
) -> Tensor:
    up, up_tensors = split(params.up, lora.up)
    down, down_tensors = split(params.down, lora.down)
    route = sort(index_TK, params.up.weight.shape[0])
    plan = _Plan(route=route, up=up, down=down, act=params.act, keep=keep)
    tensors = (_aligned(t, hidden_TD.dtype) for t in (up_tensors, down_tensors))
    return _Experts.apply(plan, hidden_TD, weight_TK, *(t for four in tensors for t in four))  # type: ignore[no-any-return]


def _aligned(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Bias, A and B in the one type that grouped_mm takes, and ranks filled up with zeros to 16 bytes."""
    weight, bias_EM, A_ErN, B_EMr = tensors
    bias_EM = None if bias_EM is None else bias_EM.to(dtype)
    if A_ErN is None or B_EMr is None:
        return weight, bias_EM, None, None
    missing = -A_ErN.shape[1] % (16 // dtype.itemsize)
    return weight, bias_EM, F.pad(A_ErN.to(dtype), (0, 0, 0, missing)), F.pad(B_EMr.to(dtype), (0, missing))


# --- routing: one sort -----------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Route:
    """Where each row of the sorted order comes from and goes to."""

    token_R: Tensor  # the token of each row
    slot_R: Tensor  # its place in the flat (T, K) routing
    expert_R: Tensor
    row_TK: Tensor  # the row of each slot: the inverse of slot_R
    ends_E: Tensor  # int32; expert e owns rows ends_E[e - 1] : ends_E[e]


def sort(index_TK: Tensor, experts: int) -> Route:
    """Sort the routed rows by expert, in token order within one."""
    expert_R, slot_R = index_TK.flatten().sort(stable=True)
    row_R = torch.empty_like(slot_R)
    row_R[slot_R] = torch.arange(slot_R.numel(), device=slot_R.device)
    ids_E = torch.arange(experts, device=expert_R.device, dtype=expert_R.dtype)
    ends_E = torch.searchsorted(expert_R, ids_E, right=True, out_int32=True)
    return Route(
        token_R=slot_R // index_TK.shape[1],
        slot_R=slot_R,
        expert_R=expert_R,
        row_TK=row_R.view_as(index_TK),
        ends_E=ends_E,
    )


def combine(y_RD: Tensor, weight_TK: Tensor | None, route: Route) -> Tensor:
    """sum_k w_tk * y[row_tk], in float32 (float64 for float64)."""
    dtype = sum_dtype(y_RD.dtype)
    weight_TK = None if weight_TK is None else weight_TK.to(dtype)
    return F.embedding_bag(route.row_TK, y_RD.to(dtype), mode="sum", per_sample_weights=weight_TK)


# --- grouped products ------------------------------------------------------------------------------------------------


def dense(w: Weights, dtype: torch.dtype) -> Tensor:
    """The whole stack."""
    return dequantise(w, dtype) if isinstance(w, NF4Tensor) else w


def times(x_RN: Tensor, w: Tensor, route: Route, *, flip: bool) -> Tensor:
    """x_r W_e for each row, W_e = ``w[e]`` (``w[e]^T`` with ``flip``)."""
    return F.grouped_mm(x_RN, w.mT if flip else w, offs=route.ends_E)


def outer(g_RM: Tensor, x_RN: Tensor, route: Route) -> Tensor:
    """sum over each expert's rows of g_r x_r^T: (E, M, N), zero for an expert without rows."""
    return F.grouped_mm(g_RM.t(), x_RN, offs=route.ends_E)


# --- one projection --------------------------------------------------------------------------------------------------


def _project(x_RN: Tensor, w: Tensor, kind: Kind, tensors: Tensors, route: Route) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + b + s (x A^T) B^T, and x A^T."""
    _, bias_EM, A_ErN, B_EMr = tensors
    y_RM = times(x_RN, w, route, flip=not kind.transposed)
    if bias_EM is not None:
        y_RM += bias_EM[route.expert_R]
    if A_ErN is None or B_EMr is None:
        return y_RM, None
    xa_Rr = times(x_RN, A_ErN, route, flip=True)
    return y_RM.add_(times(xa_Rr, B_EMr, route, flip=True), alpha=kind.scaling), xa_Rr


def _project_back(g_RM: Tensor, w: Tensor, kind: Kind, tensors: Tensors, route: Route) -> tuple[Tensor, Tensor | None]:
    """dx = g W + s (g B) A, and g B."""
    _, _, A_ErN, B_EMr = tensors
    dx_RN = times(g_RM, w, route, flip=kind.transposed)
    if A_ErN is None or B_EMr is None:
        return dx_RN, None
    gb_Rr = times(g_RM, B_EMr, route, flip=False)
    return dx_RN.add_(times(gb_Rr, A_ErN, route, flip=False), alpha=kind.scaling), gb_Rr


def _project_grads(
    g_RM: Tensor,
    x_RN: Tensor,
    xa_Rr: Tensor | None,
    gb_Rr: Tensor | None,
    w_R: Tensor | None,
    kind: Kind,
    route: Route,
    needs: Needs,
) -> Tensors:
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
    up: Kind
    down: Kind
    act: Act
    keep: bool


class _Experts(torch.autograd.Function):
    """Keeps hidden_TD, the up projection's output and rank-sized products; gathers, activates and dequantises again.

    With u_r = W_down^T g_t, the gradient of a routing weight, <down(a_r), g_t>, is <a_r, u_r> (plus the bias's share),
    and that of a_r is w_r u_r: so neither down's output nor a weighted copy of g is kept or made.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden_TD: Tensor, weight_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        up, down, route = tensors[:4], tensors[4:], plan.route
        W_up = dense(weights(plan.up, up[0]), hidden_TD.dtype)
        h_RM, up_xa_Rr = _project(hidden_TD[route.token_R], W_up, plan.up, up, route)
        W_up = W_up if plan.keep else None  # down's stack comes next, and need not stand beside up's
        W_down = dense(weights(plan.down, down[0]), hidden_TD.dtype)
        y_RD, down_xa_Rr = _project(plan.act(h_RM), W_down, plan.down, down, route)
        ctx.plan, ctx.kept = plan, (W_up, W_down) if plan.keep else (None, None)
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
        W_up, W_down = ctx.kept
        W_down = dense(weights(plan.down, down[0]), g_RD.dtype) if W_down is None else W_down
        u_RI, down_gb_Rr = _project_back(g_RD, W_down, plan.down, down, route)
        dweight_TK = _routing_grad(a_RI.detach(), u_RI, g_RD, down[1], route) if needs[2] else None
        ddown = _project_grads(g_RD, a_RI.detach(), down_xa_Rr, down_gb_Rr, w_R, plan.down, route, needs[7:])
        del W_down
        dhidden_TD, dup = None, (None,) * 4
        if needs[1] or any(needs[3:7]):
            (dh_RM,) = torch.autograd.grad(a_RI, h_RM, _scaled(u_RI, w_R))
            dh_RM = dh_RM.contiguous()
            W_up = dense(weights(plan.up, up[0]), g_RD.dtype) if W_up is None else W_up
            dx_RD, up_gb_Rr = _project_back(dh_RM, W_up, plan.up, up, route)
            dhidden_TD = combine(dx_RD, None, route).to(hidden_TD.dtype) if needs[1] else None
            x_RD = hidden_TD[route.token_R] if needs[3] or needs[5] else hidden_TD  # else not looked at
            dup = _project_grads(dh_RM, x_RD, up_xa_Rr, up_gb_Rr, None, plan.up, route, needs[3:7])
        return None, dhidden_TD, None if dweight_TK is None else dweight_TK.to(weight_TK.dtype), *dup, *ddown


def _routing_grad(a_RI: Tensor, u_RI: Tensor, g_RD: Tensor, bias_ED: Tensor | None, route: Route) -> Tensor:
    """d out / d weight_TK, in float32 (float64 for float64)."""
    dtype = sum_dtype(a_RI.dtype)
    d_R = torch.linalg.vecdot(a_RI.to(dtype), u_RI.to(dtype))
    if bias_ED is not None:
        d_R += torch.linalg.vecdot(bias_ED.to(dtype)[route.expert_R], g_RD.to(dtype))
    return d_R[route.row_TK]
