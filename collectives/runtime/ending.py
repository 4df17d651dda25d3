"""The end of taking part: at the process's exit, and in a child that it forks."""

from __future__ import annotations

import atexit
import os
import sys
import time

from mpi4py import MPI

from bitring.collectives.node import presence
from bitring.collectives.runtime import ports
from bitring.collectives.runtime.abort import end_all
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.keeping import never_free
from bitring.native import extension, native
from bitring.waited import Waited

_LAST_WORDS_SECONDS = 1.0

_FORKED = (
    "this process was forked after MPI started; use the 'spawn' or 'forkserver' start method, and import mpi4py inside "
    "main(), under if __name__ == '__main__': workers import the script, too, and must not start MPI"
)


def stop(why: str) -> None:
    """End the progress thread; later jobs raise ``why``. The others are told of what is left undone."""
    _say_last_words()
    engine.halt(why)
    _close_fast_paths()
    presence.leave()
    for queue in list(engine.queues):
        if queue.jobs or queue.wrecks:
            never_free((list(queue.jobs), queue.wrecks))
    for queue in engine.join():
        if queue.contact is not None:
            queue.contact.tell_quit()
    ports.leave()
    if not (engine.bereaved or engine.outlives) or MPI.Is_finalized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if not engine.outlives:
        end_all(MPI, 1)
    elif native() is None or not extension.end_before_library():
        os._exit(0)  # others that have not done their work may go on


def _say_last_words() -> None:
    """Go on for a moment, so that the others get words that no caller here waits for."""
    waited = Waited()
    for queue in list(engine.queues):
        while queue.last_word is not None and not queue.last_word.done and waited.look() < _LAST_WORDS_SECONDS:
            time.sleep(1e-3)


def _disable_in_child() -> None:
    """A forked child shares the parent's MPI connections and memory, and must not touch them."""
    engine.renew(_FORKED)
    _close_fast_paths()


def _close_fast_paths() -> None:
    """Close fast paths, so that their runs come to the engine, which refuses them."""
    for queue in engine.queues:
        queue.rest()


def register() -> None:
    """Install both, at exit and at fork."""
    atexit.register(stop, "the interpreter is exiting")
    os.register_at_fork(after_in_child=_disable_in_child)
