"""A rank that dies or stops while a checkpoint is saved or loaded, and a disk that is only slow."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.single, pytest.mark.timeout(300)]

# One rank fails in the middle of a checkpoint, or rank 0's disk is slow. Each other rank leaves a file with its error.
FAULT = """
import functools, itertools, os, signal, sys, time
from pathlib import Path
import numpy as np
from mpi4py import MPI
import bitring
from bitring.collectives.runtime import watch
from bitring.collectives.runtime import pieces
from bitring.training.checkpoints import loading, saving

fault, call, at, victim, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
comm = MPI.COMM_WORLD
trainer = bitring.DataParallel(
    [np.zeros(1500), np.zeros((3, 700))], bitring.SGD(momentum=0.5), comm=comm, mode=bitring.Local(tau=1),
    compression="onebit",
)
trainer.step([np.full_like(w, trainer.rank + 1) for w in trainer.parameters.values()])
saving.split = loading.split = functools.partial(pieces.split, limit=16384)
bitring.save_checkpoint(folder / "run.npz", trainer)
os.environ["BITRING_TIMEOUT"] = "3"  # from now on: loading kernels may take long
watch.timeout.cache_clear()
calls, jointly = itertools.count(), saving.jointly

def failing(comm, function, work, *rest, **named):
    def works():
        if comm.rank == victim and fault == "slow":
            time.sleep(0.15)
        elif comm.rank == victim and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        return work()
    return jointly(comm, function, works, *rest, **named)

saving.jointly = loading.jointly = failing
(folder / f"pid-{comm.rank}").write_text(str(os.getpid()))
begin, error = time.monotonic(), None
try:
    (bitring.save_checkpoint if call == "save" else bitring.load_checkpoint)(folder / "run.npz", trainer)
except Exception as problem:
    error = problem
(folder / "partial").write_text(str([each.name for each in folder.glob("*.partial")]))
(folder / f"result-{comm.rank}.new").write_text(f"{time.monotonic() - begin} {type(error).__name__} {error}")
(folder / f"result-{comm.rank}.new").rename(folder / f"result-{comm.rank}")
sys.stdout.flush()
os._exit(0) if error else None
"""


# mpirun ends the others by signals when one has ended; it is bitring's own detection that is tested.
WRAPPER = ("sh", "-c", 'trap "" USR1; "$0" "$@" || exit 3')


def run_fault(
    on_ranks: Any, environment: Any, folder: Path, fault: str, call: str, at: int, victim: int
) -> list[tuple[float, str]]:
    """Seconds and error of each of three ranks that has ended."""
    mpirun = Path(sys.executable).with_name("mpirun")
    arguments = ["-c", FAULT, fault, call, str(at), str(victim), str(folder)]
    if fault == "slow":
        done = on_ranks(3, *arguments, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        survivors = [0, 1, 2]
    else:
        version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
        if not mpirun.exists() or "HYDRA" not in version.stdout.upper():
            pytest.skip("needs MPICH's launcher, which can be told to leave the other ranks alone")
        survivors = [rank for rank in range(3) if rank != victim]
        job = subprocess.Popen(
            [mpirun, "-disable-auto-cleanup", "-n", "3", *WRAPPER, sys.executable, *arguments],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + 250
            while time.monotonic() < until and not all((folder / f"result-{rank}").exists() for rank in survivors):
                time.sleep(0.15)
        finally:
            for rank in range(3):
                if (folder / f"pid-{rank}").exists():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    results = [(folder / f"result-{rank}").read_text().split(" ", 1) for rank in survivors]
    return [(float(seconds), text) for seconds, text in results]


FAULTS = [("stop", "save", 4, 1), ("kill", "load", 3, 0)]
MORE = [
    (fault, call, at, victim)
    for fault in ("stop", "kill")
    for call in ("save", "load")
    for at in (0, 2, 7)
    for victim in (0, 1)
]


@pytest.mark.parametrize(
    ("fault", "call", "at", "victim"), [*FAULTS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_a_rank_that_is_gone(on_ranks, clean_environment, tmp_path, fault, call, at, victim):
    """The others raise within the timeout, and name it where they can know."""
    results = run_fault(on_ranks, clean_environment, tmp_path, fault, call, at, victim)
    for seconds, text in results:
        assert text.split()[0] in ("TimeoutError", "PeerError", "DeadRankError"), text
        assert seconds < 60, (seconds, text)
    if victim != 0:
        assert not list(tmp_path.glob("*.partial"))


def test_a_slow_disk_is_no_rank_that_is_gone(on_ranks, clean_environment, tmp_path):
    """Rank 0 takes longer than the timeout for the whole, but not for a piece."""
    for seconds, text in run_fault(on_ranks, clean_environment, tmp_path, "slow", "save", 0, 0):
        assert seconds > 3, seconds
        assert text == "NoneType None"
