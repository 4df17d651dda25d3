"""A rank of a trainer on MPI.COMM_WORLD is gone, late or interrupted: the others do not hang, and say which it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from run import launcher

pytestmark = [pytest.mark.single, pytest.mark.timeout(60)]

START = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
import bitring
comm = MPI.COMM_WORLD
last = comm.rank == comm.size - 1
def attempt(call, *arguments, **named):
    began = time.monotonic()
    try:
        call(*arguments, **named)
        print(f"rank {comm.rank} went on", flush=True)
    except BaseException as error:
        print(f"rank {comm.rank} {type(error).__name__} {error} after {time.monotonic() - began:.1f} s", flush=True)
        if isinstance(error, TimeoutError):
            time.sleep(2)  # a rank that ends at once is gone to one that has waited a little less
w = np.zeros(3000, np.float32)
def new(mode="sync", compression=None):
    optimizer = bitring.SGD(lr=0.1, momentum=0.9)
    return bitring.DataParallel({"w": w}, optimizer, comm=comm, mode=mode, compression=compression)
g = {"w": np.ones(3000, np.float32)}
def interrupted_after(seconds):
    def interrupt(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
"""

UNEQUAL = """
trainer = new({mode!r}, {compression!r})
trainer.step(g)
if not last:
    before = w.copy()
    attempt(trainer.step, g)
    print("unchanged" if np.array_equal(before, w) and trainer.steps == 1 else "changed", flush=True)
"""

SYNCHRONIZE = """
trainer = new("local")
trainer.step(g)
if last:
    os._exit(0)
attempt(trainer.synchronize)
"""

LATE = """
trainer = new()
trainer.step(g)
if last:
    time.sleep(8)
attempt(trainer.step, g)
os._exit(0)
"""

LATE_IN_THE_MIDDLE = """
trainer = new()
trainer.step(g)
if last:
    exchange = trainer._stepper.exchange
    trainer._stepper.exchange = lambda *arguments: (time.sleep(8), exchange(*arguments))[1]
before = w.copy()
attempt(trainer.step, g)
print("unchanged" if np.array_equal(before, w) and trainer.steps == 1 else "changed", flush=True)
os._exit(0)
"""

LATE_WITH_OTHERS_ALIVE = """
trainer = new()
trainer.step(g)
others = range(comm.size - 1)
if last:
    exchange = trainer._stepper.exchange
    trainer._stepper.exchange = lambda *arguments: ([comm.recv(source=r) for r in others], exchange(*arguments))[1]
before = w.copy()
attempt(trainer.step, g)
print("unchanged" if np.array_equal(before, w) and trainer.steps == 1 else "changed", flush=True)
if last:
    [comm.send(None, dest=r) for r in others]
else:
    comm.send(None, dest=comm.size - 1)
    comm.recv(source=comm.size - 1)
os._exit(0)
"""

LATE_AT_THE_START = """
if last:
    time.sleep(8)
attempt(new)
os._exit(0)
"""

INTERRUPTED = """
trainer = new()
trainer.step(g)
if last:
    time.sleep(4)
    os._exit(0)
interrupted_after(1)
attempt(trainer.step, g)
os._exit(0)
"""

ALL_INTERRUPTED = """
trainer = new()
trainer.step(g)
if last:
    time.sleep(1.5)
else:
    interrupted_after(1)
    attempt(trainer.step, g)
trainer.meet("save_checkpoint", None)
attempt(trainer.step, g)
"""

TRIALS: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "one step less": (
        UNEQUAL.format(mode="sync", compression=None),
        {},
        ["DeadRankError", "rank 2 is gone", "unchanged"],
    ),
    "one step less, compressed": (
        UNEQUAL.format(mode="sync", compression="onebit"),
        {},
        ["DataParallel.step (step 1)", "unchanged"],
    ),
    "gone before synchronize": (SYNCHRONIZE, {}, ["DataParallel.synchronize", "rank 2 is gone"]),
    "late": (
        LATE,
        {"BITRING_TIMEOUT": "2"},
        ["rank 0 TimeoutError rank 0 has waited ", " s in DataParallel.step", "come to it: [2]"],
    ),
    "late in the middle": (LATE_IN_THE_MIDDLE, {"BITRING_TIMEOUT": "2"}, ["rank 0 TimeoutError", "unchanged"]),
    "late when the others have given up": (
        LATE_WITH_OTHERS_ALIVE,
        {"BITRING_TIMEOUT": "2"},
        ["rank 0 TimeoutError", "rank 2 TimeoutError", "unchanged"],
    ),
    "late at the start": (LATE_AT_THE_START, {"BITRING_TIMEOUT": "2"}, ["rank 0 TimeoutError", "DataParallel"]),
    "interrupted": (INTERRUPTED, {}, ["rank 0 KeyboardInterrupt  after 1.", "rank 1 KeyboardInterrupt  after 1."]),
    "interrupted, then elsewhere": (
        ALL_INTERRUPTED,
        {},
        ["rank 0 KeyboardInterrupt", "rank 0 went on", "rank 1 went on", "rank 2 went on"],
    ),
}


@pytest.fixture(scope="module")
def under_way(clean_environment: Callable[..., dict[str, str]]) -> Iterator[dict[str, Future[str]]]:
    """All trials; they mostly wait, so several run at a time."""
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    told = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout if mpirun else ""
    alive = ["-disable-auto-cleanup"] if "HYDRA" in told else []

    def run(name: str) -> str:
        text, environment, _ = TRIALS[name]
        prefix, extra = launcher(3)
        done = subprocess.run(
            [prefix[0], *alive, *prefix[1:], sys.executable, "-c", START + text],
            env=clean_environment(**extra, **environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        return done.stdout + done.stderr

    with ThreadPoolExecutor(4) as pool:
        yield {name: pool.submit(run, name) for name in TRIALS}


@pytest.mark.parametrize("name", TRIALS)
def test_the_others_are_told(under_way: dict[str, Future[Any]], name: str) -> None:
    told = under_way[name].result()
    assert all(text in told for text in TRIALS[name][2]), told
    assert "\nchanged" not in told, told
