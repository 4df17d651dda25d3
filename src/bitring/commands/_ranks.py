"""The part that commands with MPI share: ranks that fail together, end together, and leave each other's cores alone."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from bitring.collectives.interop.mpi_library import library_version
from bitring.collectives.runtime.abort import abort_on_exception, end_all
from bitring.collectives.runtime.objects import allgather
from bitring.errors import MismatchError
from bitring.exit_codes import ExitCode
from bitring.launcher import alone_by_mistake
from bitring.nodes import thread_share

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

T = TypeVar("T")

_NAP_SECONDS = 1e-4
_SAID_SECONDS = 5.0
"""All ranks were interrupted, and rank 0 has so long to say what can be gone on from."""

# What a user's mistake raises. Anything else is a defect and deserves its traceback.
_MISTAKES = (ValueError, TypeError, OSError, ImportError)


def fail(comm: MPI.Intracomm, message: str, status: int = ExitCode.USAGE) -> NoReturn:
    """End the command on all ranks, which must all call this; rank 0 prints."""
    if comm.rank == 0:
        click.echo(f"Error: {message}", err=True)
    raise click.exceptions.Exit(status)


def refuse_if_alone() -> None:
    """End the command where several ranks were started that do not know each other: they would do the same work."""
    mistake = alone_by_mistake(MPI.COMM_WORLD.Get_size(), library_version())
    if mistake is not None:
        raise click.ClickException(mistake)  # which the first of them shows


def meet(comm: MPI.Intracomm) -> None:
    """A barrier whose ranks sleep: a library's own would spin on cores that others compute on. Collective."""
    arrival = comm.Ibarrier()
    while not arrival.Test():
        time.sleep(_NAP_SECONDS)


def together(comm: MPI.Intracomm, prepare: Callable[[], T]) -> T:
    """The result of ``prepare``. A mistake that any rank finds in it ends the command on all. Collective."""
    result: list[T] = []
    problem: str | None = None
    try:
        result.append(prepare())
    except _MISTAKES as error:
        problem = str(error) or type(error).__name__
    problems = allgather(comm, problem, "the preparation of this command")
    for rank, text in enumerate(problems):
        if text is not None:
            fail(comm, text if rank == 0 else f"rank {rank}: {text}")
    return result[0]


@contextlib.contextmanager
def ending_together(comm: MPI.Intracomm) -> Generator[None]:
    """Around a command's body: an exception on one rank, or Ctrl-C, ends all ranks; none waits for one that is gone."""
    abort_on_exception()
    _say_when_kernels_compile(comm)
    try:
        with _ctrl_c_kept():
            yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except KeyboardInterrupt:
        sys.stdout.flush()
        if comm.size > 1:
            if comm.rank != 0:
                time.sleep(_SAID_SECONDS)  # unless rank 0 ends all before, which has something to say
            end_all(MPI, ExitCode.INTERRUPTED)
        raise
    except OSError as error:  # of a file that one rank writes: a disk that is full, or a folder that is gone
        click.echo(f"Error: {error}", err=True)
        if comm.size > 1:
            end_all(MPI, ExitCode.FAILED)
        raise click.exceptions.Exit(ExitCode.FAILED) from None
    except Exception as error:
        if comm.size > 1:
            # Here, while the other ranks may still be waiting for this one.
            sys.excepthook(type(error), error, error.__traceback__)
        raise


class _Shown(logging.Handler):
    """Prints what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def _say_when_kernels_compile(comm: MPI.Intracomm) -> None:
    """Show log messages about them on rank 0 from now on: nothing else would be seen for up to a minute."""
    logger = logging.getLogger("bitring.kernels")
    if comm.rank == 0 and not logger.handlers:
        logger.addHandler(_Shown())
        logger.setLevel(logging.INFO)


@contextlib.contextmanager
def _ctrl_c_kept() -> Generator[None]:
    """Within: a KeyboardInterrupt that Python drops, as it does in a finalizer, is raised again just after it."""
    before = sys.unraisablehook
    main = threading.main_thread().ident
    assert main is not None

    def again(dropped: UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            before(dropped)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


def limit_threads(comm: MPI.Intracomm) -> int:
    """Keep NumPy's linear algebra to this rank's share of the cores, for good. Collective; returns the share."""
    share = thread_share(comm)
    threadpool_limits(limits=share)
    return share


def same_everywhere(comm: MPI.Intracomm, what: str, value: str) -> None:
    """Raise MismatchError on all ranks unless all have the same ``value``. Collective."""
    values = allgather(comm, value, what)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise MismatchError(f"{what} differ: rank {rank} has {other}, rank 0 has {values[0]}")
