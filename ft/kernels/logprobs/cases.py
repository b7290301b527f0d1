"""Sizes and options that any implementation of token_logps is tested and measured on."""

from __future__ import annotations

from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor


@frozen(kw_only=True)
class Case:
    """One call of token_logps: N positions, width D, V tokens, LoRA rank r (0: none)."""

    name: str
    N: int = 63
    D: int = 24
    V: int = 500
    r: int = 0
    bias: bool = False
    options: dict[str, Any] = field(factory=dict)  # keyword options of token_logps
    spread: float = 1.0  # standard deviation of the logits


CASES = (
    Case(name="plain"),
    Case(name="one position", N=1),
    Case(name="blocks and tiles", N=1000, V=701),
    Case(name="two tokens", V=2),
    Case(name="one token", V=1, options={"entropy": True}),
    Case(name="temperature", options={"temperature": 0.7}),
    Case(name="softcap", options={"softcap": 3.0}, spread=3.0),
    Case(name="softcap, temperature, scale", options={"softcap": 2.0, "temperature": 1.5, "scale": 0.25}, spread=9.0),
    Case(name="bias", bias=True, options={"scale": 1.7}),
    Case(name="lora", r=4),
    Case(name="entropy", options={"entropy": True}),
    Case(name="all", N=420, V=601, r=3, bias=True, spread=4.0,
         options={"softcap": 5.0, "temperature": 0.9, "scale": 1.1, "entropy": True}),
    Case(name="certain", spread=60.0, options={"entropy": True}),
)  # fmt: skip


@frozen(kw_only=True, eq=False)
class Inputs:
    """Tensors of a case; ``args`` and ``kwargs`` are those of token_logps."""

    hidden_ND: Tensor
    head_VD: Tensor
    target_N: Tensor
    bias_V: Tensor | None
    A_rD: Tensor | None
    B_Vr: Tensor | None
    options: dict[str, Any]

    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_ND, self.head_VD, self.target_N

    def kwargs(self) -> dict[str, Any]:
        lora = None if self.A_rD is None else (self.A_rD, self.B_Vr, 0.5)
        return {**self.options, "bias_V": self.bias_V, "lora": lora}

    def floats(self) -> list[Tensor]:
        """Those that can have gradients, hidden first."""
        tensors = (self.hidden_ND, self.head_VD, self.bias_V, self.A_rD, self.B_Vr)
        return [t for t in tensors if t is not None]


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Normal tensors; half of the targets are the likeliest token, the others are any."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden_ND = normal(case.N, case.D).to(dtype)
    head_VD = (normal(case.V, case.D) * case.spread * case.D**-0.5).to(dtype)
    target_N = torch.randint(case.V, (case.N,), generator=generator)
    target_N[::2] = (hidden_ND.float() @ head_VD.float().T).argmax(1)[::2]
    return Inputs(
        hidden_ND=hidden_ND,
        head_VD=head_VD,
        target_N=target_N,
        bias_V=normal(case.V).to(dtype) if case.bias else None,
        A_rD=normal(case.r, case.D).to(dtype) if case.r else None,
        B_Vr=(0.3 * normal(case.V, case.r)).to(dtype) if case.r else None,
        options=dict(case.options),
    )
