"""A rank that raises ends the job: without this, the other ranks wait for it, all night.

``import bitring`` installs the hook, without starting MPI, so that it holds while a rank loads its data, too. Once MPI
runs with more than one rank, an exception that nobody catches prints its traceback with the rank's number and aborts
all ranks, as ``python -m mpi4py`` does; except where others can go on without it, which are told
(``instead_of_abort``). ``BITRING_ABORT=0`` turns it off. It is for the main thread: an exception ends
another thread, but not the process, which may go on without it. ``sys.exit`` is no exception that nobody catches.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import os
import stat
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from bitring.errors import DeadRankError

instead_of_abort: list[Callable[[BaseException], bool]] = []
"""What a rank says to others, which go on without it, before it ends after an exception; whether it has said it."""

_ENDED_SECONDS = 2.0
"""Before a rank says that another is gone: most often that one has said why, and the launcher is about to end all."""

_READ_SECONDS = 10.0
"""For so long at most a rank that ends all waits for the launcher to read what it has said."""

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
        if issubclass(kind, DeadRankError):
            time.sleep(_ENDED_SECONDS)
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
        end_all(mpi, 1)

    _installed = sys.excepthook = hook


def end_all(mpi: Any, status: int) -> None:
    """End all ranks, once the launcher has read what this one has said: it may drop what it has not read by then."""
    until = time.monotonic() + _READ_SECONDS
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream of Python's, or one that is closed
            stream.flush()
            while _unread(stream.fileno()) and time.monotonic() < until:
                time.sleep(0.01)
    time.sleep(0.2)  # it has read, and is to pass it on
    mpi.COMM_WORLD.Abort(status)


def _unread(fd: int) -> int:
    """The bytes in a pipe that its reader has not read; 0 where it is no pipe."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return 0
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


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
