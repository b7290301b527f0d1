"""token_logps by Triton: what the kernels are given, and how they are configured (``triton_kernels.py`` says the rest).

Where no Jacobian is wanted, forward writes no logits at all. Where it is, and in a trained head's backward, tiles are
multiplied by the device's own matrix products, and the kernels do what stands between these.

Shapes: N positions, V vocabulary, D model width, r LoRA rank; R positions of a block and C tokens of a tile; S splits
of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor

from ft.kernels.launch import Launch, device, interpreted
from ft.kernels.logprobs import passes, tiles
from ft.kernels.logprobs.autograd import Passes
from ft.kernels.logprobs.passes import Block, Forward, Grads, Scores, Tile
from ft.kernels.logprobs.tiles import Head, Options, Work
from ft.kernels.logprobs.triton_kernels import exponent_kernel, gradient_kernel, statistics_kernel

GROUP = 8  # blocks of positions that share a block of the head while it is in the cache


# ---- configurations -------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Config:
    """Blocks of a program of the kernels with products, and how it runs."""

    n: int
    v: int
    d: int
    warps: int
    stages: int

    def constants(self) -> dict[str, Any]:
        return {"BLOCK_N": self.n, "BLOCK_V": self.v, "BLOCK_D": self.d, "GROUP": GROUP}


# A float32 product in full precision runs on no tensor core and is slow by nature; a smaller block spares registers.
CONFIGS = {
    "fp32": Config(n=64, v=64, d=32, warps=4, stages=2),
    "16 bit": Config(n=128, v=128, d=64, warps=8, stages=3),
}
ROW_WISE: dict[str, Any] = {"BLOCK_R": 4, "BLOCK_C": 512}  # of exponent_kernel
ROW_WARPS = 4
AMD = {"stages": 2}  # of products: a third stage would fill its shared memory


def _config(dtype: torch.dtype) -> Config:
    config = CONFIGS["fp32" if dtype == torch.float32 else "16 bit"]
    return evolve(config, **AMD) if torch.version.hip else config


def _product(dtype: torch.dtype) -> tl.dtype:
    """The type products are taken in. The interpreter's of bfloat16 are of its bits; in float32 they are the same."""
    wide = interpreted() or dtype == torch.float32
    return tl.float32 if wide else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def launches() -> list[Launch]:
    """Every configuration that ships, each plainly and with all its options."""
    return [
        launch
        for kind, config in CONFIGS.items()
        for full in (False, True)
        for shipped, targets in ((config, ("sm_80", "sm_90", "sm_100")), (evolve(config, **AMD), ("gfx942",)))
        for launch in _launches("*fp32" if kind == "fp32" else "*bf16", shipped, full, targets)
    ]


def _launches(x: str, config: Config, full: bool, targets: tuple[str, ...]) -> list[Launch]:
    variant = f"{x[1:]}{' bias, lora, softcap' if full else ''}"
    sizes = dict.fromkeys(("r", "low_row", "B_row", "start"), "i32")
    sizes |= dict.fromkeys(("D", "hidden_row", "head_row"), "i32:16")
    inputs = {"hidden": x, "head": x, "target": "*i64", "slope": "fp32", "cap": "fp32"}
    rows = dict.fromkeys(("most", "total", "moment", "shrink", "target_z", "lse", "grad", "grad_target"), "*fp32")
    every = {**sizes, **inputs, **rows, "tile": x, "stats": "*fp32", "low": x, "B": x, "bias": x, "bias_sums": "*fp32"}
    every |= dict.fromkeys(("N", "V", "R", "C"), "i32")
    fixed = {
        **config.constants(),
        **ROW_WISE,
        "SOFTCAP": full,
        "PRODUCT": {"*fp32": tl.float32, "*bf16": tl.bfloat16}[x],
    }
    fixed |= {} if full else dict.fromkeys(("low", "B", "bias", "bias_sums"))
    made = []
    products = (config.warps, config.stages)
    for kernel, (warps, stages) in (
        (statistics_kernel, products), (exponent_kernel, (ROW_WARPS, 1)), (gradient_kernel, products)
    ):  # fmt: skip
        names = kernel.arg_names
        made.append(
            Launch(
                name=f"logprobs.{kernel.__name__.removesuffix('_kernel')} {variant}",
                kernel=kernel,
                signature={name: every[name] for name in names if name not in fixed},
                constants={name: fixed[name] for name in names if name in fixed},
                warps=warps,
                stages=stages,
                targets=targets,
            )
        )
    return made


