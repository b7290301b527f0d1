"""Time from Enter to text: ``ft --help`` and ``ft show``, against a bare interpreter and ``trl``'s own help.

    python bench/startup.py [--runs 9] [--trl-runs 3]

Every command is a fresh process. Commands take turns, so that a slow moment of the machine strikes all of them; the
figure is the median, and the ratio of two commands the median of the ratios of their turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from shutil import which
from statistics import median

from common import record

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
BARE, HELP, FIELDS, TRL, TRL_FIELDS = "python", "ft --help", "ft run x.py --help", "trl --help", "trl sft --help"


def commands() -> dict[str, list[str]]:
    """Name to command line; trl only where it is installed."""
    ft = str(BIN / "ft")
    found = {
        BARE: [sys.executable, "-c", "pass"],
        "import ft": [sys.executable, "-c", "import ft"],
        HELP: [ft, "--help"],
        "ft show": [ft, "show", "recipes/smollm2_lora.py"],
        FIELDS: [ft, "run", "recipes/smollm2_lora.py", "--help"],
    }
    if trl := which("trl", path=str(BIN)):
        found |= {TRL: [trl, "--help"], TRL_FIELDS: [trl, "sft", "--help"]}
    return found


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def measure(table: dict[str, list[str]], turns: dict[str, int]) -> dict[str, list[float]]:
    """``turns[name]`` timings of each command, in turns, after one unmeasured round that fills the file cache."""
    for command in table.values():
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(max(turns.values())):
        for name, command in table.items():
            if turn < turns[name]:
                times[name].append(seconds(command))
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    return median(a / b for a, b in zip(times[above], times[below], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the start-up of the command line.")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--trl-runs", type=int, default=3, help="trl sft --help takes seconds")
    options = parser.parse_args()
    table = commands()
    times = measure(table, {name: options.trl_runs if name.startswith("trl") else options.runs for name in table})
    for name, found in times.items():
        print(f"{name:20s} {median(found):6.3f} s  (min {min(found):.3f}, max {max(found):.3f}, n {len(found)})")
    ratios = {f"{HELP} / {BARE}": ratio(times, HELP, BARE)}
    if TRL in times:
        ratios |= {f"{a} / {b}": ratio(times, a, b) for a, b in ((TRL, HELP), (TRL_FIELDS, FIELDS))}
    for name, value in ratios.items():
        print(f"{name:38s} {value:6.2f}x")
    record("startup", {"median_s": {name: round(median(found), 4) for name, found in times.items()}, "ratio": ratios})


if __name__ == "__main__":
    main()
