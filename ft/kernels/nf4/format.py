"""What an NF4 tensor is: two 4-bit codes a byte, one scale a block, and the two tables of values.

A weight of any rank is one row-major stream of n values, cut into blocks of ``block``. Value i is
``nf4_code()[code_i] * absmax[i // block]``; byte j holds code 2j in its high half and 2j + 1 in its low half. With
double quantisation ``absmax`` is uint8 and block b's scale is
``dynamic_map()[absmax[b]] * absmax2[b // 256] + offset``.

Source: Dettmers et al., QLoRA (2023), and 8-bit Approximations for Parallelism in Deep Learning (2015).
"""

from __future__ import annotations

import math

import torch
from attrs import frozen
from torch import Tensor

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Quantiles of a normal distribution, scaled to [-1, 1] and holding an exact 0. Stored in files too, so they are fixed.
_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@frozen(kw_only=True, eq=False)
class NF4Tensor:
    """A quantised weight; every tensor lies on one device."""

    packed: Tensor  # uint8, ceil(n / 2)
    absmax: Tensor  # ceil(n / block): float32, or uint8 codes of the dynamic map
    absmax2: Tensor | None = None  # float32, one for 256 values of a uint8 absmax
    offset: Tensor | None = None  # float32, 0-d
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight, before and after
    block: int = 64


def numel(q: NF4Tensor) -> int:
    """How many weights it holds."""
    return math.prod(q.shape)


def nbytes(q: NF4Tensor) -> int:
    """Bytes it takes, scales included."""
    return sum(t.nbytes for t in (q.packed, q.absmax, q.absmax2, q.offset) if t is not None)


def nf4_code(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values, ascending, float32."""
    return torch.tensor(_CODE, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the 8-bit dynamic type, ascending, float32.

    A sign, e leading zeros that stand for a power of ten, and what bits are left for a linear fraction: the decade
    [10^(e-7), 10^(e-6)) is cut into 2^e equal cells for e in 0..6, each represented by its middle; then 0 and 1.
    """
    decades = []
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32, device="cpu")
        decades.append(10 ** (e - 6) * ((edges[:-1] + edges[1:]) / 2.0))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], device="cpu")
    return torch.cat([-positive, positive, ends]).sort().values.to(device)
