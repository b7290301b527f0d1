"""Seconds in turns, peaks of memory, and where and of what code they were measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).parents[3]
SLOW = 1.0  # seconds; a contender whose first call takes longer has one round


def seconds(run: Callable[[], Any]) -> float:
    """Wall clock of one call, with what it left to a GPU."""
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each run, one after the other, so that a slow moment of the machine strikes each.

    A round that is not counted goes first, and tells who is SLOW.
    """
    counts = {name: 1 if seconds(run) > SLOW else rounds for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            if turn < counts[name]:
                times[name].append(seconds(run))
    return times


def extra_memory(run: Callable[[], Any]) -> int:
    """Peak of the bytes that torch holds during a call, beyond what stood before and beyond its results."""
    if torch.cuda.is_available():
        return _on_gpu(run)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its starts and stops on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = run()
    profiler: Any = trace.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak - held


def _on_gpu(run: Callable[[], Any]) -> int:
    _wait()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    _wait()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del kept
    return extra


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Short hash of the code measured, with "+" where files of ft differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()

    if not (CHECKOUT / ".git").exists():
        return None
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "ft") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
