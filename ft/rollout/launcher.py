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

    def told(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM or os.getppid() != parent:  # else it was only the thread that started this
            os.killpg(os.getpgrp(), signal.SIGKILL)

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGUSR1, told)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG: sent when the parent, or its thread, ends
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
    try:
        status = subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()
        print(f"the server ended with {_ended(status)}", flush=True)
    except OSError as error:
        print(f"the server was not started: {error}", flush=True)
    told(signal.SIGTERM, None)


def _ended(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


if __name__ == "__main__":
    main()
