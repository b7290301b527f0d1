"""What a run says and keeps: metrics.jsonl always, the console, and trackers where the recipe names any."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ft.io.files import write_file
from ft.train import console
from ft.train.console import Pace, Screen
from ft.train.sinks import Sink

METRICS = "metrics.jsonl"


class Log:
    """One value that the loop speaks to; on ranks other than the first (``main=False``) it does nothing.

    metrics.jsonl holds one JSON object a line: ``{"step", "time", numbers...}`` for steps and evaluations,
    ``{"event", "time", facts...}`` for everything else. Non-finite numbers are the strings "NaN", "Infinity" and
    "-Infinity". A disk or a terminal that fails is announced and does not stop the run. Lines from before ``start``
    are written at ``start``: an attempt that fails on its data leaves no file.
    """

    def __init__(self, folder: Path, *, main: bool = True, stream: TextIO | None = None):
        self.path, self.main = folder / METRICS, main
        self.total, self.pace, self.last = 0, Pace(), 0
        self.sinks: Sequence[Sink] = ()
        self._lock = threading.RLock()  # trackers give notice from their own threads
        self._file: Appender | None = None
        self._early: list[Mapping[str, object]] | None = []
        self._lost = 0
        self._screen: Screen | None = console.screen(stream or sys.stderr) if main else None

    def start(self, facts: Mapping[str, object], *, total: int, step: int = 0, sinks: Sequence[Sink] = ()) -> None:
        """Begin, or go on after ``step`` of ``total`` steps: later lines of an earlier attempt are removed."""
        self.total, self.last, self.sinks = total, step, sinks
        if not self.main:
            return
        removed = truncate(self.path, step)
        early, self._early = self._early or [], None
        for line in early:
            self._write(line)
        self._say(console.table(facts))
        self.event("resume" if step else "start", step=step, steps=total, removed=removed, facts=dict(facts))
        if removed:
            self.notice(f"{removed} lines of {METRICS} beyond step {step} were removed; those steps run again")
        self._screen_do(lambda screen: screen.open(step, total))
        for sink in sinks:
            sink.start(facts, step)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, or of an evaluation after it. ``step_s`` (seconds per step) gives the time to the end."""
        if not self.main:
            return
        numbers = {name: float(value) for name, value in numbers.items()}
        if "step_s" in numbers:
            self.pace = self.pace.add(numbers["step_s"], max(1, step - self.last))
            self.last = step
            numbers["peak_bytes"] = console.peak_bytes()
        self._write({"step": step, "time": _now(), **numbers})
        for sink in self.sinks:
            sink.write(step, numbers)
        if "loss" in numbers:
            line = console.facts(numbers, left=console.eta(step, self.total, self.pace))
            self._screen_do(lambda screen: screen.show(step, line))
        else:
            self._say(f"step {step}/{self.total}  {console.facts(numbers)}")

    def event(self, kind: str, **facts: object) -> None:
        """Something for metrics.jsonl alone."""
        if self.main:
            self._write({"event": kind, "time": _now(), **facts})

    def notice(self, text: str) -> None:
        """Something a person should read: console and metrics.jsonl."""
        self.event("notice", text=text)
        self._say(text)

    def show(self, text: str) -> None:
        """Something for the console alone."""
        self._say(text)

    def finish(self, outcome: str = "done") -> None:
        """The last line; waits a little for slow trackers."""
        self.event("finish", outcome=outcome, step=self.last)
        self.close()

    def close(self) -> None:
        """Let go of the terminal, the trackers and the file. May be called twice."""
        self._screen_do(lambda screen: screen.close())
        sinks, self.sinks = self.sinks, ()
        for sink in sinks if self.main else ():
            sink.close()
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, line: Mapping[str, object]) -> None:
        with self._lock:
            if self._early is not None:
                self._early.append(line)
                return
            try:
                self._file = self._file or Appender(self.path)
                self._file.write(json_line(line))
            except OSError as error:
                self._lost += 1
                if self._lost == 1:
                    self._say(f"cannot write {self.path}: {error.strerror}; trying again at each line")
                return
            lost, self._lost = self._lost, 0
            if lost:
                self.notice(f"{self.path} is written again; {lost} lines were lost")

    def _say(self, text: str) -> None:
        self._screen_do(lambda screen: screen.say(text))

    def _screen_do(self, act: Callable[[Screen], None]) -> None:
        with self._lock:
            if self._screen is None:
                return
            try:
                act(self._screen)
            except OSError as error:  # the terminal was closed: the run goes on without one
                self._screen = None
                self._write({"event": "console_lost", "time": _now(), "error": str(error)})


class Appender:
    """Appends whole lines, each out at once. A line that a full disk cut short is ended before the next one."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut = False

    def write(self, line: bytes) -> None:
        data = b"\n" + line if self._cut else line
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        finally:
            if written:
                self._cut = written < len(data)

    def close(self) -> None:
        os.close(self._fd)


def truncate(path: Path, step: int) -> int:
    """Remove the step lines of metrics.jsonl beyond ``step`` (all of them for 0), and what is not a whole line.

    Events stay: they tell what happened. Returns how many lines were removed.
    """
    if not path.is_file():
        return 0
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    kept = [line for line in lines if _stays(line, step)]
    if len(kept) < len(lines):
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        write_file(temporary, [line + b"\n" for line in kept])
        os.replace(temporary, path)
    return len(lines) - len(kept)


def _stays(line: bytes, step: int) -> bool:
    try:
        value = json.loads(line)
    except ValueError:  # cut short by a kill or a full disk
        return False
    return "event" in value or (step > 0 and value["step"] <= step)


def _now() -> float:
    return round(time.time(), 3)


def json_line(value: Mapping[str, object]) -> bytes:
    """One line of strict JSON."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def plain(value: Any) -> Any:
    """Values JSON knows: numbers of numpy and torch as Python's, paths and the like as text, nothing non-finite."""
    if isinstance(value, float):
        return finite(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def finite(value: float) -> float | str:
    """JSON has no NaN and no infinity: they become "NaN", "Infinity", "-Infinity", which float() reads back."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
