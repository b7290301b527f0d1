"""Sizes that both implementations of the reductions are tested and measured on."""

from __future__ import annotations

from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor


@frozen(kw_only=True)
class Segments:
    """Tokens of each sequence, filler after them, and the width of what is summed (0: numbers)."""

    name: str
    lengths: tuple[int, ...]
    filler: int = 0
    D: int = 0

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, int]:
        """(x_T, seq_T, S); filler is NaN."""
        generator, S = torch.Generator().manual_seed(seed), len(self.lengths)
        counts = torch.tensor([*self.lengths, self.filler])
        seq_T = torch.arange(S + 1).repeat_interleave(counts)
        x_T = torch.randn(len(seq_T), *([self.D] if self.D else []), generator=generator).to(dtype)
        x_T[len(seq_T) - self.filler :] = torch.nan
        return x_T, seq_T, S


SEGMENTS = (
    Segments(name="ragged", lengths=(1, 63, 5), filler=3),
    Segments(name="empty ones", lengths=(0, 7, 0, 1, 0)),
    Segments(name="longer than a block", lengths=(1000, 1100), filler=5),
    Segments(name="vectors", lengths=(17, 1, 33), filler=2, D=130),
    Segments(name="nothing but filler", lengths=(), filler=4),
    Segments(name="no tokens", lengths=(0, 0), D=3),
)


@frozen(kw_only=True)
class Policy:
    """Tokens of a policy-gradient sum; ``spread`` is that of the log-ratios, ``trained`` the share of the mask."""

    name: str
    T: int = 63
    spread: float = 0.3
    trained: float = 0.7
    weighted: bool = False
    options: dict[str, Any] = field(factory=dict)

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """((logp, old_logp, adv, mask), options); untrained places hold NaN."""
        generator = torch.Generator().manual_seed(seed)
        mask_T = torch.rand(self.T, generator=generator) < self.trained
        logp_T, drift_T, adv_T, weight_T = torch.randn(4, self.T, generator=generator)
        old_T = (logp_T + self.spread * drift_T).to(dtype)
        nan = [torch.where(mask_T, x.to(dtype), torch.nan) for x in (logp_T, old_T, adv_T, weight_T.abs())]
        return (*nan[:3], mask_T), {**self.options, **({"weight_T": nan[3]} if self.weighted else {})}


POLICIES = (
    Policy(name="plain"),
    Policy(name="one token", T=1, trained=1.0),
    Policy(name="nothing trained", trained=0.0),
    Policy(name="no tokens", T=0),
    Policy(name="several blocks", T=2100),
    Policy(name="weighted", weighted=True, options={"clip": (0.2, 0.28)}),
    Policy(name="dual clip", T=200, spread=1.5, options={"dual_clip": 3.0}),
    Policy(name="no clip", spread=1.0, options={"clip": None}),
    Policy(name="held", spread=30.0, options={"clip": None}),
    Policy(name="on policy", spread=0.0),
    Policy(name="nearly on policy", spread=1e-3),
)


@frozen(kw_only=True)
class Features:
    """Features of samples; ``each``: the reference has a row per sample; ``missing``: share of samples left out."""

    name: str
    lead: tuple[int, ...] = (3,)
    G: int = 4
    D: int = 40
    each: bool = False
    missing: float = 0.0

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """(gen_PGD, ref_PD, valid_PG); missing samples hold NaN."""
        generator = torch.Generator().manual_seed(seed)
        gen_PGD = torch.randn(*self.lead, self.G, self.D, generator=generator).to(dtype)
        ref_PD = torch.randn(*self.lead, *([self.G] if self.each else []), self.D, generator=generator).to(dtype)
        if not self.missing:
            return gen_PGD, ref_PD, None
        valid_PG = torch.rand(*self.lead, self.G, generator=generator) >= self.missing
        return torch.where(valid_PG[..., None], gen_PGD, torch.nan), ref_PD, valid_PG


FEATURES = (
    Features(name="plain"),
    Features(name="one sample", G=1),
    Features(name="ragged", G=5, D=1000),
    Features(name="many samples", lead=(1,), G=63, D=70),
    Features(name="blocks, a row each", lead=(2, 3), each=True),
    Features(name="missing samples", lead=(6,), missing=0.5),
    Features(name="one prompt without a dimension", lead=()),
    Features(name="no prompts", lead=(0,)),
)
