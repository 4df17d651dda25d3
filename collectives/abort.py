"""A rank that raises ends the job: without this, the other ranks wait for it, all night.

Once a process has taken part in a collective of more than one rank, an exception that nobody catches prints its
traceback with the rank's number and aborts all ranks, as ``python -m mpi4py`` does. ``BITRING_ABORT=0`` turns it off.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from types import TracebackType

from mpi4py import MPI


@functools.cache
def abort_on_exception() -> None:
    """Install the hook, once."""
    if MPI.COMM_WORLD.Get_size() == 1 or os.environ.get("BITRING_ABORT") == "0":
        return
    before = sys.excepthook
    sys.excepthook = _report_and_abort
    # A forked child's error is its parent's business: it must not end the job.
    os.register_at_fork(after_in_child=lambda: setattr(sys, "excepthook", before))


def _report_and_abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    rank = MPI.COMM_WORLD.Get_rank()
    lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
    sys.stdout.flush()
    # One write, each line marked: ranks that raise together must stay legible.
    sys.stderr.write("".join(f"[rank {rank}] {line}\n" for line in lines))
    sys.stderr.flush()
    if MPI.Is_initialized() and not MPI.Is_finalized():
        time.sleep(0.2)  # a launcher may drop what it has not read from the ranks by then
        MPI.COMM_WORLD.Abort(1)
