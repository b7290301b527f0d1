"""Routed experts in Triton: one sort, then products on rows of one expert at a time.

NF4 weights are dequantised tile by tile inside the products, in backward again, and never exist otherwise. LoRA is a
rank-sized product before and one inside. The function between the two projections stays the model's own. Nothing
waits for the device. Shapes as in the package; S = T * K slots of the routing.
"""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.errors import ModelError
from ft.kernels.experts import LoRA, Params
from ft.kernels.experts.projection import Act, Kind, Needs, Tensors, split, weights
from ft.kernels.experts.triton_calls import TYPES, Lift, Route, combine, outer, route, sums, tile, times, weigh
from ft.kernels.experts.triton_ships import launches
from ft.kernels.nf4 import NF4Tensor


def experts(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, params: Params, lora: LoRA | None = None) -> Tensor:
    """out_TD in ``hidden_TD``'s type; see ``ft.kernels.experts.experts``. Computed in the weights' type.

    Raises:
        ModelError: a type that is not of 16 or 32 bits, or NF4 matrices with rows of an odd length.
    """
    lora, weight = lora or LoRA(), params.up.weight
    dtype = hidden_TD.dtype if isinstance(weight, NF4Tensor) else weight.dtype
    _check(dtype, params)
    E, amd = weight.shape[0], torch.version.hip is not None
    up, up_tensors = split(params.up, lora.up)
    down, down_tensors = split(params.down, lora.down)
    routed = route(index_TK, E, tile(index_TK.numel(), E, dtype, amd=amd))
    plan = _Plan(route=routed, up=up, down=down, act=params.act)
    hidden, weights_TK = hidden_TD.to(dtype).contiguous(), weight_TK.contiguous()
    out_TD: Any = _Experts.apply(plan, hidden, weights_TK, *up_tensors, *down_tensors)
    return out_TD.to(hidden_TD.dtype)


def _check(dtype: torch.dtype, params: Params) -> None:
    fix = 'set model.kernels to "torch"'
    if dtype not in TYPES:
        raise ModelError("the Triton experts take floats of 16 or 32 bits", got=str(dtype), fix=fix)
    for weight in (params.up.weight, params.down.weight):
        if isinstance(weight, NF4Tensor) and weight.shape[2] % 2:
            raise ModelError("the Triton experts take NF4 rows of an even length", got=str(weight.shape), fix=fix)


# --- one projection --------------------------------------------------------------------------------------------------


