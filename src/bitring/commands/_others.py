"""Contenders of ``bitring bench allreduce`` outside its own processes and library: another job, and gloo."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from bitring.collectives.plan import library_reduces
from bitring.commands._other_level import OtherLevel
from bitring.commands._timing import Contender

LIBRARY = ("library", "library out of place")
"""The MPI library's own Allreduce: on MPI.IN_PLACE, and from one buffer to another; the thread level follows."""


class Others:
    """Contenders that are not in this process: the library at another thread level, and gloo.

    ``remarks`` says what could not be had, and why.
    """

    def __init__(self, comm: MPI.Intracomm, machine: Mapping[str, Any]) -> None:
        self.remarks: list[str] = []
        self.level = "multiple" if machine["thread_level"] == "single" else "single"
        self._comm = comm
        self._job: OtherLevel | None = None  # rank 0's
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._has_job = False
        self._gloo: Any = None
        self._torch: Any = None
        if machine["nodes"] > 1:
            self.remarks.append(f"no library at thread level {self.level}, no gloo: they are measured on one node only")
            return
        self._has_job = self._on_first(self._start) is None
        self._begin_gloo()

    def _on_first(self, action: Callable[[], Any]) -> Any:
        """Return the result of ``action`` on rank 0, while the other ranks sleep. Collective."""
        outcome = action() if self._comm.rank == 0 else None
        arrival = self._comm.Ibarrier()
        while not arrival.Test():
            time.sleep(1e-3)
        return self._comm.bcast(outcome)

    def _start(self) -> str | None:
        try:
            self._job = OtherLevel(self._comm.size, self.level)
        except OSError as error:
            self.remarks.append(f"no library at thread level {self.level}: {error}")
            return str(error)
        return None

    def _begin_gloo(self) -> None:
        gloo: Any = None
        with contextlib.suppress(ImportError):
            self._torch = importlib.import_module("torch")
            gloo = importlib.import_module("torch.distributed")
        if not self._comm.allreduce(gloo is not None and gloo.is_gloo_available(), MPI.LAND):
            self.remarks.append("no gloo: PyTorch is not installed")
            return
        if self._comm.rank == 0:
            self._folder = tempfile.TemporaryDirectory(prefix="bitring-")
        path = self._comm.bcast(None if self._folder is None else self._folder.name)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        assert gloo is not None
        gloo.init_process_group(
            "gloo", init_method=f"file://{path}/store", rank=self._comm.rank, world_size=self._comm.size
        )
        self._gloo = gloo

    def contenders(self, x: Any) -> list[Contender]:
        """Those that can reduce values such as ``x``. Collective."""
        found: list[Contender] = []
        if self._has_job and library_reduces(x, MPI.SUM):
            answer = self._on_first(lambda: self._prepare(x))
            self._has_job = answer is not None
            if answer is not None and not answer["right"]:
                raise RuntimeError(f"library, {self.level}: a wrong sum of {x.size} values")
            if answer is not None:
                found += [
                    Contender(f"{name}, {answer['level']}", _nothing, seconds=partial(self._sample, way))
                    for way, name in enumerate(LIBRARY)
                ]
        if self._gloo is not None and x.dtype == np.float32:
            found.append(Contender("gloo", partial(self._gloo.all_reduce, self._torch.from_numpy(x)), x, x))
        return found

    def _prepare(self, x: Any) -> Any:
        """The other job's word that it is ready for values such as ``x``; None: it is left out from now on."""
        assert self._job is not None
        try:
            return self._job.ask(n=x.size, dtype=x.dtype.name)
        except OSError as error:
            self.remarks.append(f"no library at thread level {self.level} from {x.nbytes} bytes on: {error}")
            click.echo(self.remarks[-1])
            self._job.close()
            self._job = None
            return None

    def _sample(self, way: int) -> float:
        def ask() -> Any:
            assert self._job is not None
            return self._job.ask(way=way)

        return float(self._on_first(ask))

    def close(self) -> None:
        """End what was started."""
        if self._job is not None:
            self._job.close()
        if self._gloo is not None:
            self._gloo.destroy_process_group()
        if self._folder is not None:
            self._folder.cleanup()


def _nothing() -> None:
    """Another job does it."""
