"""The reductions by Triton: each reads its inputs once, and sums in the same order every time.

Shapes: T packed tokens, S sequences, P prompts, G samples of one prompt, D width. Blocks of a program: t tokens,
g samples (all of a prompt), d columns.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from ft.kernels.launch import Launch, device
from ft.kernels.reductions import reference
from ft.kernels.reductions.reference import PolicySums, from_products, offsets, spread, with_slope

BOUND = tl.constexpr(reference.BOUND)
TOKENS = 1024  # of a program of policy_kernel
WARPS = 4


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def segment_kernel(x, starts, out, D, x_row, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (S, D): one program sums some columns of one sequence."""
    s = tl.program_id(0).to(tl.int64)
    col_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(starts + s), tl.load(starts + s + 1)
    sum_td = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_T):
        row_t = start + tl.arange(0, BLOCK_T)
        inside_td = (row_t[:, None] < last) & (col_d[None, :] < D)
        sum_td += tl.load(x + row_t[:, None] * x_row + col_d[None, :], mask=inside_td, other=0.0).to(tl.float32)
    tl.store(out + s * D + col_d, tl.sum(sum_td, 0), mask=col_d < D)


@triton.jit
def policy_kernel(
    logp, old, adv, mask, weight, slope, parts, T, low, high, dual, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """slope (T,): d loss / d logp. parts (9, programs): each program's sums, and in the last two rows its maxima."""
    row_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    trained_t = tl.load(mask + row_t, mask=row_t < T, other=0) != 0
    raw_t = tl.load(logp + row_t, mask=trained_t, other=0.0).to(tl.float32)
    raw_t -= tl.load(old + row_t, mask=trained_t, other=0.0).to(tl.float32)
    adv_t = tl.load(adv + row_t, mask=trained_t, other=0.0).to(tl.float32)
    weighted_t = adv_t
    if weight is not None:
        weighted_t = adv_t * tl.load(weight + row_t, mask=trained_t, other=0.0).to(tl.float32)
    # A NaN of a trained token must stay one, which the comparisons do and a minimum would not.
    d_t = tl.where(raw_t > BOUND, BOUND, tl.where(raw_t < -BOUND, -BOUND, raw_t))
    ratio_t = tl.exp(d_t)
    below_t, above_t = (adv_t < 0) & (ratio_t < low), (adv_t > 0) & (ratio_t > high)
    beyond_t = (adv_t < 0) & (ratio_t > dual)
    counted_t = tl.where(below_t, low, tl.where(above_t, high, tl.where(beyond_t, dual, ratio_t)))
    stopped_t = below_t | above_t | beyond_t | (d_t != raw_t)
    tl.store(slope + row_t, tl.where(stopped_t, 0.0, -weighted_t * ratio_t), mask=row_t < T)
    # exp(d) - 1 - d loses all digits near 0; there it is its series.
    series_t = 1.0 + d_t / 3 * (1.0 + d_t / 4 * (1.0 + d_t / 5 * (1.0 + d_t / 6 * (1.0 + d_t / 7))))
    k3_t = tl.where(tl.abs(d_t) < 0.25, 0.5 * d_t * d_t * series_t, ratio_t - 1.0 - d_t)
    out, step = parts + tl.program_id(0), tl.num_programs(0)
    tl.store(out, tl.sum(-weighted_t * counted_t, 0))
    tl.store(out + step, tl.sum(trained_t.to(tl.float32), 0))
    tl.store(out + 2 * step, tl.sum(tl.where(trained_t, ratio_t, 0.0), 0))
    tl.store(out + 3 * step, tl.sum(k3_t, 0))
    tl.store(out + 4 * step, tl.sum(below_t.to(tl.float32), 0))
    tl.store(out + 5 * step, tl.sum(above_t.to(tl.float32), 0))
    tl.store(out + 6 * step, tl.sum(beyond_t.to(tl.float32), 0))
    tl.store(out + 7 * step, tl.max(tl.where(trained_t, ratio_t, 0.0), 0))
    tl.store(out + 8 * step, tl.max(tl.where(trained_t, tl.exp(-d_t), 0.0), 0))


@triton.jit
def _here(valid, p, g_g, G):
    """Which samples a prompt has."""
    here_g = g_g < G
    if valid is not None:
        here_g = here_g & (tl.load(valid + p * G + g_g, mask=here_g, other=0) != 0)
    return here_g


@triton.jit
def _load_gd(x, valid, p, g_g, col_d, G, D, x_p, x_g, BLOCK_G: tl.constexpr):
    """float32 rows of one prompt; zeros for missing samples."""
    here_g1 = tl.expand_dims(_here(valid, p, g_g, G), 1)
    at_gd = x + p * x_p + g_g[:, None] * x_g + col_d[None, :]
    return tl.load(at_gd, mask=here_g1 & (col_d[None, :] < D), other=0.0).to(tl.float32)


@triton.jit
def products_kernel(
    gen, ref, valid, out, G, D, PG, gen_p, gen_g, ref_p, ref_g, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (4, P, G): phi . ref, |phi|^2, phi . (sum of the others), |ref|^2; one program a prompt."""
    p = tl.program_id(0).to(tl.int64)
    g_g = tl.arange(0, BLOCK_G)
    cross_g = tl.zeros([BLOCK_G], tl.float32)
    square_g = tl.zeros([BLOCK_G], tl.float32)
    others_g = tl.zeros([BLOCK_G], tl.float32)
    ref_square_g = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, D, BLOCK_D):
        col_d = start + tl.arange(0, BLOCK_D)
        gen_gd = _load_gd(gen, valid, p, g_g, col_d, G, D, gen_p, gen_g, BLOCK_G)
        ref_gd = _load_gd(ref, valid, p, g_g, col_d, G, D, ref_p, ref_g, BLOCK_G)
        total_1d = tl.sum(gen_gd, 0, keep_dims=True)
        cross_g += tl.sum(gen_gd * ref_gd, 1)
        square_g += tl.sum(gen_gd * gen_gd, 1)
        others_g += tl.sum(gen_gd * (total_1d - gen_gd), 1)
        ref_square_g += tl.sum(ref_gd * ref_gd, 1)
    at_g = out + p * G + g_g
    tl.store(at_g, cross_g, mask=g_g < G)
    tl.store(at_g + PG, square_g, mask=g_g < G)
    tl.store(at_g + 2 * PG, others_g, mask=g_g < G)
    tl.store(at_g + 3 * PG, ref_square_g, mask=g_g < G)


@triton.jit
def products_gradient_kernel(
    gen, ref, valid, cross, square, others, out, G, D, gen_p, gen_g, ref_p, ref_g,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (P, G, D), the gradient of gen, from those of the first three products (P, G)."""
    p = tl.program_id(0).to(tl.int64)
    col_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    g_g = tl.arange(0, BLOCK_G)
    gen_gd = _load_gd(gen, valid, p, g_g, col_d, G, D, gen_p, gen_g, BLOCK_G)
    ref_gd = _load_gd(ref, valid, p, g_g, col_d, G, D, ref_p, ref_g, BLOCK_G)
    cross_g = tl.load(cross + p * G + g_g, mask=g_g < G, other=0.0)
    square_g = tl.load(square + p * G + g_g, mask=g_g < G, other=0.0)
    others_g = tl.load(others + p * G + g_g, mask=g_g < G, other=0.0)
    weighted_gd = others_g[:, None] * gen_gd
    rest_gd = others_g[:, None] * (tl.sum(gen_gd, 0, keep_dims=True) - gen_gd)
    rest_gd += tl.sum(weighted_gd, 0, keep_dims=True) - weighted_gd
    out_gd = cross_g[:, None] * ref_gd + 2.0 * square_g[:, None] * gen_gd + rest_gd
    out_gd = tl.where(tl.expand_dims(_here(valid, p, g_g, G), 1), out_gd, 0.0)
    inside_gd = (g_g[:, None] < G) & (col_d[None, :] < D)
    tl.store(out + (p * G + g_g[:, None]) * D + col_d[None, :], out_gd.to(out.dtype.element_ty), mask=inside_gd)


def launches() -> list[Launch]:
    """Every kernel as it ships, for the largest blocks too."""
    f, sizes = "*fp32", {"G": "i32", "D": "i32:16", "gen_p": "i32:16", "gen_g": "i32:16", "gen": "*bf16"}
    sizes |= {"ref_p": "i32:16", "ref_g": "i32", "ref": "*bf16"}
    made = [
        Launch(name=f"reductions.segment_sum {name}", kernel=segment_kernel, constants=_segment_blocks(D), warps=WARPS,
               signature={"x": "*bf16", "starts": "*i64", "out": f, "D": "i32", "x_row": "i32"})
        for name, D in (("per token", 1), ("of vectors", 4096))
    ]  # fmt: skip
    tokens = dict.fromkeys(("logp", "old", "adv", "slope", "parts"), f)
    tokens |= dict.fromkeys(("low", "high", "dual"), "fp32") | {"mask": "*i8", "T": "i32"}
    grads = {**dict.fromkeys(("cross", "square", "others"), f), "out": "*bf16"}
    for kernel, name, signature, option, blocks in (
        (policy_kernel, "policy_gradient_sums", tokens, {"weight": f}, {"BLOCK_T": TOKENS}),
        (products_kernel, "similarity of 4", {**sizes, "out": f, "PG": "i32"}, {"valid": "*i8"}, _sample_blocks(4)),
        (products_kernel, "similarity of 64", {**sizes, "out": f, "PG": "i32"}, {"valid": "*i8"}, _sample_blocks(64)),
        (products_gradient_kernel, "gradient of 4", {**sizes, **grads}, {"valid": "*i8"}, _sample_blocks(4)),
        (products_gradient_kernel, "gradient of 64", {**sizes, **grads}, {"valid": "*i8"}, _sample_blocks(64)),
    ):
        without: dict[str, Any] = {**blocks, **dict.fromkeys(option)}
        made += [
            Launch(name=f"reductions.{name}", kernel=kernel, signature=signature, constants=without, warps=WARPS),
            Launch(name=f"reductions.{name}, {', '.join(option)}", kernel=kernel, signature={**signature, **option},
                   constants=blocks, warps=WARPS),
        ]  # fmt: skip
    return made


def _segment_blocks(D: int) -> dict[str, Any]:
    return {"BLOCK_T": 1024, "BLOCK_D": 1} if D == 1 else {"BLOCK_T": 16, "BLOCK_D": 128}


def _sample_blocks(G: int) -> dict[str, Any]:
    BLOCK_G = triton.next_power_of_2(G)
    return {"BLOCK_G": BLOCK_G, "BLOCK_D": max(32, 1024 // BLOCK_G)}


OPTIONS: dict[str, Any] = {"num_warps": WARPS, "num_stages": 2, "enable_fp_fusion": False}


# ---- sums over sequences --------------------------------------------------------------------------------------------


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T: Tensor, seq_T: Tensor, S: int) -> Tensor:
        ctx.save_for_backward(seq_T)
        ctx.dtype = x_T.dtype
        x_TD = _columns(x_T.reshape(len(x_T), x_T.shape[1:].numel()))
        D = x_TD.shape[1]
        out_SD = torch.empty(S, D, dtype=torch.float32, device=x_T.device)
        blocks = _segment_blocks(D)
        arguments = {"x": x_TD, "starts": offsets(seq_T, S), "out": out_SD, "D": D, "x_row": x_TD.stride(0)}
        with device(x_T):
            segment_kernel[(S, triton.cdiv(D, blocks["BLOCK_D"]))](**arguments, **blocks, **OPTIONS)
        return out_SD.view(S, *x_T.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> Any:  # type: ignore[override]
        return spread(grad_S, ctx.saved_tensors[0]).to(ctx.dtype), None, None


def segment_sum(x_T: Tensor, seq_T: Tensor, S: int) -> Tensor:
    if not S or not x_T.shape[1:].numel():
        return reference.segment_sum(x_T, seq_T, S)
    return _SegmentSum.apply(x_T, seq_T, S)  # type: ignore[return-value]


# ---- policy gradient ------------------------------------------------------------------------------------------------


def policy_gradient_sums(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor,
    mask_T: Tensor,
    weight_T: Tensor | None,
    limits: tuple[float, float, float],
) -> PolicySums:
    T = len(logp_T)
    if not T:
        return reference.policy_gradient_sums(logp_T, old_logp_T, adv_T, mask_T, weight_T, limits)
    programs, empty = triton.cdiv(T, TOKENS), {"dtype": torch.float32, "device": logp_T.device}
    slope_T, parts = torch.empty(T, **empty), torch.empty(9, programs, **empty)
    arguments: dict[str, Any] = {"logp": logp_T, "old": old_logp_T, "adv": adv_T, "weight": weight_T}
    arguments = {name: x if x is None else x.detach().contiguous() for name, x in arguments.items()}
    arguments |= {
        "mask": mask_T.contiguous().view(torch.int8),
        "slope": slope_T,
        "parts": parts,
        "T": T,
        "BLOCK_T": TOKENS,
    }
    arguments |= dict(zip(("low", "high", "dual"), limits, strict=True))
    with device(logp_T):
        policy_kernel[(programs,)](**arguments, **OPTIONS)
    totals, most = parts[:7].sum(1), parts[7:].amax(1)
    names = [field.name for field in attrs.fields(PolicySums)]
    sums = dict(zip(names, (*totals.unbind(), *most.unbind()), strict=True))
    return PolicySums(**{**sums, "loss": with_slope(logp_T, sums["loss"], slope_T)})


# ---- similarity -----------------------------------------------------------------------------------------------------


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gen_PGD: Tensor, ref_PGD: Tensor, valid_PG: Tensor | None) -> Any:
        ctx.save_for_backward(gen_PGD, ref_PGD, valid_PG)
        P, G, _ = gen_PGD.shape
        out_4PG = torch.empty(4, P, G, dtype=torch.float32, device=gen_PGD.device)
        with device(gen_PGD):
            products_kernel[(P,)](out=out_4PG, PG=P * G, **_features(gen_PGD, ref_PGD, valid_PG))
        ctx.mark_non_differentiable(out_4PG[3])
        return tuple(out_4PG.unbind())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cross_PG: Tensor, square_PG: Tensor, others_PG: Tensor, _: Any) -> Any:  # type: ignore
        gen_PGD, ref_PGD, valid_PG = ctx.saved_tensors
        (P, G, D), blocks = gen_PGD.shape, _sample_blocks(gen_PGD.shape[1])
        out_PGD = torch.empty(P, G, D, dtype=gen_PGD.dtype, device=gen_PGD.device)
        grads = {"cross": cross_PG.contiguous(), "square": square_PG.contiguous(), "others": others_PG.contiguous()}
        with device(gen_PGD):
            products_gradient_kernel[(P, triton.cdiv(D, blocks["BLOCK_D"]))](
                out=out_PGD, **grads, **_features(gen_PGD, ref_PGD, valid_PG)
            )
        return out_PGD, None, None


def _features(gen_PGD: Tensor, ref_PGD: Tensor, valid_PG: Tensor | None) -> dict[str, Any]:
    """What both kernels take by these names."""
    _, G, D = gen_PGD.shape
    strides = {"gen_p": gen_PGD.stride(0), "gen_g": gen_PGD.stride(1)}
    strides |= {"ref_p": ref_PGD.stride(0), "ref_g": ref_PGD.stride(1)}
    return {
        "gen": gen_PGD,
        "ref": ref_PGD,
        "valid": valid_PG,
        "G": G,
        "D": D,
        **strides,
        **_sample_blocks(G),
        **OPTIONS,
    }


def similarity(gen_PGD: Tensor, ref_PD: Tensor, valid_PG: Tensor | None) -> tuple[Tensor, Tensor]:
    if not gen_PGD.numel():
        return reference.similarity(gen_PGD, ref_PD, valid_PG)
    shape, lead = gen_PGD.shape, gen_PGD.shape[:-2]
    ref_PGD = ref_PD if ref_PD.ndim == gen_PGD.ndim else ref_PD[..., None, :].expand(shape)
    gen_PGD, ref_PGD = (_columns(x.reshape(lead.numel(), *shape[-2:])) for x in (gen_PGD, ref_PGD))
    valid = None if valid_PG is None else valid_PG.contiguous().view(torch.int8)
    products: Any = _Products.apply(gen_PGD, ref_PGD, valid)
    return from_products(tuple(x.view(shape[:-1]) for x in products), valid_PG)  # type: ignore[arg-type]


def _columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
