"""A command that all ranks end for a signal, to be run again: it says what there is to go on from, and how."""

from __future__ import annotations

import ctypes
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import NoReturn

import click
from mpi4py import MPI

from bitring.commands._ranks import meet
from bitring.exit_codes import ExitCode
from bitring.launcher import launch_words
from bitring.training.preemption import SIGNALS

_BEGINNINGS = {"--resume", "--fresh"}
"""Options that say from where to begin."""


class PreemptedError(Exception):
    """All ranks stop. ``kept`` says what there is to go on from; ``resume`` whether ``--resume`` does."""

    def __init__(self, kept: str, resume: bool) -> None:
        super().__init__(kept)
        self.resume = resume


def stop_for_now(comm: MPI.Intracomm, preempted: PreemptedError) -> NoReturn:
    """End the command on all ranks, which must all call this; rank 0 prints."""
    if comm.rank == 0:
        click.echo(f"\npreempted; {preempted}\ngo on with: {_command_line(comm.size, preempted.resume)}", err=True)
    sys.stdout.flush()
    meet(comm)  # a launcher may kill the other ranks when one has ended
    raise click.exceptions.Exit(ExitCode.SAVED)


def end_with_the_status() -> None:
    """Let a signal while the process ends change nothing: all is done and saved. A second one ends it at once.

    Handlers in Python are gone before the MPI library has ended, so this one is a function of C's that does nothing.
    """
    library = ctypes.CDLL(None)
    nothing = ctypes.cast(library.abs, ctypes.c_void_p)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
        if hasattr(library, "sysv_signal"):  # for one signal
            library.sysv_signal(int(number), nothing)


def _command_line(size: int, resume: bool) -> str:
    """The words to type to run the current command again on ``size`` ranks: as it was typed, or with ``--resume``."""
    arguments = sys.argv[1:]
    if resume:
        arguments = [*(word for word in arguments if word not in _BEGINNINGS), "--resume"]
    return shlex.join([*launch_words(size), *_program(), *arguments])


def _program() -> list[str]:
    """The word that was typed for ``bitring``."""
    typed = Path(sys.argv[0])
    if typed.name == "__main__.py":
        return [sys.executable, "-m", "bitring"]
    on_path = typed.name != "bitring" or shutil.which("bitring") == str(typed)
    return ["bitring" if on_path else str(typed)]
