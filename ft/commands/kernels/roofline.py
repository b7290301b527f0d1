"""What a GPU that is not here would need at least, and whether each Triton kernel compiles for it.

PEAKS are makers' figures for dense products and memory, of the part that each target stands for: A100 80 GB (SXM),
H100 (SXM), B200 and MI300X. Real products reach 60 to 80 % of the first, copies 80 to 90 % of the second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal

from attrs import frozen

from ft.commands.kernels.contest import Cost


@frozen(kw_only=True)
class Peak:
    part: str
    memory: float  # bytes/s
    products: float  # FLOP/s of matrix products in bf16 or fp16


PEAKS = {
    "sm_80": Peak(part="A100", memory=2.04e12, products=312e12),
    "sm_90": Peak(part="H100", memory=3.35e12, products=989e12),
    "sm_100": Peak(part="B200", memory=8.0e12, products=2250e12),
    "gfx942": Peak(part="MI300X", memory=5.3e12, products=1307e12),
}


@frozen(kw_only=True)
class Least:
    """Seconds that the busier of memory and products needs, which no kernel can beat."""

    seconds: float
    bound: Literal["memory", "products"]


def least(cost: Cost, peak: Peak) -> Least:
    memory, products = cost.bytes / peak.memory, cost.flops / peak.products
    return Least(seconds=max(memory, products), bound="memory" if memory >= products else "products")


def compiled(ops: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of ``ft.kernels.aot`` for all Triton kernels of ``ops``, made in processes that interpret nothing."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    parts = max(1, min(4, os.cpu_count() or 1))
    commands = [[sys.executable, "-m", "ft.kernels.aot", *ops, f"{part}/{parts}"] for part in range(parts)]
    shares = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    found = []
    for share in shares:
        out, err = share.communicate()
        if share.returncode:
            raise RuntimeError(f"compiling the kernels failed:\n{err[-2000:]}")
        found += [json.loads(line) for line in out.splitlines()]
    return sorted(found, key=lambda row: row["name"])
