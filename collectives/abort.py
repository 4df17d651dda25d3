"""A rank that raises ends the job: without this, the other ranks wait for it, all night.

Once a process has taken part in a collective of more than one rank, an exception that nobody catches prints its
traceback with the rank's number and aborts all ranks, as ``python -m mpi4py`` does. ``BITRING_ABORT=0`` turns it off.
"""

from __future__ import annotations

import functools
import os
import sys
from types import TracebackType

from mpi4py import MPI


@functools.cache
def abort_on_exception() -> None:
    """Install the hook, once."""
    if MPI.COMM_WORLD.Get_size() == 1 or os.environ.get("BITRING_ABORT") == "0":
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(f"bitring: rank {MPI.COMM_WORLD.Get_rank()} raised; all ranks end", file=sys.stderr)
        before(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.COMM_WORLD.Abort(1)

    sys.excepthook = hook
