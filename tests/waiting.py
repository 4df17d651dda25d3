"""What ranks wait for, and for how long, however long their processors are away meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.job_queue import JobQueue

LIMIT_SECONDS = 60.0


def waits() -> bool:
    """Whether a thread of this process waits for other ranks, in the engine or past it."""
    fast_paths = [queue.fast_path for queue in list(engine.queues)]
    return engine._drivers > 0 or any(path is not None and path.inside for path in fast_paths)


def needs_no_job(comm: MPI.Intracomm, queue: JobQueue, call: Callable[[], object]) -> bool:
    """Whether five times ``call`` can go past the engine on all ranks. Collective over ``comm``, ``queue``'s or not.

    Of some calls a rank may make a job, where another one was away meanwhile; not each time.
    """
    for _ in range(30):
        before = queue.count
        for _ in range(5):
            call()
        if not any(comm.allgather(queue.count - before)):
            return True
    return False


class SharedClock:
    """A clock of all ranks of ``comm``, for ``modules``. It stands still, but for what ``comes_last`` sets it on.

    ``folder`` is the same for all ranks. Collective.
    """

    def __init__(
        self, comm: MPI.Intracomm, folder: Path, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType
    ) -> None:
        path = folder / "clock"
        if comm.rank == 0:
            np.zeros(1 + comm.size, np.int64).tofile(path)
        comm.Barrier()
        self._rank, self._rounds = comm.rank, 0
        self._words: Any = np.memmap(path, np.int64, "r+")
        for module in modules:
            clock = SimpleNamespace(perf_counter=lambda: float(self._words[0]), monotonic=time.monotonic)
            monkeypatch.setattr(module, "time", clock)
            if hasattr(module, "waited"):  # by the native engine's own clock
                monkeypatch.setattr(module, "waited", lambda operation, came: float(self._words[0]) - came)

    def comes_last(self, late: int) -> None:
        """The rank ``late`` returns when all others wait for it in what they do next, a second later by the clock."""
        self._rounds += 1
        until = time.monotonic() + LIMIT_SECONDS

        def tell() -> None:
            while not waits() and time.monotonic() < until:
                time.sleep(1e-3)
            self._words[1 + self._rank] = self._rounds

        if self._rank != late:
            threading.Thread(target=tell, daemon=True).start()
            return
        self._words[1 + late] = self._rounds
        while (self._words[1:] < self._rounds).any() and time.monotonic() < until:
            time.sleep(1e-3)
        self._words[0] += 1
