"""Routed-experts problems for tests and benchmarks: four layouts, ragged routing, empty experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.nn.functional import relu

from ft.kernels.experts import Factors, LoRA, Params, Stack
from ft.kernels.experts.rows import Gated
from ft.kernels.nf4 import quantise

Layout = Literal["gated", "gelu", "gpt_oss", "plain"]


@frozen(kw_only=True)
class Case:
    """``gelu`` is gated by GELU; ``plain`` has no gate; ``gpt_oss`` is transposed, interleaved, biased and clamped.

    ``used``: how many experts get rows; all by default.
    """

    name: str
    layout: Layout = "gated"
    T: int
    K: int
    E: int
    D: int
    I: int
    r: int = 4
    used: int | None = None


CASES = (
    Case(name="gated", T=13, K=2, E=5, D=16, I=8),
    Case(name="gated, one expert has it all", T=7, K=1, E=4, D=8, I=16, used=1),
    Case(name="gated, most are empty", T=3, K=2, E=32, D=8, I=8, r=1),
    Case(name="gpt_oss", layout="gpt_oss", T=11, K=4, E=6, D=16, I=8),
    Case(name="plain", layout="plain", T=9, K=3, E=5, D=8, I=24, r=16),
    Case(name="scales straddle experts", T=5, K=2, E=4, D=8, I=12),
    Case(name="one token", T=1, K=2, E=3, D=8, I=8),
)

RAGGED = (
    Case(name="no tokens", T=0, K=2, E=3, D=8, I=8),
    Case(name="63 tokens, odd widths and rank", T=63, K=3, E=7, D=10, I=6, r=3),
    Case(name="1000 tokens, top 1, GELU", layout="gelu", T=1000, K=1, E=4, D=8, I=8, r=1),
    Case(name="1000 tokens, one expert has it all", layout="gpt_oss", T=1000, K=1, E=4, D=8, I=8, used=1),
    Case(name="most of 300 experts", layout="plain", T=63, K=2, E=300, D=8, I=8, r=16),
)


@frozen(kw_only=True, eq=False)
class Problem:
    """Arguments of ``experts``, every float tensor a leaf that requires a gradient."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    params: Params
    lora: LoRA | None

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that a gradient may reach, by name."""
        found: dict[str, Tensor | None] = {"hidden": self.hidden_TD, "weight": self.weight_TK}
        for name in ("up", "down"):
            stack: Stack = getattr(self.params, name)
            found[f"{name}.weight"] = stack.weight if isinstance(stack.weight, Tensor) else None
            found[f"{name}.bias"] = stack.bias_EM
            factors: Factors | None = getattr(self.lora, name, None)
            found[f"{name}.A"], found[f"{name}.B"] = (factors.A_ErN, factors.B_EMr) if factors else (None, None)
        return {name: tensor for name, tensor in found.items() if tensor is not None and tensor.requires_grad}


def problem(
    case: Case, *, dtype: torch.dtype = torch.float32, lora: bool = True, frozen: bool = False, seed: int = 0
) -> Problem:
    """A seeded problem of unit scale; ``frozen`` weights and biases want no gradient."""
    rng = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, scale: float = 1.0, trained: bool = True, kept: torch.dtype = dtype) -> Tensor:
        value = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
        return value.to(kept).requires_grad_(trained)

    def stack(M: int, N: int) -> Stack:
        transposed = case.layout == "gpt_oss"
        shape = (case.E, N, M) if transposed else (case.E, M, N)
        bias_EM = leaf(case.E, M, trained=not frozen) if transposed else None
        return Stack(weight=leaf(*shape, scale=N**-0.5, trained=not frozen), bias_EM=bias_EM, transposed=transposed)

    def factors(M: int, N: int) -> Factors:
        kept = torch.promote_types(torch.float32, dtype)
        A_ErN = leaf(case.E, case.r, N, scale=N**-0.5, kept=kept)
        return Factors(A_ErN=A_ErN, B_EMr=leaf(case.E, M, case.r, kept=kept), scaling=0.5)

    M = case.I if case.layout == "plain" else 2 * case.I
    used = torch.randperm(case.E, generator=rng)[: case.used or case.E]
    picks = [used[torch.randperm(len(used), generator=rng)[: case.K]] for _ in range(case.T)]
    index_TK = torch.stack(picks) if picks else torch.empty(0, case.K, dtype=torch.int64)
    weights = torch.rand(case.T, case.K, generator=rng, dtype=torch.float64)
    return Problem(
        hidden_TD=leaf(case.T, case.D),
        index_TK=index_TK,
        weight_TK=weights.to(torch.promote_types(torch.float32, dtype)).requires_grad_(),
        params=Params(up=stack(M, case.D), down=stack(case.D, case.I), act=_ACTS[case.layout]),
        lora=LoRA(up=factors(M, case.D), down=factors(case.D, case.I)) if lora else None,
    )


def quantised(problem: Problem) -> Problem:
    """The same problem with its weights in NF4."""

    def pack(stack: Stack) -> Stack:
        assert isinstance(stack.weight, Tensor)
        return evolve(stack, weight=quantise(stack.weight.detach()))

    params = evolve(problem.params, up=pack(problem.params.up), down=pack(problem.params.down))
    return evolve(problem, params=params)


def _clamped(h_RM: Tensor) -> Tensor:
    gate, up = h_RM[..., ::2].clamp(max=1.5), h_RM[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _squared(h_RM: Tensor) -> Tensor:
    return relu(h_RM).square()


_ACTS: dict[Layout, Callable[[Tensor], Tensor]] = {
    "gated": Gated("silu"),
    "gelu": Gated("gelu_tanh"),
    "gpt_oss": _clamped,
    "plain": _squared,
}
