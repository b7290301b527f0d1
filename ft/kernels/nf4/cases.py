"""Shapes that any implementation of NF4 is tested and measured on."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor


@frozen(kw_only=True)
class Case:
    """One weight to quantise."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    block: int = 64
    double: bool = True


CASES = (
    Case(name="one block", shape=(64,)),
    Case(name="matrix", shape=(48, 64)),
    Case(name="float32", shape=(33, 130), dtype=torch.float32),
    Case(name="float16", shape=(40, 96), dtype=torch.float16),
    Case(name="single scales", shape=(48, 64), double=False),
    Case(name="tail block", shape=(3, 50), double=False),
    Case(name="odd number of values", shape=(5, 7)),
    Case(name="odd, whole blocks before", shape=(3, 67), dtype=torch.float32),
    Case(name="two values", shape=(1, 2), dtype=torch.float32),
    Case(name="one value", shape=(1,), dtype=torch.float32),
    Case(name="many nested blocks", shape=(300, 128), block=32),
    Case(name="experts", shape=(4, 24, 64)),
    Case(name="experts that straddle blocks", shape=(3, 10, 10)),
    Case(name="block 32", shape=(20, 30), block=32, dtype=torch.float32),
    Case(name="block 128", shape=(20, 64), block=128),
    Case(name="block 4096", shape=(70, 130), block=4096),
    Case(name="more than a piece", shape=(513, 1025)),
)


def make(case: Case, seed: int = 0) -> Tensor:
    """Normal values of a weight's size, with a block of zeros and an outlier where there is room."""
    w = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    flat = w.view(-1)
    if flat.numel() > 3 * case.block:
        flat[case.block : 2 * case.block] = 0.0
        flat[2 * case.block + 5] = 3.0
    return w.to(case.dtype)
