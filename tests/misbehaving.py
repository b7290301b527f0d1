"""Reward functions that misbehave, for tests: imported by worker processes, so without anything heavy.

Each gives a good sample the length of its text; one whose text is "bad" goes wrong in its own way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def good(completions, **columns):
    return [float(len(text)) for text in completions]


def raises(completions, **columns):
    assert "bad" not in completions, "no such answer"
    return good(completions)


def exits(completions, **columns):
    return sys.exit(3) if "bad" in completions else good(completions)


def exits_at_once(completions, **columns):
    return os._exit(3) if "bad" in completions else good(completions)


def segfaults(completions, **columns):
    if "bad" in completions:
        os.kill(os.getpid(), signal.SIGSEGV)
    return good(completions)


def hangs(completions, **columns):
    if "bad" in completions:
        time.sleep(60)
    return good(completions)


def nan(completions, **columns):
    return [float("nan") if text == "bad" else len(text) for text in completions]


def infinite(completions, **columns):
    return [float("inf") if text == "bad" else len(text) for text in completions]


def strings(completions, **columns):
    return ["1" if text == "bad" else len(text) for text in completions]


def too_few(completions, **columns):
    return good(completions)[: -1 if "bad" in completions else None]


def nothing(completions, **columns):
    return None if "bad" in completions else good(completions)


def number(completions, **columns):
    return 1.0 if "bad" in completions else good(completions)


def none(completions, **columns):
    return [None if text == "bad" else float(len(text)) for text in completions]


def generator(completions, **columns):
    return (len(text) for text in completions)


def numpy_values(completions, **columns):
    import numpy

    return numpy.array(good(completions), numpy.float32)


def chatty(completions, **columns):
    print("x" * 3_000_000)
    print("y" * 3_000_000, file=sys.stderr)
    return good(completions)


def reads(completions, **columns):
    return [len(text) + len(sys.stdin.read()) for text in completions]


def parent_of_many(completions, **columns):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        lengths = pool.map(len, completions)
    said = subprocess.run([sys.executable, "-c", "print(input())"], capture_output=True, text=True)
    return [n + len(said.stdout) for n in lengths]


def leaves_children(completions, **columns):
    subprocess.Popen(["sleep", "600"])
    Path(columns["note"][0]).write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(600 if "bad" in completions else 0)
    return good(completions)


def sized(completions, completion_ids, entry, **columns):
    return [
        len(text) + len(ids) + len(one["x"]) for text, ids, one in zip(completions, completion_ids, entry, strict=True)
    ]


def spoken(completions, answer):  # no **columns
    said = [one["content"] for (one,) in completions if one["role"] == "assistant"]
    return [float(text == right) for text, right in zip(said, answer, strict=True)]


def counted(completions, calls, **columns):
    with open(calls[0], "a") as file:
        file.write(".")
    return raises(completions)
