"""Stopping by real signals, sent to real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ft.train.signals import Stop

LOOP = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN if "ignore" in sys.argv else signal.default_int_handler)
from ft.train.signals import Stop
before = [signal.getsignal(s) for s in Stop.SIGNALS]
with Stop(grace=float(sys.argv[1])) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.005)
    print("asked", stop.signal.name, flush=True)
    for line in sys.stdin:
        break
assert [signal.getsignal(s) for s in Stop.SIGNALS] == before
print("saved", flush=True)
"""


@contextmanager
def loop(*arguments: str) -> Iterator[subprocess.Popen]:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert line(child) == "ready"
        yield child
    finally:
        child.kill()
        child.communicate()


def line(child: subprocess.Popen) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.mark.parametrize("number", Stop.SIGNALS)
def test_the_first_signal_asks_and_the_block_ends_in_its_own_time(number):
    with loop("0") as child:
        child.send_signal(number)
        assert line(child) == f"asked {number.name}"
        out, err = child.communicate("go on\n", timeout=30)
    assert (child.returncode, out) == (0, "saved\n")
    assert err.strip() == f"{number.name}: stopping after this step; again to quit at once"


@pytest.mark.parametrize("number", Stop.SIGNALS)
def test_the_second_signal_quits_at_once(number):
    with loop("0") as child:
        child.send_signal(signal.SIGTERM)
        assert line(child) == "asked SIGTERM"
        child.send_signal(number)
        assert child.wait(timeout=30) == -number


def test_a_signal_passed_on_by_a_launcher_is_not_a_second_one():
    with loop("1000") as child:
        child.send_signal(signal.SIGINT)
        assert line(child) == "asked SIGINT"
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate("go on\n", timeout=30)
    assert (child.returncode, out) == (0, "saved\n")
    assert err.count("stopping") == 1


def test_what_was_ignored_stays_ignored():
    with loop("0", "ignore") as child:
        child.send_signal(signal.SIGINT)
        time.sleep(0.05)
        child.send_signal(signal.SIGUSR1)
        assert line(child) == "asked SIGUSR1"


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(s) for s in Stop.SIGNALS]
    with pytest.raises(ZeroDivisionError), Stop() as stop:
        assert [signal.getsignal(s) for s in Stop.SIGNALS] != before
        assert not stop.requested
        raise ZeroDivisionError
    assert [signal.getsignal(s) for s in Stop.SIGNALS] == before


def test_outside_the_main_thread_it_says_that_it_cannot_catch():
    said: list[str] = []

    def body() -> None:
        with Stop(say=said.append) as stop:
            assert not stop.requested

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert len(said) == 1 and "not the main thread" in said[0]
