"""Ctrl+C, SIGTERM and SIGUSR1 ask the loop to save and stop; asked again, the process quits at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it, and a process that quits at once cannot tidy up


def _to_stderr(text: str) -> None:
    """Straight to the descriptor: a handler may interrupt a print, and buffered files do not like to be re-entered."""
    with suppress(OSError):  # the terminal may be gone, which may be why the signal came
        os.write(2, f"\n{text}\n".encode())


class Stop:
    """While the ``with`` block lasts, signals set ``requested`` instead of ending the process.

    Poll ``requested`` at step boundaries, and agree on it over ranks. A second signal ends the process by that
    signal, at once, unless it comes within ``grace`` seconds of the first: a launcher passes on the Ctrl+C that
    the terminal has already sent to every rank, which is one wish and not two. A signal that was ignored when the
    block began (a job in the background) stays ignored.

    Outside the main thread Python delivers no signals: then nothing is caught, and ``say`` is told.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, say: Callable[[str], None] = _to_stderr, grace: float = 1.0):
        self.say, self.grace = say, grace
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():
            self.say("not the main thread: Ctrl+C and SIGTERM will not save before they stop")
            return self
        for number in self.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            self.say(f"{self.signal.name}: stopping after this step; again to quit at once")
        elif time.monotonic() - self._since >= self.grace:
            if sys.stderr.isatty():
                _to_stderr(_SHOW_CURSOR)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
