"""One run at a time in a folder: run.lock says who is in it (host, pid, start time), and is empty when nobody is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from attrs import asdict, frozen

from ft.errors import RunFolderError

LOCK = "run.lock"
Notice = Callable[[str], None]


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@frozen(kw_only=True)
class Holder:
    """A process, told apart from a later one with the same pid by its start time (clock ticks since boot)."""

    host: str
    pid: int
    started: int
    since: str

    @staticmethod
    def me() -> Holder:
        pid = os.getpid()
        return Holder(host=socket.gethostname(), pid=pid, started=process_start(pid) or 0, since=now())

    def alive(self) -> bool:
        """Whether it still runs; only to be asked on its own host."""
        started = process_start(self.pid)
        return started is not None and (not self.started or started == self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; 0 where the system does not tell; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[19])  # field 22; the name in parentheses may hold spaces
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _exists(pid)
    except ProcessLookupError:
        return None


def _exists(pid: int) -> int | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it exists and is another user's
    return 0


class RunLock:
    """Holds a run folder for this process while the ``with`` block lasts.

    On one machine the kernel's file lock decides, which dies with its process. Network file systems may not share
    it between machines, so a holder on another host counts as alive until its lock file has been untouched for
    ``STALE`` seconds; a thread touches ours every ``BEAT`` seconds.

    Raises:
        RunFolderError: names who holds the folder.
    """

    BEAT, STALE = 20.0, 180.0

    def __init__(self, folder: Path, *, notice: Notice = to_stderr):
        self.path = folder / LOCK
        self.notice = notice
        self._fd = -1
        self._stop = threading.Event()

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            free = _flock(self._fd)
            self._judge(_holder(os.read(self._fd, 4096)), free)
            self._write(json.dumps(asdict(Holder.me())).encode())
        except BaseException:
            os.close(self._fd)
            raise
        self._stop.clear()
        threading.Thread(target=self._beat, daemon=True, name="run-lock").start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._write(b"")  # emptied, not removed: a file that is removed can be locked twice
        os.close(self._fd)

    def _judge(self, holder: Holder | None, free: bool | None) -> None:
        """``free`` is what the kernel says of its lock; None where the file system has none."""
        if free is False:
            raise self._refusal(holder)
        if holder is None:
            return
        if holder.host == socket.gethostname():
            if free is None and holder.alive():
                raise self._refusal(holder)
        elif (age := time.time() - os.fstat(self._fd).st_mtime) < self.STALE:
            raise self._refusal(holder, f"; its last sign of life is {max(age, 0):.0f} s old")
        self.notice(f"the run folder was left locked by {holder}, which is gone; taking over")

    def _refusal(self, holder: Holder | None, more: str = "") -> RunFolderError:
        who = str(holder) if holder else "another process"
        if holder and holder.host == socket.gethostname() and not holder.alive():
            more = " (gone itself, but a process it started still holds the folder)"
        return RunFolderError(
            "another run is using this folder",
            where=str(self.path.parent),
            got=who + more,
            fix="wait for it or stop it, or choose another folder with save.dir",
        )

    def _write(self, text: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)

    def _beat(self) -> None:
        while not self._stop.wait(self.BEAT):
            try:
                os.utime(self.path)
            except OSError as error:
                self.notice(f"cannot touch {self.path}: {error}; a run on another host may take this one for dead")
                return


def _flock(fd: int) -> bool | None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
    return True


def _holder(text: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(text)) if text.strip() else None
    except (ValueError, TypeError):  # killed while writing it: held by nobody whom we can name
        return None
