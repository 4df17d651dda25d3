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

pytestmark = pytest.mark.single

START = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
import bitring
from bitring.collectives.runtime import watch
comm = MPI.COMM_WORLD
others, end = range(comm.size - 1), comm.size - 1
last = comm.rank == end
def attempt(call, *arguments, **named):
    began = time.monotonic()
    try:
        call(*arguments, **named)
        print(f"rank {comm.rank} went on", flush=True)
    except BaseException as error:
        print(f"rank {comm.rank} {type(error).__name__} {error} after {time.monotonic() - began:.1f} s", flush=True)
w = np.zeros(3000, np.float32)
def new(mode="sync", compression=None):
    optimizer = bitring.SGD(lr=0.1, momentum=0.9)
    return bitring.DataParallel({"w": w}, optimizer, comm=comm, mode=mode, compression=compression)
g = {"w": np.ones(3000, np.float32)}
def interrupted(call, *arguments):
    def interrupt(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    call(*arguments)
def limited():  # from now on; whoever is away for less than 3 s has time to answer
    watch._ANSWER_SECONDS = 3.0
    os.environ["BITRING_TIMEOUT"] = "6"
    watch.timeout.cache_clear()
def late():  # the last rank, in no call of bitring's, until the others have told it that they have given up
    [comm.recv(source=r) for r in others]
    [comm.send(None, dest=r) for r in others]
def given_up():
    comm.send(None, dest=end)
    comm.recv(source=end)
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
limited()
if last:
    late()
attempt(trainer.step, g)
if not last:
    given_up()
os._exit(0)
"""

LATE_IN_THE_MIDDLE = """
trainer = new()
trainer.step(g)
limited()
if last:
    usual, hurry = trainer._stepper._usual, trainer._stepper._usual.hurry
    assert usual.may_hurry
    usual.hurry = lambda *arguments: (hurry(*arguments), late())[0]
before = w.copy()
attempt(trainer.step, g)
print("unchanged" if np.array_equal(before, w) and trainer.steps == 1 else "changed", flush=True)
if not last:
    given_up()
os._exit(0)
"""

LATE_WITH_OTHERS_ALIVE = """
trainer = new()
trainer.step(g)
limited()
if last:
    usual, hurry = trainer._stepper._usual, trainer._stepper._usual.hurry
    assert usual.may_hurry
    usual.hurry = lambda *arguments: (hurry(*arguments), [comm.recv(source=r) for r in others])[0]
before = w.copy()
attempt(trainer.step, g)
print("unchanged" if np.array_equal(before, w) and trainer.steps == 1 else "changed", flush=True)
if last:
    [comm.send(None, dest=r) for r in others]
else:
    given_up()
os._exit(0)
"""

LATE_AT_THE_START = """
limited()
if last:
    late()
attempt(new)
if not last:
    given_up()
os._exit(0)
"""

INTERRUPTED = """
trainer = new()
trainer.step(g)
if last:
    late()
else:
    attempt(interrupted, trainer.step, g)
    given_up()
os._exit(0)
"""

ALL_INTERRUPTED = """
trainer = new()
trainer.step(g)
if last:
    late()
else:
    attempt(interrupted, trainer.step, g)
    given_up()
trainer.meet("save_checkpoint", None)
attempt(trainer.step, g)
"""

TRIALS: dict[str, tuple[str, list[str]]] = {
    "one step less": (
        UNEQUAL.format(mode="sync", compression=None),
        ["DeadRankError", "rank 2 is gone", "unchanged"],
    ),
    "one step less, compressed": (
        UNEQUAL.format(mode="sync", compression="onebit"),
        ["DataParallel.step (step 1)", "unchanged"],
    ),
    "gone before synchronize": (SYNCHRONIZE, ["DataParallel.synchronize", "rank 2 is gone"]),
    "late": (
        LATE,
        ["rank 0 TimeoutError rank 0 has waited ", " s in DataParallel.step", "come to it: [2]"],
    ),
    "late in the middle": (LATE_IN_THE_MIDDLE, ["rank 0 TimeoutError", "unchanged"]),
    "late when the others have given up": (
        LATE_WITH_OTHERS_ALIVE,
        ["rank 0 TimeoutError", "rank 2 TimeoutError", "unchanged"],
    ),
    "late at the start": (LATE_AT_THE_START, ["rank 0 TimeoutError", "DataParallel"]),
    "interrupted": (INTERRUPTED, ["rank 0 KeyboardInterrupt  after", "rank 1 KeyboardInterrupt  after"]),
    "interrupted, then elsewhere": (
        ALL_INTERRUPTED,
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
        text, _ = TRIALS[name]
        prefix, extra = launcher(3)
        done = subprocess.run(
            [prefix[0], *alive, *prefix[1:], sys.executable, "-c", START + text],
            env=clean_environment(**extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        return done.stdout + done.stderr

    with ThreadPoolExecutor(4) as pool:
        yield {name: pool.submit(run, name) for name in TRIALS}


@pytest.mark.parametrize("name", TRIALS)
def test_the_others_are_told(under_way: dict[str, Future[Any]], name: str) -> None:
    told = under_way[name].result()
    assert all(text in told for text in TRIALS[name][1]), told
    assert "\nchanged" not in told, told
