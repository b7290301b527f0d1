"""Running code that a model wrote, against tests, in a process of its own.

What holds it: ``python -I`` in an empty folder that is removed afterwards, without this process's environment; limits
on CPU time, memory, file sizes and open files; a deadline, after which it and what it started in its session is
killed; no network where the kernel lets an ordinary user have a network namespace (``Ran.offline`` says whether).

What does not: it runs as the same user, so it can read and delete what that user can, and a process that begins a
session of its own outlives it. It shares an interpreter with its tests, so code that sets out to can forge their
results. It keeps accidents away, not attackers: those need a container or a virtual machine around the whole run.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from attrs import frozen

_NEW_USER, _NEW_NET, _DEATH_SIGNAL = 0x10000000, 0x40000000, 1

# Results go out on a line each with a word that the code was not told, so that printing or leaving early wins nothing.
_RUNNER = """
import json, os, sys
job = json.loads(sys.stdin.read())
out, word = os.fdopen(os.dup(1), "w"), job["word"]
os.dup2(2, 1)
names = {"__name__": "__main__"}
try:
    exec(compile(job["code"], "answer.py", "exec"), names)
except BaseException as error:
    print(word, json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
    os._exit(0)
for i, test in enumerate(job["tests"]):
    try:
        exec(compile(test, f"test {i}", "exec"), names)
        why = ""
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
    print(word, json.dumps({"test": i, "why": why}), file=out, flush=True)
os._exit(0)
"""


@frozen(kw_only=True)
class Ran:
    """Of each test, "" if it passed, else why not."""

    tests: tuple[str, ...]
    offline: bool  # the code had no network

    @property
    def passed(self) -> int:
        return sum(not why for why in self.tests)


def run(code: str, tests: Sequence[str], *, seconds: float = 5.0, megabytes: int = 512) -> Ran:
    """Python ``code``, then each of ``tests`` in its names; one that raises nothing passes.

    Args:
        seconds: for all of it. Tests that were not reached by then have failed.
        megabytes: of address space.
    """
    word, offline = secrets.token_hex(16), can_go_offline()
    request = json.dumps({"code": code, "tests": list(tests), "word": word})
    with tempfile.TemporaryDirectory(prefix="ft-sandbox-", ignore_cleanup_errors=True) as folder:
        said, why = _held(request, Path(folder), seconds, megabytes, offline)
    lines = [json.loads(line.partition(" ")[2]) for line in said.splitlines() if line.startswith(word)]
    if failed := [line["error"] for line in lines if "error" in line]:
        return Ran(tests=tuple(failed[:1] * len(tests)), offline=offline)
    found = {line["test"]: line["why"] for line in lines}
    return Ran(tests=tuple(found.get(i, why) for i in range(len(tests))), offline=offline)


def _held(request: str, folder: Path, seconds: float, megabytes: int, offline: bool) -> tuple[str, str]:
    """What the runner said, and why it said no more."""
    parent = os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _RUNNER], cwd=folder, env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace",
        start_new_session=True, preexec_fn=lambda: _limit(parent, seconds, megabytes, offline),
    )  # fmt: skip
    why = "not reached: the process ended"
    try:
        said, _ = process.communicate(request, timeout=seconds)
    except subprocess.TimeoutExpired:
        why = f"not reached within {seconds:g} s"
        _kill(process)
        said, _ = process.communicate()
    finally:
        _kill(process)
    return said, why


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _limit(parent: int, seconds: float, megabytes: int, offline: bool) -> None:
    """In the child, before it becomes python."""
    cpu, size, mb = int(seconds) + 1, megabytes << 20, 1 << 20
    for what, most in (
        (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, size), (resource.RLIMIT_FSIZE, 16 * mb),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        if offline:
            ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NET)


def can_go_offline() -> bool:
    """Whether this kernel gives an ordinary user a network namespace, tried once in a child."""
    if not _offline:
        _offline.append(sys.platform == "linux" and _try_offline())
    return _offline[0]


_offline: list[bool] = []


def _try_offline() -> bool:
    code = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({_NEW_USER | _NEW_NET}) != 0)"
    return subprocess.run([sys.executable, "-I", "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def code_of(text: str) -> str:
    """The last fenced block of an answer; all of it where there is none."""
    found = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", text, re.DOTALL)
    return found[-1] if found else text