def _project(
    x: Tensor, kind: Kind, tensors: Tensors, route: Route, *, gather: bool = False, scatter: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + b + s (x A^T) B^T, and x A^T."""
    weight, bias_EM, A_ErN, B_EMr = tensors
    xa_Rr = lift = None
    if A_ErN is not None and B_EMr is not None:
        xa_Rr = times(x, A_ErN, route, flip=True, gather=gather).run()
        lift = Lift(low_Rr=xa_Rr, lift=B_EMr.mT, scale=kind.scaling)
    options = {"gather": gather, "scatter": scatter, "bias": bias_EM, "lift": lift}
    return times(x, weights(kind, weight), route, flip=not kind.transposed, **options).run(), xa_Rr


def _project_back(
    g: Tensor, kind: Kind, tensors: Tensors, route: Route, *, gather: bool = False, scatter: bool = False
) -> tuple[Tensor, Tensor | None]:
    """dx = g W + s (g B) A, and g B."""
    weight, _, A_ErN, B_EMr = tensors
    gb_Rr = lift = None
    if A_ErN is not None and B_EMr is not None:
        gb_Rr = times(g, B_EMr, route, flip=False, gather=gather).run()
        lift = Lift(low_Rr=gb_Rr, lift=A_ErN, scale=kind.scaling)
    options = {"gather": gather, "scatter": scatter, "lift": lift}
    return times(g, weights(kind, weight), route, flip=kind.transposed, **options).run(), gb_Rr


@frozen(kw_only=True, eq=False)
class _Rows:
    """The two sides of a projection's gradients; each may hold a row per token instead of one per routed row."""

    x: Tensor
    g: Tensor
    x_by_token: bool = False
    g_by_token: bool = False
    weight_S: Tensor | None = None  # each row's share counts so often


def _project_grads(
    rows: _Rows, xa_Rr: Tensor | None, gb_Rr: Tensor | None, kind: Kind, tensors: Tensors, route: Route, needs: Needs
) -> Tensors:
    """Gradients of weight, bias, A and B, each in its own type."""
    found: list[Tensor | None] = [None] * 4
    dtypes = [torch.float32 if t is None else t.dtype for t in tensors]
    w_S, s = rows.weight_S, kind.scaling
    if needs[0]:
        sides = [(rows.g, rows.g_by_token), (rows.x, rows.x_by_token)]
        (left, by_left), (right, by_right) = reversed(sides) if kind.transposed else sides
        call = outer(left, right, route, dtype=dtypes[0], gather_left=by_left, gather_right=by_right, weight_S=w_S)
        found[0] = call.run()
    if needs[1]:
        found[1] = sums(rows.g, route, dtype=dtypes[1], gather=rows.g_by_token, weight_S=w_S).run()
    if needs[2] and gb_Rr is not None:
        call = outer(gb_Rr, rows.x, route, dtype=dtypes[2], gather_right=rows.x_by_token, weight_S=w_S, scale=s)
        found[2] = call.run()
    if needs[3] and xa_Rr is not None:
        call = outer(rows.g, xa_Rr, route, dtype=dtypes[3], gather_left=rows.g_by_token, weight_S=w_S, scale=s)
        found[3] = call.run()
    return found


# --- the whole -------------------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class _Plan:
    route: Route
    up: Kind
    down: Kind
    act: Act


class _Experts(torch.autograd.Function):
    """Keeps hidden_TD, the up projection's output and rank-sized products; activates and dequantises again.

    With u_r = W_down^T g_t, the gradient of a routing weight, <down(a_r), g_t>, is <a_r, u_r> plus the bias's share,
    and that of a_r is w_r u_r: so neither down's output nor a weighted copy of g is kept or made.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden_TD: Tensor, weight_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        up, down, route = tensors[:4], tensors[4:], plan.route
        h_RM, up_xa_Rr = _project(hidden_TD, plan.up, up, route, gather=True)
        y_SD, down_xa_Rr = _project(plan.act(h_RM).contiguous(), plan.down, down, route, scatter=True)
        ctx.plan = plan
        ctx.save_for_backward(hidden_TD, weight_TK, h_RM, up_xa_Rr, down_xa_Rr, *tensors)
        return combine(y_SD, weight_TK, route.K).run()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TD, weight_TK, h_RM, up_xa_Rr, down_xa_Rr, *tensors = ctx.saved_tensors
        plan, needs, up, down = ctx.plan, ctx.needs_input_grad, tensors[:4], tensors[4:]
        route, g_TD = plan.route, grads[0].contiguous()
        with torch.enable_grad():
            h_RM = h_RM.detach().requires_grad_()
            a_act = plan.act(h_RM)
        a_RI = a_act.detach().contiguous()
        da_RI, down_gb_Rr = _project_back(g_TD, plan.down, down, route, gather=True)
        dweight_TK = weigh(a_RI, da_RI, weight_TK, down[1], g_TD, route).run().to(weight_TK.dtype)
        rows = _Rows(x=a_RI, g=g_TD, g_by_token=True, weight_S=weight_TK)
        ddown = _project_grads(rows, down_xa_Rr, down_gb_Rr, plan.down, down, route, needs[7:])
        dhidden_TD, dup = None, [None] * 4
        if needs[1] or any(needs[3:7]):
            dh_RM = torch.autograd.grad(a_act, h_RM, da_RI)[0].contiguous()
            dx_SD, up_gb_Rr = _project_back(dh_RM, plan.up, up, route, scatter=True)
            dhidden_TD = combine(dx_SD, None, route.K).run() if needs[1] else None
            rows = _Rows(x=hidden_TD, g=dh_RM, x_by_token=True)
            dup = _project_grads(rows, up_xa_Rr, up_gb_Rr, plan.up, up, route, needs[3:7])
        return None, dhidden_TD, dweight_TK if needs[2] else None, *dup, *ddown


__all__ = ["experts", "launches"]
