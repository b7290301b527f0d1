"""The launches of routed experts that are compiled ahead of time: bf16 rows, NF4 stacks and float32 LoRA of rank 16.

Widths are those of Qwen3 30B-A3B (128 experts, 2048 and 768) and of GPT-OSS (transposed, biased) for every tile of
the table. Made by the very functions that run, from tensors without memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ft.kernels.experts.projection import Weights
from ft.kernels.experts.triton_calls import Call, Lift, Route, Tile, combine, outer, route, sums, tile, times, weigh
from ft.kernels.launch import Launch
from ft.kernels.nf4 import NF4Tensor

E, K, D, M, I, r = 128, 8, 2048, 1536, 768, 16
TOKENS = (256, 1024, 2048, 8192)  # for each row of the table of tiles
NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)


def launches() -> list[Launch]:
    """NF4 products for every tile on every target; what does not depend on the tile, once."""
    found = []
    for targets in (NVIDIA, AMD):
        for T in TOKENS:
            cut = tile(T * K, E, torch.bfloat16, amd=targets == AMD)
            calls = dict(_products(T, cut)) | (dict(_rest(T, cut)) if TOKENS[-1] == T else {})
            where = f"{cut.rows} rows, {'AMD' if targets == AMD else 'NVIDIA'}"
            found += [call.launch(f"experts.{name}, {where}", *targets) for name, call in calls.items()]
    return found


def _products(T: int, cut: Tile) -> Iterator[tuple[str, Call]]:
    """Forward and backward through an NF4 stack with LoRA."""
    at = _route(T, cut)
    x_TD, h_RM, A_ErN, B_EMr = _empty(T, D), _empty(T * K, M), _factor(E, r, D), _factor(E, M, r)
    low_Rr, up = _empty(T * K, r), _nf4(E, M, D)
    yield "forward", times(x_TD, up, at, flip=True, gather=True, lift=Lift(low_Rr=low_Rr, lift=B_EMr.mT, scale=2.0))
    yield "backward", times(h_RM, up, at, flip=False, scatter=True, lift=Lift(low_Rr=low_Rr, lift=A_ErN, scale=2.0))


def _rest(T: int, cut: Tile) -> Iterator[tuple[str, Call]]:
    at, R = _route(T, cut), T * K
    x_TD, g_TD, a_RI, h_RM = _empty(T, D), _empty(T, D), _empty(R, I), _empty(R, M)
    low_Rr, weight_TK, bias_ED = _empty(R, r), _empty(T, K, dtype=torch.float32), _empty(E, D)
    transposed: Weights = _nf4(E, I, D)
    yield "forward, transposed", times(a_RI, transposed, at, flip=False, scatter=True, bias=bias_ED)
    yield "backward, transposed", times(g_TD, transposed, at, flip=True, gather=True)
    yield "forward, bf16", times(x_TD, _empty(E, M, D), at, flip=True, gather=True)
    yield "A", times(x_TD, _factor(E, r, D), at, flip=True, gather=True)
    yield "B", times(h_RM, _factor(E, M, r), at, flip=False)
    yield "dA", outer(low_Rr, x_TD, at, dtype=torch.float32, gather_right=True, scale=2.0)
    yield "dB", outer(g_TD, low_Rr, at, dtype=torch.float32, gather_left=True, weight_S=weight_TK, scale=2.0)
    yield "dW", outer(h_RM, x_TD, at, dtype=torch.bfloat16, gather_right=True)
    yield "dbias", sums(g_TD, at, dtype=torch.bfloat16, gather=True, weight_S=weight_TK)
    yield "combine", combine(_empty(R, D), weight_TK, K)
    yield "weigh", weigh(a_RI, a_RI, weight_TK, bias_ED, g_TD, at)


def _route(T: int, cut: Tile) -> Route:
    return route(torch.empty(T, K, dtype=torch.int64, device="meta"), E, cut)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _factor(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.float32)


def _nf4(*shape: int) -> NF4Tensor:
    blocks = shape[0] * shape[1] * shape[2] // 64
    return NF4Tensor(
        packed=_empty(blocks * 32, dtype=torch.uint8),
        absmax=_empty(blocks, dtype=torch.uint8),
        absmax2=_empty(-(-blocks // 256), dtype=torch.float32),
        offset=torch.empty((), dtype=torch.float32, device="meta"),
        shape=shape,
        dtype=torch.bfloat16,
    )
