"""Routing in one Triton kernel each way: a program holds the scores of a few tokens and takes the best k times.

Backward reads the logits again instead of keeping probabilities. All arithmetic is float32; where the strategy's
scores are in a 16-bit type, results are rounded to it where torch would round. Tile sizes are chosen by the number of
experts alone, and no GPU has timed them. Shapes and maths as in the package; BT, BE, BK: sizes of a tile.
"""
# Kernels are in Triton's language, which a type checker of Python misreads.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.errors import ModelError
from ft.kernels.launch import Launch, device
from ft.kernels.routing import Strategy

_TYPES = {
    torch.float32: (tl.float32, "*fp32"),
    torch.bfloat16: (tl.bfloat16, "*bf16"),
    torch.float16: (tl.float16, "*fp16"),
}


@triton.jit
def _rounded(x, TYPE: tl.constexpr):
    return x.to(TYPE).to(tl.float32)


@triton.jit
def _capped(x, softcap, CAP: tl.constexpr, ROUND: tl.constexpr):
    """softcap * tanh(x / softcap), and its slope."""
    if CAP:
        tanh = _rounded(2 * tl.sigmoid(2 * (x / softcap)) - 1, ROUND)
        return _rounded(tanh * softcap, ROUND), 1 - tanh * tanh
    else:
        return x, tl.full(x.shape, 1, tl.float32)


@triton.jit
def _scores(x, inside, SCORE: tl.constexpr, ROUND: tl.constexpr):
    """p of the package's text; x itself for "logits"."""
    if SCORE == "softmax":
        x = tl.where(inside, x, float("-inf"))
        x = tl.exp(x - tl.max(x, 1)[:, None])
        x = x / tl.sum(x, 1)[:, None]
    elif SCORE == "sigmoid":
        x = tl.sigmoid(x)
    return _rounded(x, ROUND)


@triton.jit
def _weights(p_TK, slots, softcap, eps, floor, SCORE: tl.constexpr, NORMALISE: tl.constexpr, ROUND: tl.constexpr):
    """The weights before any scale, and what they were divided by; ``slots`` is true for the first k columns."""
    if SCORE == "logits":
        p_TK = tl.where(slots, p_TK, float("-inf"))
        p_TK = tl.exp(p_TK - tl.max(p_TK, 1)[:, None])
        total_T = tl.sum(p_TK, 1)
    elif NORMALISE:
        p_TK = tl.where(slots, p_TK, 0.0)
        total_T = tl.maximum(_rounded(_rounded(tl.sum(p_TK, 1), ROUND) + eps, ROUND), floor)
    else:
        total_T = tl.full((p_TK.shape[0],), 1, tl.float32)
    return _rounded(p_TK / total_T[:, None], ROUND), total_T


@triton.jit
def _kept(c, cols, group_size, GROUPS: tl.constexpr, KEPT: tl.constexpr, TWO: tl.constexpr, ROUND: tl.constexpr,
          BG: tl.constexpr):  # fmt: skip
    """Which experts lie in the best groups."""
    group = cols // group_size
    groups = tl.arange(0, BG)[None, :]
    worth = tl.full((c.shape[0], BG), float("-inf"), tl.float32)
    for g in range(GROUPS):
        mine = tl.where(group == g, c, float("-inf"))
        best, at = tl.max(mine, 1, return_indices=True)
        if TWO:
            best = _rounded(best + tl.max(tl.where(cols == at[:, None], float("-inf"), mine), 1), ROUND)
        worth = tl.where(groups == g, best[:, None], worth)
    kept = tl.full(c.shape, 0, tl.int1)
    for _ in range(KEPT):
        best, at = tl.max(worth, 1, return_indices=True)
        kept = kept | (group == at[:, None])
        worth = tl.where(groups == at[:, None], float("-inf"), worth)
    return kept


