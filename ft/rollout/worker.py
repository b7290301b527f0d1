"""A process that scores completions, one request at a time: ``python -m ft.rollout.worker``.

Requests and replies are lines of JSON on a pipe that reward functions cannot reach: what they print goes to stderr.
A function runs in the main thread, so that libraries that set alarms work. The process dies with its parent.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from ft.recipe.typed import find


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    functions: dict[str, Callable[..., Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        _reply(replies, _answer(request, functions))


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that ends; elsewhere than on Linux stdin does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def _reply(replies: TextIO, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


def _answer(request: dict[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    name = request["function"]
    try:
        if name not in functions:
            functions[name] = find(name, "method.rewards")
        scores = list(functions[name](**request["arguments"]))
        return _checked(scores, len(request["arguments"]["completions"]))
    except Exception as error:  # whatever a user's function raises is an answer
        return {"error": f"{type(error).__name__}: {error}"}


def _checked(scores: list[Any], expected: int) -> dict[str, Any]:
    if len(scores) != expected:
        return {"error": f"{len(scores)} scores for {expected} completions"}
    values = [None if score is None else float(score) for score in scores]
    wild = [value for value in values if value is not None and not math.isfinite(value)]
    return {"error": f"a score of {wild[0]}"} if wild else {"scores": values}


if __name__ == "__main__":
    main()
