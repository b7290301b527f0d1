"""metrics.jsonl, the console and the trackers. TensorBoard's own reader and a pseudo-terminal are the oracles."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ft.errors import RecipeError
from ft.train import console, sinks
from ft.train.console import Pace, clock, eta, facts
from ft.train.log import Log, json_line, truncate
from ft.train.sinks import Queued

NUMBERS = {
    "loss": 1.23456,
    "nll": 1.23456,
    "grad_norm": 0.5,
    "lr": 2e-4,
    "tokens": 5000.0,
    "tokens_per_s": 1234.0,
    "trained_share": 0.43,
    "padding": 0.034,
    "step_s": 2.0,
    "bad_steps": 0.0,
}


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl by a parser that knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder) if "event" not in line]


# --- metrics.jsonl


def test_every_step_is_one_line_and_out_at_once(tmp_path):
    with Log(tmp_path, stream=io.StringIO()) as log:
        log.start({"model": "m"}, total=3)
        log.step(1, NUMBERS)
        assert lines(tmp_path)[-1]["loss"] == 1.23456  # while the run goes on
        log.step(1, {"eval/loss": 2.0})
        log.event("bad_step", step=2, folder=Path("x"))
        log.finish()
    kinds = [line.get("event", "step") for line in lines(tmp_path)]
    assert kinds == ["start", "step", "step", "bad_step", "finish"]
    assert lines(tmp_path)[0]["facts"] == {"model": "m"} and lines(tmp_path)[3]["folder"] == "x"
    assert lines(tmp_path)[1]["peak_bytes"] > 1e6 and "peak_bytes" not in lines(tmp_path)[2]


def test_strict_json_whatever_comes():
    value = {
        "nan": float("nan"),
        "inf": -np.float32("inf"),
        "tensor": torch.tensor(0.5),
        "array": np.arange(2),
        "nested": {1: (Path("p"), None, True, torch.tensor(float("inf")))},
        "text": 'line\n"quoted"',
    }
    line = json_line(value)
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "nan": "NaN",
        "inf": "-Infinity",
        "tensor": 0.5,
        "array": [0, 1],
        "nested": {"1": ["p", None, True, "Infinity"]},
        "text": 'line\n"quoted"',
    }
    assert [str(float(x)) for x in ("NaN", "Infinity", "-Infinity")] == ["nan", "inf", "-inf"]


def test_resume_removes_what_runs_again_and_keeps_what_happened(tmp_path):
    with Log(tmp_path, stream=io.StringIO()) as log:
        log.start({}, total=9)
        for step in (1, 2, 3, 4):
            log.step(step, {"loss": 1.0})
        log.notice("at step 4")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    out = io.StringIO()
    with Log(tmp_path, stream=out) as log:
        log.start({}, total=9, step=2)
        log.step(3, {"loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3]
    assert [line["event"] for line in lines(tmp_path) if "event" in line] == ["start", "notice", "resume", "notice"]
    assert "3 lines of metrics.jsonl beyond step 2 were removed" in out.getvalue()


def test_starting_again_from_nothing_keeps_no_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":0,"eval/loss":1}\n{"step":1}\n{"event":"start"}\n')
    assert truncate(tmp_path / "metrics.jsonl", 0) == 2
    assert lines(tmp_path) == [{"event": "start"}]
    assert truncate(tmp_path / "absent", 0) == 0


def test_an_attempt_that_fails_before_it_starts_leaves_no_file(tmp_path):
    out = io.StringIO()
    with Log(tmp_path / "run", stream=out) as log:
        log.notice("a row was dropped")
    assert out.getvalue() == "a row was dropped\n" and not (tmp_path / "run").exists()
    with Log(tmp_path / "run", stream=out) as log:
        log.notice("a row was dropped")
        log.start({}, total=1)
    assert [line.get("text", line["event"]) for line in lines(tmp_path / "run")] == ["a row was dropped", "start"]


def test_other_ranks_are_silent(tmp_path, capfd):
    with Log(tmp_path / "run", main=False) as log:
        log.start({"a": 1}, total=2)
        log.step(1, NUMBERS)
        log.event("x")
        log.notice("y")
        log.finish()
    assert capfd.readouterr() == ("", "") and not (tmp_path / "run").exists()


FULL = """
import io, resource, sys
from pathlib import Path
from ft.train.log import Log
out = io.StringIO()
log = Log(Path(sys.argv[1]), stream=out)
log.start({}, total=9)
log.step(1, {"loss": 1.0})
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))
log.step(2, {"loss": 1.0})
log.step(3, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
log.step(4, {"loss": 1.0})
log.close()
print(out.getvalue())
"""


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("File too large; trying again at each line") == 1
    assert "2 lines were lost" in done.stdout
    *_, cut, four, notice = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert cut.startswith('{"step":2') and len(cut) == 10  # the limit let ten bytes through
    assert json.loads(four)["step"] == 4 and "2 lines were lost" in json.loads(notice)["text"]


# --- the console


def test_plain_lines_say_everything(tmp_path):
    out = io.StringIO()
    with Log(tmp_path, stream=out) as log:
        log.start({"model": "tiny", "trained": "7 parameters"}, total=100)
        log.step(40, NUMBERS)
        log.step(40, {"eval/loss": 2.5, "eval/tokens": 10})
        log.notice("saved")
    first, second, step, judged, saved = out.getvalue().splitlines()
    assert (first, second) == ("  model    tiny", "  trained  7 parameters")
    expected = "step 40/100  loss 1.2346  grad 0.5  lr 2.00e-04  1,234 tok/s  trained 43%  padding 3%  peak "
    assert step.startswith(expected) and step.endswith(" GB  eta 2:00")  # 60 steps of 2 s
    assert (judged, saved) == ("step 40/100  eval/loss 2.5  eval/tokens 10", "saved")


def test_numbers_of_a_method_and_bad_steps_are_shown():
    assert facts({"loss": 1.0, "margin": 0.25, "bad_steps": 2.0}) == "loss 1.0000  margin 0.25  bad steps 2"
    assert facts({"loss": float("nan"), "nll": float("nan")}) == "loss nan  nll nan"


def test_pace_forgets_a_slow_start():
    pace = Pace().add(30.0)
    assert pace.seconds == pytest.approx(30.0)
    for _ in range(200):
        pace = pace.add(1.0)
    assert pace.seconds == pytest.approx(1.0, abs=0.01)
    assert Pace().add(1.0).add(3.0, steps=20).seconds == pytest.approx(3 - 2 * 0.017 / 0.517, abs=0.001)
    assert Pace().add(2.0, steps=5).seconds == pytest.approx(2.0)


def test_eta():
    assert eta(3, 10, Pace()) is None
    assert eta(3, 10, Pace().add(2.0)) == pytest.approx(14.0)
    assert eta(10, 10, Pace().add(2.0)) == 0
    assert [clock(x) for x in (0.4, 59, 60, 3599, 3600, 90061)] == [
        "0 s",
        "59 s",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]


TERMINAL = """
import sys
from pathlib import Path
from ft.train.log import Log
with Log(Path(sys.argv[1])) as log:
    log.start({"model": "tiny"}, total=4)
    for step in (1, 2):
        log.step(step, {"loss": 1.5, "step_s": 1.0})
    log.notice("a notice [with brackets]")
    log.finish()
"""


def test_a_terminal_gets_a_bar(tmp_path):
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    child = subprocess.Popen([sys.executable, "-c", TERMINAL, str(tmp_path)], stderr=theirs, env=env)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    assert child.wait(timeout=60) == 0, seen.decode()
    text = seen.decode()
    assert all(
        part in text for part in ("model  tiny", "━", "2/4", "loss 1.5000", "eta 2 s", "a notice [with brackets]")
    )
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert steps(tmp_path) == [1, 2]


def test_a_closed_terminal_does_not_stop_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError("gone")

    with Log(tmp_path, stream=Gone()) as log:
        log.start({}, total=2)
        log.step(1, NUMBERS)
        log.finish()
    assert steps(tmp_path) == [1]
    assert [line["event"] for line in lines(tmp_path) if "event" in line] == ["console_lost", "start", "finish"]


def test_peak_memory_is_this_process():
    before = console.peak_bytes()
    block = np.ones(200_000_000, dtype=np.uint8)
    assert console.peak_bytes() >= before and console.peak_bytes() > block.nbytes


# --- trackers


class Recorder:
    """A sink that keeps what it is told, and misbehaves where asked to."""

    def __init__(self, *, fail: str = "", hang: str = "", error: BaseException | None = None):
        self.fail, self.hang, self.error = fail, hang, error or RuntimeError("no network")
        self.calls: list[tuple] = []
        self.release = threading.Event()

    def _call(self, name: str, *arguments: object) -> None:
        if name == self.fail:
            raise self.error
        if name == self.hang:
            self.release.wait(60)
        self.calls.append((name, *arguments))

    def start(self, facts, step):
        self._call("start", facts, step)

    def write(self, step, numbers):
        self._call("write", step, numbers)

    def close(self):
        self._call("close")


def run(tmp_path: Path, sink: Recorder, n: int = 5, **options) -> str:
    """A short run with one tracker; returns what the console said."""
    out = io.StringIO()
    with Log(tmp_path, stream=out) as log:
        queued = Queued("t", sink, log.notice, **options)
        log.start({"a": 1}, total=n, sinks=[queued])
        for step in range(1, n + 1):
            log.step(step, {"loss": 1.0})
    assert steps(tmp_path) == list(range(1, n + 1))
    return out.getvalue()


def test_a_tracker_gets_everything_in_order(tmp_path):
    sink = Recorder()
    assert "tracker" not in run(tmp_path, sink)
    writes = [("write", step, {"loss": 1.0}) for step in range(1, 6)]
    assert sink.calls == [("start", {"a": 1}, 0), *writes, ("close",)]


@pytest.mark.parametrize("place", ["start", "write", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_notice(tmp_path, place):
    said = run(tmp_path, Recorder(fail=place))
    assert said.count("tracker t failed and is dropped, the run goes on: RuntimeError: no network") == 1
    assert said.count("tracker") == 1


def test_a_tracker_may_even_exit(tmp_path):
    assert "SystemExit: bye" in run(tmp_path, Recorder(fail="write", error=SystemExit("bye")))


@pytest.mark.parametrize("place", ["start", "write", "close"])
def test_a_tracker_that_hangs_is_left_behind(tmp_path, place):
    sink = Recorder(hang=place)
    said = run(tmp_path, sink, n=50, size=100 if place == "close" else 10, patience=0.1)
    assert said.count("did not finish within 0.1 s and is left behind") == 1
    assert said.count("too slow") == (place != "close")
    sink.release.set()


def test_a_slow_tracker_says_what_it_misses(tmp_path):
    sink = Recorder(hang="start")
    out: list[str] = []
    queued = Queued("t", sink, out.append, size=2)
    queued.start({}, 0)
    while not queued._queue.empty():
        time.sleep(0.001)
    for step in range(10):
        queued.write(step, {})
    sink.release.set()
    queued.close()
    assert [call[1] for call in sink.calls if call[0] == "write"] == [0, 1]
    assert out[-1] == "the tracker t misses 8 lines; metrics.jsonl has all of them"


def test_what_is_not_installed_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"wandb[\s\S]*pip install 'ft\[trackers\]'"):
        sinks.make(["wandb"], folder=tmp_path, project="p", name="n", notice=print)
    with pytest.raises(RecipeError, match="no tracker 'mlflow'"):
        sinks.make(["mlflow"], folder=tmp_path, project="p", name="n", notice=print)


def test_tensorboard_reads_what_we_write_also_after_resuming(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def attempt(first: int, last: int) -> None:
        out = io.StringIO()
        with Log(tmp_path, stream=out) as log:
            made = sinks.make(["tensorboard"], folder=tmp_path, project="p", name="n", notice=log.notice)
            log.start({"model": "m"}, total=9, step=first, sinks=made)
            for step in range(first + 1, last + 1):
                log.step(step, {"loss": step + first / 10, "eval/acc": 0.5})
        assert "tracker" not in out.getvalue()

    attempt(0, 4)
    attempt(2, 5)  # taken up from a checkpoint at step 2
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "eval/acc"}
    found = [(e.step, round(e.value, 3)) for e in events.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2), (5, 5.2)]
