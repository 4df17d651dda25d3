"""A rank that raises ends the job: without this, the other ranks wait for it, all night.

``import bitring`` installs the hook, without starting MPI, so that it holds while a rank loads its data, too. Once MPI
runs with more than one rank, an exception that nobody catches prints its traceback with the rank's number and aborts
all ranks, as ``python -m mpi4py`` does; except where others can go on without it, which are told
(``instead_of_abort``). ``BITRING_ABORT=0`` turns it off. It is for the main thread: an exception ends
another thread, but not the process, which may go on without it. ``sys.exit`` is no exception that nobody catches.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

instead_of_abort: list[Callable[[BaseException], bool]] = []
"""What a rank says to others, which go on without it, before it ends after an exception; whether it has said it."""

_installed: Any = None
_forked = False


def abort_on_exception() -> None:
    """Install the hook before the one that is there, which is called where this one has nothing to do."""
    global _installed
    before = sys.excepthook
    if before is _installed:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _forked:
            before(kind, error, trace)
            _end_child(1 if issubclass(kind, Exception) else 130)
        mpi = None if os.environ.get("BITRING_ABORT") == "0" else _running_mpi()
        if mpi is None:
            before(kind, error, trace)
            return
        rank = mpi.COMM_WORLD.Get_rank()
        sys.stdout.flush()
        if before is sys.__excepthook__:
            # One write, each line marked: ranks that raise together must stay legible.
            lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
        else:
            before(kind, error, trace)
            lines = ["".join(traceback.format_exception_only(kind, error)).splitlines()[-1], "all ranks are ended"]
        sys.stderr.write("".join(f"[rank {rank}] {line}\n" for line in lines))
        sys.stderr.flush()
        said = [say(error) for say in list(instead_of_abort)]
        if any(said):
            return
        time.sleep(0.2)  # a launcher may drop what it has not read from the ranks by then
        mpi.COMM_WORLD.Abort(1)

    _installed = sys.excepthook = hook


def _running_mpi() -> Any:
    """mpi4py's module, where MPI runs with more than one rank; else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.Get_size() == 1:
        return None
    return mpi


def _end_child(status: int) -> None:
    """End a forked child as an exception does, but not the MPI library, in which its parent goes on.

    mpi4py would: what the child says to the launcher then passes for the word of its parent, which is ended for it, or
    waits for ever.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _in_child() -> None:
    # A forked child's error is its parent's business: it must not end the job.
    global _forked
    _forked = _forked or _running_mpi() is not None


os.register_at_fork(after_in_child=_in_child)
