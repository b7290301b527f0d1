"""One run at a time in a folder, and only the run that began there. Locks are tested with real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ft.errors import CheckpointError, RunFolderError
from ft.io import lock, runfolder
from ft.io.runfolder import RunLock, claim, open_run

HOLD = """
import sys, os, time
from pathlib import Path
from ft.io.runfolder import RunLock
with RunLock(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(folder: Path, *options: str) -> Iterator[subprocess.Popen]:
    """A process, in a group of its own, that holds the folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *options], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def lock_file(folder: Path, **changes) -> Path:
    """A lock left by somebody who did not clear it."""
    holder = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": 1, "since": "yesterday", **changes}
    (folder / "run.lock").write_text(json.dumps(holder))
    return folder / "run.lock"


# --- the lock


def test_a_second_run_is_refused_by_name_and_a_killed_one_is_taken_over(tmp_path):
    with held(tmp_path) as child:
        with pytest.raises(RunFolderError, match=rf"process {child.pid} on {socket.gethostname()}, since 20"):
            RunLock(tmp_path).__enter__()
        child.kill()
        child.wait()
        said: list[str] = []
        with RunLock(tmp_path, notice=said.append):
            assert str(child.pid) in said[0] and "taking over" in said[0]
    with RunLock(tmp_path, notice=lambda text: pytest.fail(text)):
        pass  # the last holder left properly: nothing to say


def test_a_child_that_outlives_its_run_is_explained(tmp_path):
    with held(tmp_path, "fork") as child:
        child.kill()
        child.wait()
        with pytest.raises(RunFolderError, match="a process it started still holds"):
            RunLock(tmp_path).__enter__()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with RunLock(tmp_path), pytest.raises(RunFolderError, match=f"process {os.getpid()}"):
        RunLock(tmp_path).__enter__()


def test_a_holder_on_another_host_counts_while_it_shows_signs_of_life(tmp_path):
    path = lock_file(tmp_path, host="elsewhere")
    with pytest.raises(RunFolderError, match=r"on elsewhere.*sign of life"):
        RunLock(tmp_path).__enter__()
    os.utime(path, (time.time() - 1000, time.time() - 1000))
    said: list[str] = []
    with RunLock(tmp_path, notice=said.append):
        assert "elsewhere" in said[0]


def test_a_held_lock_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLock, "BEAT", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / "run.lock", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / "run.lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "run.lock").stat().st_mtime > 0


@pytest.mark.parametrize(("ticks", "refused"), [(0, True), (1, False)])
def test_without_kernel_locks_the_start_time_tells_a_reused_pid(tmp_path, monkeypatch, ticks, refused):
    monkeypatch.setattr(lock, "_flock", lambda fd: None)
    started = lock.process_start(os.getppid())
    assert started is not None
    lock_file(tmp_path, pid=os.getppid(), started=started + ticks)
    if refused:
        with pytest.raises(RunFolderError):
            RunLock(tmp_path).__enter__()
    else:
        with RunLock(tmp_path, notice=lambda text: None):
            pass


def test_a_lock_file_cut_short_is_no_obstacle(tmp_path):
    (tmp_path / "run.lock").write_text('{"host": "el')
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_text() == ""


# --- opening

RECIPE = {
    "model": {"id": "m", "checkpointing": True},
    "optim": {"lr": 2e-4, "betas": [0.9, 0.999]},
    "schedule": {"kind": "Cosine", "warmup": 0.03},
    "batch": {"examples": 32, "tokens": 8192},
    "save": {"every": 100, "dir": None},
    "steps": 100,
}


def begin(folder: Path, *, recipe: dict = RECIPE, fingerprint: str = "f1", resume: bool = False, saved: bool = True):
    said: list[str] = []
    opened = open_run(folder, resume=resume, recipe=recipe, fingerprint=fingerprint, notice=said.append)
    if saved:
        (folder / "step-000010").mkdir(exist_ok=True)
    return opened, said


def changed(path: str, value: object) -> dict:
    recipe = json.loads(json.dumps(RECIPE))
    *parents, leaf = path.split(".")
    part = recipe
    for name in parents:
        part = part[name]
    part[leaf] = value
    return recipe


def test_a_fresh_folder(tmp_path):
    with RunLock(tmp_path / "a" / "b"):
        opened, said = begin(tmp_path / "a" / "b")
    assert (opened.attempt, opened.resume, said) == (1, False, [])
    assert json.loads((opened.folder / "recipe.json").read_text()) == RECIPE
    run = json.loads((opened.folder / "run.json").read_text())
    first = run["attempts"][0]
    assert run["data"] == "f1" and first["command"] == sys.argv and "torch" in first["versions"]
    assert "environ" not in first


def test_an_occupied_folder_names_three_ways_out(tmp_path):
    begin(tmp_path)
    for attempt in (lambda: begin(tmp_path), lambda: claim(tmp_path, resume=False)):
        with pytest.raises(RunFolderError, match=r"occupied[\s\S]*--resume[\s\S]*save\.dir[\s\S]*delete"):
            attempt()
    claim(tmp_path, resume=True)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(RunFolderError, match=r"thesis\.tex"):
            begin(tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_an_attempt_leaves_that_failed_on_its_data_is_no_obstacle(tmp_path):
    for name in ("run.lock", "bad_rows.jsonl", "ft-error-20260101-000000.log", "recipe.json.tmp-77"):
        (tmp_path / name).write_text("")
    assert begin(tmp_path)[0].attempt == 1


def test_what_a_run_writes_between_claim_and_opening_is_its_own(tmp_path):
    claim(tmp_path, resume=False)
    (tmp_path / "anything").write_text("")
    assert open_run(tmp_path, resume=False, recipe=RECIPE, fingerprint="f", claimed=True).attempt == 1


def test_resume_counts_attempts_and_announces_free_changes(tmp_path):
    begin(tmp_path)
    opened, said = begin(tmp_path, recipe=changed("steps", 200), resume=True)
    assert (opened.attempt, opened.resume) == (2, True)
    assert said == ["recipe changed since the last attempt: steps: 100 -> 200"]
    assert json.loads((tmp_path / "recipe.json").read_text())["steps"] == 200
    opened, said = begin(tmp_path, recipe=changed("steps", 200), resume=True)
    assert (opened.attempt, said) == (3, [])


@pytest.mark.parametrize(
    ("path", "value"),
    [("save.every", 7), ("batch.tokens", 64), ("model.checkpointing", False), ("save.dir", "elsewhere")],
)
def test_these_may_change(tmp_path, path, value):
    begin(tmp_path)
    begin(tmp_path, recipe=changed(path, value), resume=True)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.lr", 0.001, r"optim\.lr: 0\.0002 -> 0\.001"),
        ("optim.betas", [0.9, 0.95], r"optim\.betas: \[0\.9, 0\.999\] -> \[0\.9, 0\.95\]"),
        ("batch.examples", 64, r"batch\.examples: 32 -> 64"),
        ("schedule.kind", "Linear", r'schedule\.kind: "Cosine" -> "Linear"'),
        ("stepsize", 1, r"stepsize: null -> 1"),  # a free name is not a free prefix
        ("model.id", "n", r'model\.id: "m" -> "n"'),
    ],
)
def test_these_may_not_change(tmp_path, path, value, message):
    begin(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        begin(tmp_path, recipe=changed(path, value), resume=True)
    assert json.loads((tmp_path / "recipe.json").read_text()) == RECIPE


def test_changed_data_is_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(CheckpointError, match=r"data is not what this run began with[\s\S]*f1[\s\S]*f2"):
        begin(tmp_path, fingerprint="f2", resume=True)


def test_an_attempt_without_a_checkpoint_is_started_over_and_kept_on_record(tmp_path):
    begin(tmp_path, saved=False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    opened, said = begin(tmp_path, recipe=changed("optim.lr", 0.1), fingerprint="f2", saved=False)
    assert (opened.attempt, opened.resume) == (2, False)
    assert "starting over" in said[0]
    assert (tmp_path / "metrics.attempt-1.jsonl").read_text() == '{"step": 1}\n'
    assert not (tmp_path / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "run.json").read_text())["data"] == "f2"


def test_resuming_nothing_starts_and_says_so(tmp_path):
    opened, said = begin(tmp_path, resume=True)
    assert not opened.resume and "nothing to resume" in said[0]


@pytest.mark.parametrize("name", ["run.json", "recipe.json"])
def test_checkpoints_without_their_record_are_not_resumed(tmp_path, name):
    begin(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RunFolderError, match=name):
        begin(tmp_path, resume=True)


def test_git_commit(tmp_path):
    assert runfolder.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert runfolder.git_commit(tmp_path) == head
    (tmp_path / "f").write_text("2")
    assert runfolder.git_commit(tmp_path) == head + "-dirty"