# ---- forward --------------------------------------------------------------------------------------------------------


def forward(hidden_ND: Tensor, head: Head, target_N: Tensor, options: Options, *, jacobian: bool) -> Forward:
    """As the reference's; without a Jacobian no tile of logits is written."""
    if jacobian:
        return passes.forward(hidden_ND, head, target_N, options, jacobian=True, add=_add, tiles=0)
    dtype = torch.promote_types(hidden_ND.dtype, head.weight_VD.dtype)
    rows = max(1, tiles.TILE["other"] // (3 * triton.cdiv(len(head.weight_VD), _config(dtype).v)))
    spans = tiles.spans(len(hidden_ND), rows) if len(hidden_ND) else [(0, 0)]
    parts = [_plain(hidden_ND[a:b], head, target_N[a:b], options, dtype) for a, b in spans]
    logp_N, lse_N, entropy_N = (None if x[0] is None else torch.cat(x)[:, 0] for x in zip(*parts, strict=True))
    assert logp_N is not None and lse_N is not None
    return Forward(logp_N=logp_N, lse_N=lse_N, entropy_N=entropy_N, jacobian_ND=None)


def _plain(
    hidden_RD: Tensor, head: Head, target_R: Tensor, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp_R1, logsumexp, entropy) of some positions, as many as have room for their statistics."""
    block = Block(len(hidden_RD), 0, 0, False, torch.float32, hidden_RD.device)
    if len(hidden_RD):
        block.target_R1, *sums = _statistics(hidden_RD, head, target_R, options, dtype)
        block.most_R1, block.sum_R1, block.first_R1 = _combine(*sums)
    return block.results(options)


def _statistics(
    hidden_ND: Tensor, head: Head, target_N: Tensor, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target_z_N1, most_SN, sum_SN, first_SN)."""
    config, N, V = _config(dtype), len(hidden_ND), len(head.weight_VD)
    splits = triton.cdiv(V, config.v)
    stats_3SN = torch.empty(3, splits, N, dtype=torch.float32, device=hidden_ND.device)
    target_z_N1 = torch.full((N, 1), torch.nan, dtype=torch.float32, device=hidden_ND.device)
    arguments = _arguments(hidden_ND, tiles.low_rank(hidden_ND.to(dtype), head, dtype), head, options, dtype)
    with device(hidden_ND):
        statistics_kernel[(triton.cdiv(N, config.n) * splits,)](
            target=target_N.contiguous(), target_z=target_z_N1, stats=stats_3SN, N=N, V=V, **arguments
        )  # fmt: skip
    return target_z_N1, stats_3SN[0], stats_3SN[1], stats_3SN[2]


def _combine(most_SN: Tensor, sum_SN: Tensor, first_SN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The splits' sums, relative to the largest of their maxima, as columns."""
    most_N = most_SN.amax(0)
    change_SN = most_SN - most_N
    shrink_SN = change_SN.exp()
    first_N = (shrink_SN * (first_SN + sum_SN * change_SN)).sum(0)
    return most_N[:, None], (shrink_SN * sum_SN).sum(0)[:, None], first_N[:, None]


def _add(block: Block, tile: Tile) -> None:
    product_RC = tiles.product(tile.hidden_RD, tile.low_Rr, tile.part, tile.options, tile.work)
    R, C = product_RC.shape
    shrink_R1 = torch.empty_like(block.most_R1)
    arguments: dict[str, Any] = {**_curve_arguments(tile.options), **ROW_WISE, **_options(ROW_WARPS, 1)}
    with device(product_RC):
        exponent_kernel[(triton.cdiv(R, ROW_WISE["BLOCK_R"]),)](
            tile=product_RC, bias=_whole(tile.part.bias_V), target=tile.target_R.contiguous(), start=tile.first,
            target_z=block.target_R1, most=block.most_R1, total=block.sum_R1, moment=block.first_R1, shrink=shrink_R1,
            R=R, C=C, **arguments,
        )  # fmt: skip
    block.shrink(shrink_R1)
    block.gather(product_RC, tile.part, tile.work)


# ---- backward -------------------------------------------------------------------------------------------------------


def backward(
    scores: Scores, hidden_ND: Tensor, head: Head, target_N: Tensor, options: Options, needs: passes.Needs
) -> Grads:
    """As the reference's: the gradient's tiles are formed here, and multiplied by the device's own products."""
    return passes.backward(
        scores, hidden_ND, head, target_N, options, needs, gradient_tile=_gradient_tile, tiles=0
    )  # fmt: skip


def _gradient_tile(tile: Tile, scores: Scores, bias_C: Tensor | None) -> Tensor:
    work: Work = tile.work
    R, C = len(tile.hidden_RD), len(tile.part.weight_VD)
    config, tile_RC = _config(work.dtype), work.view(work.product, R, C)
    blocks_n, blocks_v = triton.cdiv(R, config.n), triton.cdiv(C, config.v)
    sums_bC = None if bias_C is None else torch.empty(blocks_n, C, dtype=torch.float32, device=tile_RC.device)
    arguments = _arguments(tile.hidden_RD, tile.low_Rr, tile.part, tile.options, work.dtype)
    with device(tile_RC):
        gradient_kernel[(blocks_n * blocks_v,)](
            target=tile.target_R.contiguous(), start=tile.first, lse=scores.lse_N, grad=scores.grad_N.contiguous(),
            grad_target=scores.grad_N * -torch.expm1(scores.logp_N), tile=tile_RC, bias_sums=sums_bC, R=R, C=C,
            **arguments,
        )  # fmt: skip
    if bias_C is not None and sums_bC is not None:
        bias_C += sums_bC.sum(0)
    return tile_RC


# ---- arguments ------------------------------------------------------------------------------------------------------


def _arguments(
    hidden: Tensor, low: Tensor | None, head: Head, options: Options, dtype: torch.dtype
) -> dict[str, Any]:  # fmt: skip
    """What both kernels with products take by these names; rows of matrices are contiguous."""
    config = _config(dtype)
    hidden, weight = _rows(hidden), _rows(head.weight_VD)
    low, B = (None if t is None else _rows(t) for t in (low, head.B_Vr))
    r, low_row, B_row = (low.shape[1], low.stride(0), B.stride(0)) if low is not None and B is not None else (0, 0, 0)
    operands = {"hidden": hidden, "head": weight, "low": low, "B": B, "bias": _whole(head.bias_V)}
    strides = {"hidden_row": hidden.stride(0), "head_row": weight.stride(0), "low_row": low_row, "B_row": B_row}
    return {
        **operands, **strides, **_curve_arguments(options), **config.constants(),
        **_options(config.warps, config.stages), "D": hidden.shape[1], "r": r, "PRODUCT": _product(dtype),
    }  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _curve_arguments(options: Options) -> dict[str, Any]:
    """``slope``: what the product is multiplied by; ``cap``: what tanh is."""
    if options.softcap:
        return {"slope": options.scale / options.softcap, "cap": options.softcap / options.temperature, "SOFTCAP": True}
    return {"slope": options.slope, "cap": 1.0, "SOFTCAP": False}


def _options(warps: int, stages: int) -> dict[str, Any]:
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


PASSES = Passes(forward, backward)
