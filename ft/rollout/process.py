"""A worker process from the outside: started when needed, asked with a deadline, killed with all that it started."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen

STARTUP = 60.0  # seconds in which a process must start and import a function's module


@frozen(kw_only=True)
class Reply:
    """Scores, and by position why some are missing; or no scores at all, and why."""

    scores: list[float | None] | None = None
    wrong: Mapping[int, str] = field(factory=dict)
    why: str = ""


@define(eq=False)
class Worker:
    """One process at a time: a new one is started after it crashed or was killed."""

    timeout: float  # seconds a call may take
    process: subprocess.Popen[bytes] | None = None
    loaded: set[str] = field(factory=set)  # functions whose modules the process has imported
    closed: bool = False

    def call(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        """What the function ``name`` says of ``arguments``. What goes wrong is a reply too."""
        process = self._running()
        if process is None:
            return Reply(why="the run is ending")
        if name not in self.loaded:
            reply = self._ask(process, {"load": name}, max(STARTUP, self.timeout))
            if reply.why:
                return reply
            self.loaded.add(name)
        return self._ask(process, {"function": name, "arguments": arguments}, self.timeout)

    def _ask(self, process: subprocess.Popen[bytes], request: Mapping[str, Any], timeout: float) -> Reply:
        try:
            line = _exchange(process, json.dumps(request, default=str).encode() + b"\n", timeout)
        except TimeoutError:
            self.end()
            return Reply(why=f"no answer within {timeout:g} s; its process was killed")
        if not line.endswith(b"\n"):
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # its own status says more than that of the kill below
            self.end()
            return Reply(why=f"its process died ({_status(process.returncode)})")
        said = json.loads(line)
        if "error" in said:
            return Reply(why=said["error"])
        return Reply(scores=said.get("scores"), wrong={int(i): why for i, why in said.get("wrong", {}).items()})

    def _running(self) -> subprocess.Popen[bytes] | None:
        if self.process is not None and self.process.poll() is not None:
            self.end()
        if self.process is None and not self.closed:
            self.process = start()
            if self.closed:  # while it was started
                self.kill()
        return self.process

    def kill(self) -> None:
        """End the process and its children, from any thread; whoever waits for its answer learns that it died."""
        if (process := self.process) is not None:
            with suppress(ProcessLookupError, PermissionError):  # it has ended already
                os.killpg(process.pid, 9)

    def end(self) -> None:
        """Kill, and let go of its pipes."""
        self.kill()
        process, self.process = self.process, None
        self.loaded.clear()
        if process is not None:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # a request that it never read
                        pipe.close()


def start() -> subprocess.Popen[bytes]:
    """A worker in a session of its own, which Ctrl+C does not reach; it finds what this process's folder holds."""
    paths = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "ft.rollout.worker", str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)  # one that does not read must not hold us up
    return process


def _exchange(process: subprocess.Popen[bytes], request: bytes, timeout: float) -> bytes:
    """The line that answers ``request``, or what came of it before the process died.

    Raises:
        TimeoutError: neither came in time.
    """
    assert process.stdin is not None and process.stdout is not None
    deadline, left, found = time.monotonic() + timeout, memoryview(request), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while not found.endswith(b"\n"):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                if key.fileobj is process.stdout:
                    if not (piece := os.read(key.fd, 1 << 20)):
                        return bytes(found)
                    found += piece
                    continue
                try:
                    left = left[os.write(key.fd, left) :]
                except BrokenPipeError:
                    return b""
                if not left:
                    selector.unregister(process.stdin)
    return bytes(found)


def _status(status: int | None) -> str:
    return f"signal {-status}" if status is not None and status < 0 else f"status {status}"
