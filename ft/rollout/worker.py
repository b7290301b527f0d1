"""A process that scores completions, one request at a time: ``python -m ft.rollout.worker``.

Requests and replies are lines of JSON on pipes that reward functions cannot reach: what they print goes to stderr,
and what they read is empty. A function runs in the main thread, so that libraries that set alarms work. The process
dies with its parent, and its children with it, unless they began a session of their own.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ft.recipe.typed import find

_PR_SET_PDEATHSIG = 1


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    functions: dict[str, Callable[..., Any]] = {}
    for line in requests:
        answer = _answer(json.loads(line), functions)
        sys.stdout.flush()
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


# Ending --------------------------------------------------------------------------------------------------------------


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that ends; elsewhere than on Linux stdin does."""
    if sys.platform != "linux":
        return
    signal_at_death_of(parent, signal.SIGKILL)
    me = os.getpid()
    if os.fork() == 0:
        _end_group_after(me)


def signal_at_death_of(parent: int, number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def _end_group_after(worker: int) -> None:
    """In a process of its own: wait until the worker is gone, then end what it has left behind."""
    for fd in (0, 1):
        os.close(fd)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == worker:
        signal.sigwait({signal.SIGTERM})
    os.killpg(0, signal.SIGKILL)


# Scoring -------------------------------------------------------------------------------------------------------------


def _answer(request: Mapping[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    try:
        if "load" in request:
            functions[request["load"]] = find(request["load"], "method.rewards")
            return {}
        function, given = functions[request["function"]], request["arguments"]
        found = function(**accepted(function, given))
        if isinstance(found, (str, bytes, Mapping)) or not hasattr(found, "__iter__"):
            return {"error": f"it returned {_shown(found)}, not a list of scores"}
        return checked(list(found), len(given["completions"]))
    except BaseException as error:  # whatever a user's function raises is an answer, SystemExit too
        return {"error": f"{type(error).__name__}: {error}{_place(error)}"}


def accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All of ``given``, or of a function without ``**columns`` what it has names for."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}


def checked(scores: list[Any], expected: int) -> dict[str, Any]:
    """Scores that are numbers or None; of the others, by position, what is wrong."""
    if len(scores) != expected:
        return {"error": f"{len(scores)} scores for {expected} completions"}
    found = [_number(score) for score in scores]
    wrong = {i: f"a score of {_shown(s)}" for i, (s, v) in enumerate(zip(scores, found, strict=True)) if _bad(s, v)}
    return {"scores": found, "wrong": wrong}


def _number(score: Any) -> float | None:
    if score is None or isinstance(score, (str, bytes)):  # float() would read "1" from text
        return None
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _bad(score: Any, value: float | None) -> bool:
    return value is None and score is not None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(error: BaseException) -> str:
    """The line of the function that failed, as " (rewards.py:12)"."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


if __name__ == "__main__":
    main()
