"""The least work of each Triton kernel that ships, at one stated problem: what its roofline is drawn from.

Bytes count each input once and each result once, whatever a kernel reads again; routing's indices and other small
tables are left out. FLOPs are of matrix products alone, since no peak is published for the rest.

Shapes: T tokens, E experts, K experts per token, R = T * K rows, D model width, M and I width of a projection and of
an expert, r LoRA rank; N positions, V vocabulary; S sequences, P prompts, G samples of one prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from attrs import frozen

from ft.commands.kernels.contest import Cost
from ft.kernels.launch import Launch

SIZE = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a value, double-quantised in blocks of 64
NF4_SINGLE = 0.5 + 4 / 64


@frozen(kw_only=True)
class Work:
    """``problem``: the sizes in words. ``single``: products are of float32, which no tensor core takes whole."""

    problem: str
    cost: Cost
    single: bool = False


def work(launch: Launch) -> Work | None:
    """None for a kernel that has no problem here yet."""
    op, _, name = launch.name.partition(".")
    try:
        return _OPS[op](name.strip(), launch)
    except KeyError:
        return None


def _found(pattern: str, text: str) -> tuple[str, ...]:
    if (match := re.fullmatch(pattern, text)) is None:
        raise KeyError(text)
    return match.groups()


def _work(problem: str, moved: float, flops: float = 0, *, single: bool = False) -> Work:
    return Work(problem=problem, cost=Cost(bytes=round(moved), flops=round(flops)), single=single)


# ---- routed experts -------------------------------------------------------------------------------------------------


def _experts(name: str, launch: Launch) -> Work:
    """One layer of Qwen3 30B-A3B in bfloat16; weights of the experts that uniform routing is expected to reach."""
    import torch

    from ft.kernels.experts.triton_calls import tile
    from ft.kernels.experts.triton_ships import TOKENS, D, E, I, K, M, r

    kind, rows, maker = _found(r"(.+), (\d+) rows, (\w+)", name)
    cuts = {tile(T * K, E, torch.bfloat16, amd=maker == "AMD").rows: T for T in TOKENS}
    T = cuts[int(rows)]
    R, hit = T * K, E * (1 - (1 - K / E) ** T)
    token, row_D, row_M, row_I, low = 2 * T * D, 2 * R * D, 2 * R * M, 2 * R * I, 2 * R * r
    moved, flops = {
        "forward": (token + low + hit * (M * D * NF4 + 4 * M * r) + row_M, 2 * R * M * (D + r)),
        "backward": (row_M + low + hit * (M * D * NF4 + 4 * D * r) + row_D, 2 * R * D * (M + r)),
        "forward, transposed": (row_I + hit * (I * D * NF4 + 2 * D) + row_D, 2 * R * I * D),
        "backward, transposed": (token + hit * I * D * NF4 + row_I, 2 * R * I * D),
        "forward, bf16": (token + hit * 2 * M * D + row_M, 2 * R * M * D),
        "A": (token + hit * 4 * D * r + low, 2 * R * D * r),
        "B": (row_M + hit * 4 * M * r + low, 2 * R * M * r),
        "dA": (low + token + 4 * E * r * D, 2 * R * r * D),
        "dB": (token + low + 4 * R + 4 * E * D * r, 2 * R * D * r),
        "dW": (row_M + token + 2 * E * M * D, 2 * R * M * D),
        "dbias": (token + 4 * R + 2 * E * D, 0),
        "combine": (row_D + 4 * R + token, 0),
        "weigh": (3 * row_I + token + 8 * R + 2 * E * D, 0),
    }[kind]
    return _work(f"T{T} E{E} K{K} D{D} I{I}" + (f" r{r}" if kind in ("A", "B", "dA", "dB") else ""), moved, flops)


# ---- NF4 ------------------------------------------------------------------------------------------------------------


def _nf4(name: str, launch: Launch) -> Work:
    """A matrix of 4096 x 4096, and as many rows of input as the tile is made for."""
    n, problem = 4096 * 4096, "4096x4096"
    packed = n * (NF4_SINGLE if "single" in name else NF4)
    kernel = name.split(" ")[0]
    if kernel == "quantise_kernel":
        return _work(problem, 2 * n + n * NF4_SINGLE)
    if kernel == "dequantise_kernel":
        if "4096" in name:  # a scale for 4096 values
            packed = n * (0.5 + 4 / 4096)
        return _work(problem, packed + n * SIZE[launch.signature["out"]])
    rows = launch.constants["BLOCK_M"]
    flops = {"forward_kernel": 2 * rows * n, "backward_kernel": 2 * rows * n}[kernel]
    return _work(f"{problem} with {rows} rows", packed + 2 * 2 * rows * 4096, flops)


# ---- log-probs ------------------------------------------------------------------------------------------------------


def _logprobs(name: str, launch: Launch) -> Work:
    """Positions of one tile of Qwen 3's vocabulary."""
    N, V, D, r = 256, 151_936, 2048, 16
    kind, full = name.split(" ")[0], "lora" in name
    size = 4 if "fp32" in name else 2
    if kind == "exponent":  # a tile in place
        return _work(f"N{N} V{V}", 2 * N * V * size + (V * size if full else 0))
    moved = (V + N) * D * size + full * ((N + V) * r + V) * size
    flops = 2 * N * V * (D + r * full)
    written = {"statistics": 0, "gradient": N * V * size}[kind]
    return _work(f"N{N} V{V} D{D}" + f" r{r}" * full, moved + written, flops, single=size == 4)


# ---- routing --------------------------------------------------------------------------------------------------------


def _routing(name: str, launch: Launch) -> Work:
    """4096 tokens over the family's experts. Backward reads the logits again and writes their gradient."""
    T, (E, K) = 4096, map(int, _found(r".* E(\d+) K(\d+).*", name))
    types = launch.signature
    logits = T * E * SIZE[types["logits_ptr"]]
    weights = T * K * SIZE[types["dweight_ptr" if name.startswith("backward") else "weight_ptr"]]
    moved = logits + T * K * 8 + weights
    moved += logits if name.startswith("backward") else 0
    moved += T * K * (8 * ("routes_ptr" in types) + 4 * ("dscale_ptr" in types))
    return _work(f"T{T} E{E} K{K}", moved)


# ---- reductions -----------------------------------------------------------------------------------------------------


def _reductions(name: str, launch: Launch) -> Work:
    """The sizes of the timed cases. A prompt has one reference, which its samples share."""
    if name.startswith("segment_sum"):
        T, S, D = (65_536, 128, 1) if "per token" in name else (4096, 32, 4096)
        return _work(f"T{T} S{S}" + f" D{D}" * (D > 1), 2 * T * D + 4 * S * D)
    if name.startswith("policy"):
        T = 65_536
        return _work(f"T{T}", T * (4 * (4 + ("weight" in name)) + 1))
    P, G, D = 64, int(_found(r".* of (\d+).*", name)[0]), 4096
    read = 2 * P * (G + 1) * D
    wrote = {"similarity": 4 * 4 * P * G, "gradient": 2 * P * G * D}[name.split(" ")[0]]
    return _work(f"P{P} G{G} D{D}", read + wrote)


_OPS: Mapping[str, Callable[[str, Launch], Work]] = {
    "experts": _experts, "nf4": _nf4, "logprobs": _logprobs, "routing": _routing, "reductions": _reductions,
}  # fmt: skip