@triton.jit
def forward_kernel(
    logits_ptr, bias_ptr, expert_scale_ptr, routes_ptr, index_ptr, weight_ptr,
    T, E, K, group_size, softcap, eps, floor, scale,
    SCORE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TWO: tl.constexpr, NORMALISE: tl.constexpr,
    CAP: tl.constexpr, ROUND: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    cols, slots = tl.arange(0, BE)[None, :], tl.arange(0, BK)[None, :]
    x = tl.load(logits_ptr + tokens.to(tl.int64) * E + cols, mask=(tokens < T) & (cols < E), other=0.0).to(tl.float32)
    x, _slope = _capped(x, softcap, CAP, ROUND)
    p = _scores(x, cols < E, SCORE, ROUND)
    c = p
    if bias_ptr is not None:
        c += tl.load(bias_ptr + cols, mask=cols < E, other=0.0).to(tl.float32)
    # A NaN goes first, as torch.topk has it, and whatever the scores are the indices are all different and in range.
    c = tl.where(c == c, tl.maximum(c, -3.0e38), 3.0e38)
    if GROUPS > 1:
        kept = _kept(c, cols, group_size, GROUPS, KEPT, TWO, ROUND if bias_ptr is None else tl.float32, BG)
        c = tl.where(kept, c, float("-inf"))
    c = tl.where(cols < E, c, float("-inf"))
    out, inside = tokens.to(tl.int64) * K + slots, (tokens < T) & (slots < K)
    index_TK = tl.zeros((BT, BK), tl.int32)
    given_TK = index_TK
    if routes_ptr is not None:
        given_TK = tl.load(routes_ptr + out, mask=inside, other=-1).to(tl.int32)
    p_TK = tl.zeros((BT, BK), tl.float32)
    for k in range(K):
        _best, at = tl.max(c, 1, return_indices=True)
        if routes_ptr is not None:
            given_T = tl.sum(tl.where(slots == k, given_TK, 0), 1)
            at = tl.where(given_T == -1, at, given_T)
        here = cols == at[:, None]
        index_TK = tl.where(slots == k, at[:, None], index_TK)
        p_TK = tl.where(slots == k, tl.sum(tl.where(here, p, 0.0), 1)[:, None], p_TK)
        c = tl.where(here, float("-inf"), c)
    weight_TK, _total = _weights(p_TK, slots < K, softcap, eps, floor, SCORE, NORMALISE, ROUND)
    weight_TK = _rounded(weight_TK * scale, ROUND)
    if expert_scale_ptr is not None:
        weight_TK *= tl.load(expert_scale_ptr + index_TK).to(tl.float32)
    tl.store(index_ptr + out, index_TK.to(tl.int64), mask=inside)
    tl.store(weight_ptr + out, weight_TK.to(weight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    logits_ptr, expert_scale_ptr, index_ptr, dweight_ptr, dlogits_ptr, dscale_ptr, T, E, K, softcap, eps, floor, scale,
    SCORE: tl.constexpr, NORMALISE: tl.constexpr, CAP: tl.constexpr, ROUND: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dlogits_TE, and each slot's share of the gradient of the scale per expert."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    cols, slots = tl.arange(0, BE)[None, :], tl.arange(0, BK)[None, :]
    inside = (tokens < T) & (cols < E)
    x = tl.load(logits_ptr + tokens.to(tl.int64) * E + cols, mask=inside, other=0.0).to(tl.float32)
    x, slope = _capped(x, softcap, CAP, ROUND)
    p = _scores(x, cols < E, SCORE, ROUND)
    chosen, here_TK = tokens.to(tl.int64) * K + slots, (tokens < T) & (slots < K)
    index_TK = tl.load(index_ptr + chosen, mask=here_TK, other=0).to(tl.int32)
    g_TK = tl.load(dweight_ptr + chosen, mask=here_TK, other=0.0).to(tl.float32)
    p_TK = tl.zeros((BT, BK), tl.float32)
    for k in range(K):
        at = tl.sum(tl.where(slots == k, index_TK, 0), 1)
        p_TK = tl.where(slots == k, tl.sum(tl.where(cols == at[:, None], p, 0.0), 1)[:, None], p_TK)
    weight_TK, total_T = _weights(p_TK, slots < K, softcap, eps, floor, SCORE, NORMALISE, ROUND)
    if expert_scale_ptr is not None:
        tl.store(dscale_ptr + chosen, g_TK * weight_TK * scale, mask=here_TK)
        g_TK *= tl.load(expert_scale_ptr + index_TK).to(tl.float32)
    g_TK *= scale
    if SCORE == "logits":
        g_TK = weight_TK * (g_TK - tl.sum(g_TK * weight_TK, 1)[:, None])
    elif NORMALISE:
        shared_T = tl.where(total_T > floor, tl.sum(g_TK * weight_TK, 1), 0.0)  # none where the floor divides
        g_TK = (g_TK - shared_T[:, None]) / total_T[:, None]
    dp = tl.zeros((BT, BE), tl.float32)
    for k in range(K):
        at = tl.sum(tl.where(slots == k, index_TK, 0), 1)
        dp = tl.where(cols == at[:, None], tl.sum(tl.where(slots == k, g_TK, 0.0), 1)[:, None], dp)
    if SCORE == "softmax":
        dp = p * (dp - tl.sum(dp * p, 1)[:, None])
    elif SCORE == "sigmoid":
        dp = dp * p * (1 - p)
    out = (dp * slope).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + tokens.to(tl.int64) * E + cols, out, mask=inside)


# --- launching -------------------------------------------------------------------------------------------------------


def route(
    logits_TE: Tensor,
    strategy: Strategy,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    routes_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(index_TK, weight_TK); see ``ft.kernels.routing.route``.

    Raises:
        ModelError: logits of a type that the kernel does not take.
    """
    if logits_TE.dtype not in _TYPES:
        raise ModelError("Triton routes by floats of 16 or 32 bits", got=str(logits_TE.dtype), fix='use impl="torch"')
    optional = (expert_scale_E, bias_E, routes_TK)
    return _Route.apply(logits_TE, *(None if t is None else t.contiguous() for t in optional), strategy)  # type: ignore[return-value]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        expert_scale_E: Tensor | None,
        bias_E: Tensor | None,
        routes_TK: Tensor | None,
        strategy: Strategy,
    ) -> tuple[Tensor, Tensor]:
        s, (T, E), logits_TE = strategy, logits_TE.shape, logits_TE.contiguous()
        index_TK = torch.empty(T, s.k, dtype=torch.int64, device=logits_TE.device)
        weight_TK = torch.empty(T, s.k, dtype=_weight_type(s, logits_TE.dtype), device=logits_TE.device)
        given = [t is not None for t in (bias_E, expert_scale_E, routes_TK)]
        tensors = logits_TE, bias_E, expert_scale_E, routes_TK, index_TK, weight_TK
        _start(_forward(s, E, logits_TE.dtype, *given), T, *tensors, T, E, s.k, E // s.groups, *_numbers(s))
        ctx.strategy = strategy
        ctx.save_for_backward(logits_TE, expert_scale_E, index_TK)
        ctx.mark_non_differentiable(index_TK)
        return index_TK, weight_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits_TE, expert_scale_E, index_TK = ctx.saved_tensors
        s, (T, E), dweight_TK = ctx.strategy, logits_TE.shape, grads[1].contiguous()
        dlogits_TE = torch.empty_like(logits_TE)
        scaled = expert_scale_E is not None
        dscale_TK = torch.empty(T, s.k, dtype=torch.float32, device=logits_TE.device) if scaled else None
        config = _backward(s, E, logits_TE.dtype, scaled)
        tensors = logits_TE, expert_scale_E, index_TK, dweight_TK, dlogits_TE, dscale_TK
        _start(config, T, *tensors, T, E, s.k, *_numbers(s))
        if dscale_TK is None:
            return dlogits_TE, None, None, None, None
        dscale_E = dscale_TK.new_zeros(E).index_add(0, index_TK.flatten(), dscale_TK.flatten())
        return dlogits_TE, dscale_E.to(expert_scale_E.dtype), None, None, None


def _start(config: Launch, T: int, *args: Any) -> None:
    if T:
        grid = (triton.cdiv(T, config.constants["BT"]),)
        named = {name: value for name, value in config.constants.items() if not name.endswith("_ptr")}
        with device(args[0]):
            config.kernel[grid](*args, **named, **config.options)


def _weight_type(s: Strategy, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if s.weights_in == "float32" else dtype


def _numbers(s: Strategy) -> tuple[float, float, float, float]:
    return s.softcap or 1.0, s.eps, s.floor, s.scale


def _forward(s: Strategy, E: int, dtype: torch.dtype, biased: bool, scaled: bool, given: bool = False) -> Launch:
    pointers = {
        "logits_ptr": _TYPES[dtype][1],
        "bias_ptr": "*fp32" if biased else None,
        "expert_scale_ptr": _TYPES[dtype][1] if scaled else None,
        "routes_ptr": "*i64" if given else None,
        "index_ptr": "*i64",
        "weight_ptr": _TYPES[_weight_type(s, dtype)][1],
    }
    groups = {"GROUPS": s.groups, "KEPT": s.kept, "TWO": s.worth == "two", "BG": triton.next_power_of_2(s.groups)}
    return _config("forward", forward_kernel, s, E, dtype, pointers, ("group_size",), groups)


def _backward(s: Strategy, E: int, dtype: torch.dtype, scaled: bool) -> Launch:
    pointers = {
        "logits_ptr": _TYPES[dtype][1],
        "expert_scale_ptr": _TYPES[dtype][1] if scaled else None,
        "index_ptr": "*i64",
        "dweight_ptr": _TYPES[_weight_type(s, dtype)][1],
        "dlogits_ptr": _TYPES[dtype][1],
        "dscale_ptr": "*fp32" if scaled else None,
    }
    return _config("backward", backward_kernel, s, E, dtype, pointers, (), {})


def _config(
    name: str,
    kernel: Any,
    s: Strategy,
    E: int,
    dtype: torch.dtype,
    pointers: dict[str, str | None],
    counts: tuple[str, ...],
    more: dict[str, Any],
) -> Launch:
    """One launch: a program holds about 2048 scores, so that they stay in registers, and at most 32 tokens."""
    BE = triton.next_power_of_2(E)
    constants = {
        "SCORE": s.score,
        "NORMALISE": s.normalise,
        "CAP": s.softcap is not None,
        "ROUND": tl.float32 if s.scores_in == "float32" else _TYPES[dtype][0],
        "BT": max(1, min(32, 2048 // BE)),
        "BE": BE,
        "BK": triton.next_power_of_2(s.k),
    }
    signature = {name: kind for name, kind in pointers.items() if kind}
    signature |= dict.fromkeys(("T", "K", *counts), "i32") | {"E": "i32" if E % 16 else "i32:16"}
    signature |= dict.fromkeys(("softcap", "eps", "floor", "scale"), "fp32")
    absent = {name: None for name, kind in pointers.items() if not kind}
    named = [f"groups {s.groups}"] if s.groups > 1 else []
    named += [text for key, text in (("expert_scale_ptr", "scaled"), ("routes_ptr", "given")) if pointers.get(key)]
    return Launch(
        name=", ".join([f"routing.{name} {s.score} E{E} K{s.k}", *named]),
        kernel=kernel,
        signature=signature,
        constants=absent | constants | more,
        warps=4,
    )


def launches() -> list[Launch]:
    """The largest of each kind that families ship: Qwen3, Qwen3-Next, DeepSeek V3, GPT-OSS, Gemma 4."""
    shipped = (
        (Strategy(k=8, normalise=True, weights_in="logits"), 128, False, False),
        (Strategy(k=10, normalise=True, weights_in="logits"), 512, False, False),
        (Strategy(k=8, score="sigmoid", groups=8, kept=4, normalise=True, eps=1e-20, scale=2.5), 256, True, False),
        (Strategy(k=4, score="logits", scores_in="logits", weights_in="logits"), 128, False, False),
        (Strategy(k=8, normalise=True), 128, False, True),
    )
    made = []
    for s, E, biased, scaled in shipped:
        dtype = torch.float32 if biased else torch.bfloat16
        made += [_forward(s, E, dtype, biased, scaled), _backward(s, E, dtype, scaled)]
    s, E = shipped[0][:2]
    return [*made, _forward(s, E, torch.bfloat16, False, False, given=True)]
