"""The MPI library's own AllReduce at another thread level: a job beside this one, asleep while others measure.

``python -m bitring.commands._other_level SOCKET`` is a rank of that job.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

_OURS = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "HYDRA_", "PRTE_")
"""Variables by which a process finds its job."""

_START_SECONDS = 90.0
"""On a machine that is busy with something else the start takes some of them."""
_ANSWER_SECONDS = 60.0
"""A library that takes longer for a few calls is not waited for: at level single, MPICH spins, whatever the cores."""


class OtherLevel:
    """A job of ``size`` ranks at thread level ``level`` on this machine. Raises OSError where it does not start."""

    def __init__(self, size: int, level: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bitring-")
        self._peers: list[Any] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start(size, level)
        except BaseException:
            self.close()
            raise

    def _start(self, size: int, level: str) -> None:
        path = str(Path(self._folder.name) / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(size)
            listener.settimeout(0.1)
            prefix, environment = _launcher(size)
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", __name__, path],
                env=environment | {"MPI4PY_RC_THREAD_LEVEL": level},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            until = time.monotonic() + _START_SECONDS
            while len(self._peers) < size:
                if self._process.poll() is not None:
                    raise OSError(f"{prefix[0]} ended with status {self._process.returncode}")
                if time.monotonic() > until:
                    raise OSError(f"{prefix[0]} has not started {size} ranks within {_START_SECONDS:.0f} s")
                with contextlib.suppress(TimeoutError):
                    connection = listener.accept()[0]
                    connection.settimeout(_ANSWER_SECONDS)
                    self._peers.append(connection.makefile("rw", encoding="utf-8"))
                    connection.close()

    def ask(self, **command: Any) -> Any:
        """The answer of the job's rank 0 to a command to all its ranks. Raises OSError when it is gone, or too slow."""
        answer = ""
        for peer in self._peers:
            peer.write(json.dumps(command) + "\n")
            peer.flush()
        for peer in self._peers:
            text = peer.readline()
            if not text:
                raise OSError("the job has ended")
            if text != "null\n":
                answer = text
        return json.loads(answer)

    def close(self) -> None:
        """End the job."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.close()
        if self._process is not None:
            try:
                self._process.wait(timeout=10 if self._peers else 0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()


def _launcher(size: int) -> tuple[list[str], dict[str, str]]:
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise FileNotFoundError(f"there is no mpirun beside {Path(sys.executable).name} nor on PATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    version = subprocess.run([mpirun, "--version"], env=environment, capture_output=True, text=True, timeout=60).stdout
    if "Open MPI" in version:
        if os.geteuid() == 0:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return [mpirun, "--oversubscribe", "--bind-to", "none", "-n", str(size)], environment
    return [mpirun, "-n", str(size)], environment


def _serve(path: str) -> None:
    """Do what is asked until nobody asks any more: buffers of a size, a sample of a call on them."""
    import numpy as np
    from mpi4py import MPI

    from bitring.commands._timing import calls_of, pattern, right_sum, seconds_of
    from bitring.machine import THREAD_LEVELS

    comm = MPI.COMM_WORLD
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        orders = connection.makefile("rw", encoding="utf-8")
    with orders:
        ways: list[Any] = []
        calls: list[int] = []
        for line in orders:
            command = json.loads(line)
            answer: Any
            if "n" in command:
                n, dtype = command["n"], np.dtype(command["dtype"])
                x, y = pattern(n, dtype, comm.rank), np.empty(n, dtype)
                ways = [partial(comm.Allreduce, MPI.IN_PLACE, x), partial(comm.Allreduce, x, y)]
                ways[1]()
                right = np.array_equal(y, right_sum(n, dtype, comm.size))
                x.fill(0)
                calls = [calls_of(comm, way) for way in ways]
                answer = {"right": comm.allreduce(right, MPI.LAND), "level": THREAD_LEVELS[MPI.Query_thread()]}
            else:
                way = command["way"]
                ways[way]()  # it has slept
                answer = comm.reduce(seconds_of(comm, ways[way], calls[way]), MPI.MAX)
            orders.write(json.dumps(answer if comm.rank == 0 else None) + "\n")
            orders.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
