"""Routed experts, forward and backward, against transformers' implementations with peft's LoRA.

The shapes are one layer of Qwen 3.5's mixture at a quarter of its width. Shapes: T tokens, K experts per token,
E experts, D model width, M and N out- and input width of a projection, I expert width, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from attrs import evolve, frozen

from ft.commands.kernels.contest import FT, TOLERANCE, Contest, Cost, Results, Run, Spec, carried, differentiate
from ft.commands.kernels.peers import IMPLEMENTATIONS, transformers_experts
from ft.kernels.experts import Stack, experts, reference
from ft.kernels.experts.cases import Case, Problem, problem, quantised
from ft.kernels.nf4 import NF4Tensor, dequantise

Mode = Literal["lora", "nf4", "frozen", "trained"]
GATHERED = 2**29  # bytes of expert weights that batched_mm may copy out: it takes a matrix for every routed row
DELTAS = 2**32  # bytes of dense LoRA deltas that eager may ask of peft: all experts', again for each expert


@frozen(kw_only=True)
class Timed:
    """``lora``: frozen base, LoRA on both stacks; ``nf4``: so on a 4-bit base; ``frozen``, ``trained``: no LoRA."""

    mode: Mode
    case: Case

    @property
    def name(self) -> str:
        c = self.case
        return f"{self.mode} E{c.E} T{c.T} K{c.K} D{c.D} I{c.I}" + (f" r{c.r}" if self.mode in ("lora", "nf4") else "")


def _case(E: int, T: int) -> Case:
    return Case(name="", T=T, K=8, E=E, D=512, I=256, r=16)


TIMED = (
    Timed(mode="lora", case=_case(64, 16)),
    Timed(mode="lora", case=_case(64, 128)),
    Timed(mode="lora", case=_case(32, 1024)),
    Timed(mode="lora", case=_case(128, 512)),
    Timed(mode="nf4", case=_case(64, 128)),
    Timed(mode="nf4", case=_case(32, 1024)),
    Timed(mode="frozen", case=_case(32, 1024)),
    Timed(mode="trained", case=_case(32, 1024)),
)


def contest(timed: Timed, dtype: torch.dtype, device: torch.device) -> Contest:
    lora = timed.mode in ("lora", "nf4")
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    made = carried(problem(timed.case, dtype=dtype, lora=lora, frozen=timed.mode != "trained"), device)
    if timed.mode == "nf4":
        stored = quantised(made)
        dense = dequantised(stored)
        runs |= {FT: partial(run, stored, experts), "ft, dense base": partial(run, dense, experts)}
        missing["transformers, peft"] = "they have no experts in 4 bits"
    else:
        dense = made
        runs[FT] = partial(run, made, experts)
        for name in IMPLEMENTATIONS:
            if why := absent(name, timed, dtype):
                missing[name] = why
            else:
                runs[f"{name}, peft" if lora else name] = transformers_experts(made, name)
    exact = carried(dense, device, torch.float32)
    return Contest(
        runs=runs, truth=partial(run, exact, reference.experts), oracle="a loop over experts in float32",
        tolerance=TOLERANCE[dtype], limit=limit(timed, dtype, device), missing=missing,
    )  # fmt: skip


def absent(name: str, timed: Timed, dtype: torch.dtype) -> str:
    """Why an implementation of transformers is left out of this case; empty if it is not."""
    if timed.mode == "lora" and find_spec("peft") is None:
        return "peft is not installed"
    c = timed.case
    copied = c.T * c.K * 2 * c.I * c.D * dtype.itemsize
    if name == "batched_mm" and copied > GATHERED:
        return f"it would copy {copied / 2**30:.1f} GiB of weights, one matrix a row"
    deltas = c.E**2 * 3 * c.I * c.D * dtype.itemsize
    if name == "eager" and timed.mode == "lora" and deltas > DELTAS:
        return f"peft would make {deltas / 2**30:.1f} GiB of dense deltas, all experts' again for each expert"
    return ""


def run(made: Problem, function: Callable[..., torch.Tensor]) -> Results:
    out = function(made.hidden_TD, made.index_TK, made.weight_TK, made.params, made.lora)
    return differentiate(out, made.leaves())


def dequantised(made: Problem) -> Problem:
    def dense(stack: Stack) -> Stack:
        assert isinstance(stack.weight, NF4Tensor)
        return evolve(stack, weight=dequantise(stack.weight))

    return evolve(made, params=evolve(made.params, up=dense(made.params.up), down=dense(made.params.down)))


def limit(timed: Timed, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Dense products of as many rows, without LoRA: forward, input gradients, weight gradients where trained."""
    c = timed.case
    x, h, a = (torch.randn(c.T * c.K, n, dtype=dtype, device=device) for n in (c.D, 2 * c.I, c.I))
    up = torch.randn(2 * c.I, c.D, dtype=dtype, device=device)
    down = torch.randn(c.D, c.I, dtype=dtype, device=device)

    def products() -> object:
        found = [x @ up.t(), a @ down.t(), x @ down, h @ up]
        return [*found, h.t() @ x, x.t() @ a] if timed.mode == "trained" else found

    return products


def cost(timed: Timed, dtype: torch.dtype) -> Cost:
    """Weights of the experts that get tokens (the number expected of uniform routing), read once a pass."""
    c, size = timed.case, dtype.itemsize
    rows, hit = c.T * c.K, c.E * (1 - (1 - c.K / c.E) ** c.T)
    values, passes = 3 * c.D * c.I, 3 if timed.mode == "trained" else 2
    held = 0.5 + 1 / 64 if timed.mode == "nf4" else size
    moved, flops = hit * values * held * passes + 4 * c.T * c.D * size, 2 * rows * values * passes
    if timed.mode in ("lora", "nf4"):
        wide = 2 * c.D + 3 * c.I  # what the factors of both stacks are wide, together
        moved += 3 * hit * c.r * wide * 4
        flops += 3 * 2 * rows * c.r * wide
    return Cost(bytes=round(moved), flops=round(flops))


SPECS = tuple(Spec(op="experts", name=t.name, make=partial(contest, t), cost=partial(cost, t)) for t in TIMED)
