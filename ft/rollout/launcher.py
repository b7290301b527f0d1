"""Keeps a command from outliving its parent: ``python launcher.py PARENT_PID COMMAND...``.

Started as the leader of a session of its own. When the parent ends, whatever ended it, when this process is asked to
end, or when the command ends, every process of the group is killed: the command and all that it started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, _end)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: told when the parent ends
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
    try:
        status = subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()
        print(f"the server ended with {_ended(status)}", flush=True)
    except OSError as error:
        print(f"the server was not started: {error}", flush=True)
    _end(signal.SIGTERM, None)


def _end(number: int, frame: FrameType | None) -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _ended(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


if __name__ == "__main__":
    main()
