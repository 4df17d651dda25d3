"""A rank that raises ends the job within seconds, and its traceback says which rank it was."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from run import launcher

from bitring.collectives.runtime.abort import end_all

pytestmark = pytest.mark.single

START = """
import os, sys, time
import numpy as np
from mpi4py import MPI
from bitring.collectives.communicator import Communicator
comm = Communicator(MPI.COMM_WORLD, algorithm="ring")
x = np.ones(1000)
comm.Allreduce(MPI.IN_PLACE, x)
"""


def run(clean_environment, text: str, ranks: int = 3, **environment: str):
    prefix, extra = launcher(ranks)
    begun = time.monotonic()
    done = subprocess.run(
        [*prefix, sys.executable, "-c", START + text],
        env=clean_environment(**extra, **environment),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return done, time.monotonic() - begun


@pytest.mark.parametrize(
    "wait",
    [
        "comm.Allreduce(MPI.IN_PLACE, x)",
        "comm.Iallreduce(MPI.IN_PLACE, x).Wait()",
        "MPI.COMM_WORLD.Barrier()",
        "time.sleep(100)",
    ],
)
def test_one_rank_raises_while_the_others_wait(clean_environment, wait: str):
    done, seconds = run(clean_environment, f"if comm.rank == 1: raise KeyError('lost my data')\n{wait}\n")
    assert done.returncode != 0
    assert "[rank 1] Traceback (most recent call last):" in done.stderr
    assert "[rank 1] KeyError: 'lost my data'" in done.stderr
    assert "[rank 0] " not in done.stderr
    assert seconds < 60


def test_ranks_that_raise_together_stay_legible(clean_environment):
    done, seconds = run(clean_environment, "comm.Allreduce(MPI.IN_PLACE, np.zeros(5 + (comm.rank == 2)))\n")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "MismatchError: " in line]
    assert told
    for line in told:
        rank = line.split("]")[0][-1]
        name = "bitring.errors.MismatchError"
        assert line.startswith(
            f"[rank {rank}] {name}: Allreduce: ranks disagree on count: rank 2 gave 6, rank 0 gave 5"
        )
    assert seconds < 60


def test_it_can_be_turned_off(clean_environment):
    text = "if comm.rank == 1: raise KeyError('lost')\nprint('survived', flush=True)\n"
    done, _ = run(clean_environment, text, 2, BITRING_ABORT="0")
    assert "survived" in done.stdout
    assert "[rank 1]" not in done.stderr
    assert "KeyError: 'lost'" in done.stderr


def test_one_rank_alone_and_a_forked_child_raise_as_usual(clean_environment):
    done, _ = run(clean_environment, "raise KeyError('lost')\n", 1)
    assert done.returncode == 1
    assert "[rank" not in done.stderr
    text = """
child = os.fork()
if child == 0:
    raise KeyError('the child lost it')
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
comm.Allreduce(MPI.IN_PLACE, x)
print('well', flush=True)
"""
    done, _ = run(clean_environment, text, 2)
    assert "KeyError: 'the child lost it'" in done.stderr
    assert "[rank" not in done.stderr
    assert (done.returncode, done.stdout.count("well")) == (0, 2), done.stderr  # the child has left MPI to its parent


def test_a_program_that_ends_well_is_left_alone(clean_environment):
    done, _ = run(clean_environment, "print('over')\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over") == 3


LOADING = """
import os, sys, threading, time
import bitring
from mpi4py import MPI
rank = MPI.COMM_WORLD.Get_rank()
"""
WAITING = "import numpy as np\nbitring.allreduce(np.ones(3))\n"


def load(clean_environment, text: str):
    prefix, extra = launcher(2)
    return subprocess.run(
        [*prefix, sys.executable, "-c", text],
        env=clean_environment(**extra),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_a_rank_that_raises_before_the_first_collective(clean_environment):
    done = load(clean_environment, f"{LOADING}if rank == 1: raise KeyError('lost my data')\n{WAITING}")
    assert done.returncode != 0
    assert "[rank 1] KeyError: 'lost my data'" in done.stderr
    assert "[rank 0] " not in done.stderr


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_the_program_s_own_is_called(clean_environment, when: str):
    mine = "import sys\nsys.excepthook = lambda kind, error, trace: print('mine:', error, flush=True)\n"
    text = f"{WAITING}if rank == 1: raise KeyError('lost')\n{WAITING}"
    done = load(clean_environment, mine + LOADING + text if when == "before" else LOADING + mine + text)
    assert done.returncode != 0
    assert "mine: 'lost'" in done.stdout
    assert "[rank 1] KeyError: 'lost'\n[rank 1] all ranks are ended" in done.stderr


def test_a_thread_that_raises_does_not_end_the_others(clean_environment):
    text = f"""{LOADING}
def fail(): raise KeyError('lost')
thread = threading.Thread(target=fail)
thread.start()
thread.join()
{WAITING}print('well', flush=True)
"""
    done = load(clean_environment, text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("well") == 2


def test_a_forked_child_that_raises_before_the_first_collective(clean_environment, tmp_path):
    # What two ranks write to one pipe runs into each other.
    text = f"""{LOADING}
os.dup2(os.open({str(tmp_path)!r} + f"/{{rank}}", os.O_WRONLY | os.O_CREAT), 2)
if os.fork() == 0:
    raise KeyError('the child lost it')
os.wait()
{WAITING}print('well', flush=True)
"""
    done = load(clean_environment, text)
    for rank in range(2):
        assert "KeyError: 'the child lost it'" in (tmp_path / f"{rank}").read_text(), done.stderr
    assert (done.returncode, done.stdout.count("well")) == (0, 2), done.stderr


def test_all_are_ended_when_the_launcher_has_read_what_was_said(monkeypatch):
    reader, writer = os.pipe()
    events: list[Any] = []

    def read() -> None:
        time.sleep(0.5)
        events.append(os.read(reader, 100))

    world = SimpleNamespace(Abort=events.append)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        print("words", file=sys.stderr, flush=True)
        thread = threading.Thread(target=read)
        thread.start()
        end_all(SimpleNamespace(COMM_WORLD=world), 3)
        thread.join()
    os.close(reader)
    assert events == [b"words\n", 3]
