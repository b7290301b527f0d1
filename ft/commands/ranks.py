"""``--nproc N``: the same command once per rank, under torch's own launcher, on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

GRACE = 600  # seconds the ranks get to save after a signal; the launcher's own 30 cut a large checkpoint short


def launch(arguments: Sequence[str], n: int) -> int:
    """Run ``ft *arguments`` on ``n`` ranks and wait. Returns the exit status of the rank that failed first, else 0;
    128 + the signal's number where a signal ended the launcher (it passes the signal on to the ranks)."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    parsed = run.parse_args(["--standalone", f"--nproc-per-node={n}", "-m", "ft", *arguments])
    if hasattr(parsed, "shutdown_timeout"):
        parsed.shutdown_timeout = GRACE
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    try:
        run.run(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(rank, failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _status(rank: int, exitcode: int) -> int:
    """A shell's exit status. A rank that a signal killed could say nothing, so it is said here."""
    if exitcode >= 0:
        return exitcode
    name = signal.Signals(-exitcode).name
    why = ": the machine may have run out of memory" if name == "SIGKILL" else ""
    print(f"error: rank {rank} was killed by {name}{why}", file=sys.stderr)
    return 128 - exitcode
