"""What the benchmarks share: where they ran, and the file they append to."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, in turns, after one unmeasured round that fills every cache."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def in_turns(script: str, given: list[str], rounds: int, *, hidden: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """What ``script --worker ft`` and ``--worker trl`` find, each in a process of its own, in turns.

    Args:
        given: options for the workers besides this process's own; they write a JSON object to ``--result``.
        hidden: names in it that are not shown.
    """
    runs: dict[str, list[Any]] = {"ft": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        for i in range(rounds):
            for who in ("ft", "trl") if i % 2 == 0 else ("trl", "ft"):
                command = [sys.executable, script, "--worker", who, "--result", str(result), *sys.argv[1:], *given]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{who} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
                runs[who].append(run := json.loads(result.read_text()))
                shown = {k: round(v, 1) for k, v in run.items() if k not in hidden}
                print(f"round {i + 1} {who}: {shown}", flush=True)
    return runs


def ratios(runs: dict[str, list[Any]], keys: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Medians of both sides and ft's over TRL's, printed as a table."""
    summary: dict[str, dict[str, float]] = {}
    print(f"\n{'':16}{'ft':>12}{'trl':>12}{'ft / trl':>12}")
    for key in keys:
        ours, theirs = (statistics.median(run[key] for run in runs[who]) for who in ("ft", "trl"))
        summary[key] = {"ft": ours, "trl": theirs, "ratio": ours / theirs}
        print(f"{key:16}{ours:12.1f}{theirs:12.1f}{ours / theirs:12.2f}")
    return summary


def device() -> str:
    """The GPU's name, or the processor's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the code measured, with "+" where files differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../ft") else "")


def record(name: str, numbers: dict[str, Any]) -> None:
    """Append one line to results/<name>.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "device": device(), "commit": commit(), **numbers}
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
