"""What a GPU that is not here would need at least, and whether each Triton kernel compiles for it.

A roofline is a bound, not a measurement: nothing here has run. PEAKS are the makers' figures for memory and for dense
products, of the part that each target stands for. Real copies reach 80 to 90 % of the first, products 60 to 80 % of
the second.
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
from ft.commands.kernels.shipped import Work, work
from ft.kernels import aot


@frozen(kw_only=True)
class Peak:
    part: str
    memory: float  # bytes/s
    products: float  # FLOP/s of matrix products in bf16 or fp16, without sparsity
    single: float  # FLOP/s in float32, whose products in full precision take no tensor core
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which 16-bit products bind, and below which memory does."""
        return self.products / self.memory


PEAKS = {
    "sm_80": Peak(part="A100", memory=2.04e12, products=312e12, single=19.5e12,
                  source="NVIDIA, data sheet of A100 80 GB SXM"),
    "sm_90": Peak(part="H100", memory=3.35e12, products=989e12, single=67e12,
                  source="NVIDIA, data sheet of H100 SXM"),
    "sm_100": Peak(part="B200", memory=8.0e12, products=2250e12, single=80e12,
                   source="NVIDIA, Blackwell brief, B200 of HGX at 1000 W"),
    "gfx942": Peak(part="MI300X", memory=5.3e12, products=1307e12, single=163.4e12,
                   source="AMD, data sheet of Instinct MI300X"),
}  # fmt: skip


@frozen(kw_only=True)
class Least:
    """Seconds that the busier of memory and products needs, which no kernel can beat."""

    seconds: float
    bound: Literal["memory", "products"]


def least(cost: Cost, peak: Peak, *, single: bool = False) -> Least:
    """``single``: products are of float32."""
    memory, products = cost.bytes / peak.memory, cost.flops / (peak.single if single else peak.products)
    return Least(seconds=max(memory, products), bound="memory" if memory >= products else "products")


def bound(cost: Cost, target: str, *, single: bool = False) -> dict[str, Any]:
    """What is recorded of a roofline: the least work, the least time on this target, and what binds it there."""
    found = least(cost, PEAKS[target], single=single)
    work = {"bytes": cost.bytes, "flops": cost.flops, "intensity": cost.flops / cost.bytes}
    return {**work, "target": target, "least_seconds": found.seconds, "bound": found.bound}


def works(ops: Sequence[str]) -> dict[str, Work | None]:
    """By name of a kernel of these ops: the problem that its roofline is drawn for."""
    known = [op for op in ops if op in aot.OPS]
    return {launch.name: work(launch) for launch in (aot.launches(*known) if known else ())}


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
