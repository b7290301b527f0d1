"""NF4 on this device: quantise, dequantise and a linear layer, ft against bitsandbytes.

    python bench/nf4.py [--rounds 7] [--threads N] [--only 'dequantise']

Both take turns in one process, so that a slow moment of the machine strikes each. Results are compared bit for bit
before anything is timed. ``ratio`` is bitsandbytes' median over ours; ``least`` is the same of least times. GB/s counts
the bytes a perfect kernel would move: the dense weight once and the quantised one once. ``extra`` is the peak of what a
call allocates beyond its result, of tensors that torch allocates.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from attrs import evolve, frozen
from common import measure, record
from torch import Tensor

from ft.kernels import nf4


@frozen
class Setting:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    double: bool = True

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{'x'.join(map(str, self.shape))} {kind} {'double' if self.double else 'single'}"


MATRIX, STACK, SMALL = Setting((2048, 4096)), Setting((32, 512, 512)), Setting((256, 512))
SETTINGS = (
    MATRIX,
    evolve(MATRIX, double=False),
    evolve(MATRIX, dtype=torch.float32),
    evolve(MATRIX, dtype=torch.float32, double=False),
    STACK,
    evolve(STACK, dtype=torch.float32),
    SMALL,
)


def runs(setting: Setting, op: str) -> dict[str, Callable[[], Any]]:
    """What each contender does, once both have been shown to give the same."""
    import bitsandbytes.functional as bnb

    w = torch.randn(setting.shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(setting.dtype)
    q = nf4.quantise(w, double=setting.double)

    def theirs() -> tuple[Tensor, Any]:
        return bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=setting.double)

    packed, state = theirs()
    assert torch.equal(q.packed, packed.view(-1)) and torch.equal(q.absmax, state.absmax)
    assert torch.equal(nf4.dequantise(q), bnb.dequantize_4bit(packed, state))
    if op == "quantise":
        return {"ft": lambda: nf4.quantise(w, double=setting.double), "bitsandbytes": theirs}
    if op == "dequantise":
        return {"ft": lambda: nf4.dequantise(q), "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state)}
    x = torch.randn(64, setting.shape[-1], dtype=setting.dtype).requires_grad_()
    return {"ft": lambda: _ours(x, q), "bitsandbytes": lambda: _theirs(x, packed, state)}


def _ours(x: Tensor, q: nf4.NF4Tensor) -> None:
    nf4.linear(x, q).sum().backward()


def _theirs(x: Tensor, packed: Tensor, state: Any) -> None:
    import bitsandbytes as bnb

    bnb.matmul_4bit(x, packed.t(), quant_state=state).sum().backward()


def extra(run: Callable[[], Any]) -> int:
    """Peak of bytes held while ``run`` goes on, less what is still held at its end."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = run()
    held = peak = 0
    profiler: Any = trace.profiler
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak - held


def moved(setting: Setting) -> int:
    """Bytes of the dense weight and of the quantised one."""
    w = torch.empty(setting.shape, dtype=setting.dtype)
    return w.nbytes + w.numel() // 2 + w.numel() // 64 * (1 if setting.double else 4)


def compare(setting: Setting, op: str, rounds: int) -> dict[str, Any]:
    contenders = runs(setting, op)
    times = measure(contenders, rounds)
    ours, theirs = times["ft"], times["bitsandbytes"]
    return {
        "op": op,
        "case": setting.name,
        "ms": round(median(ours) * 1e3, 3),
        "GB/s": round(moved(setting) / min(ours) / 1e9, 2) if op != "linear" else None,
        "ratio": round(median(theirs) / median(ours), 2),
        "least": round(min(theirs) / min(ours), 2),
        "extra_MB": round(extra(contenders["ft"]) / 1e6, 2),
        "their_extra_MB": round(extra(contenders["bitsandbytes"]) / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports an optional kernel that it did not find
    lines = []
    for op in ("quantise", "dequantise", "linear"):
        for setting in SETTINGS:
            if args.only in f"{op} {setting.name}" and not (op == "linear" and len(setting.shape) > 2):
                lines.append(compare(setting, op, args.rounds))
                print("  ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
    record("nf4", {"threads": args.threads, "rounds": args.rounds, "cases": lines})


if __name__ == "__main__":
    main()
