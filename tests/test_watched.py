"""Every wait of bitring's own is watched and can be interrupted, whatever communicator it is in."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from run import launcher
from waiting import waits

from bitring.collectives.allreduce import allreduce
from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.collectives.runtime.watch import ADVICE

LATE = """
import os, sys, time
import numpy as np
from mpi4py import MPI
import bitring
from bitring.collectives.runtime import watch
from bitring.collectives.runtime.objects import allgather
x = np.ones(10, np.float32)
calls = {
    "allreduce": lambda comm: bitring.allreduce(x, comm=comm),
    "plan_allreduce": lambda comm: bitring.plan_allreduce(x, comm=comm),
    "plan_allreduce ": lambda comm: bitring.plan_allreduce(x, comm=comm, compression="onebit"),
    "empty": lambda comm: bitring.Communicator(comm).empty(5),
    "this": lambda comm: allgather(comm, 1, "this"),
}
new = {(used, name): MPI.COMM_WORLD.Dup() for used in (False, True) for name in calls}
for (used, name), comm in new.items():
    if used:
        calls[name](comm)
MPI.COMM_WORLD.Barrier()
if MPI.COMM_WORLD.Get_rank() == 1:
    MPI.COMM_WORLD.recv(source=0)
    os._exit(0)
os.environ["BITRING_TIMEOUT"] = "0.3"
watch.timeout.cache_clear()
for (used, name), comm in new.items():
    try:
        calls[name](comm)
    except TimeoutError as error:
        sys.stdout.write(f"{used} {error}\\n")
sys.stdout.flush()
MPI.COMM_WORLD.send(None, 1)
os._exit(0)
"""


@pytest.mark.single
def test_a_rank_that_does_not_come_is_waited_for_as_long_as_was_said(clean_environment):
    prefix, extra = launcher(2)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", LATE],
        env=clean_environment(**extra),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    lines = done.stdout.splitlines()
    told = [re.sub(r"waited \d+ s", "waited 0 s", line) for line in lines if "BITRING_TIMEOUT" in line]
    wanted = [
        f"{used} rank 0 has waited 0 s in {name}; {who} (BITRING_TIMEOUT=0.3)"
        for used, who in ((False, "some rank has not come to it"), (True, "ranks that have not come to it: [1]"))
        for name in ("allreduce", "plan_allreduce", "plan_allreduce", "empty", "this")
    ]
    assert told == wanted, done.stdout + done.stderr


def interrupted(call) -> str:
    """What ``call``, which would go on for ever, raises when Ctrl-C comes while it waits."""
    over = False

    def interrupt() -> None:
        while not (over or waits()):
            time.sleep(1e-3)
        time.sleep(0.2)
        if not over:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        said = text_of(call)
        over = True
    finally:
        interrupter.join()
        signal.signal(signal.SIGINT, before)
    return said


def text_of(call) -> str:
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("used", [False, True])
def test_all_ranks_hear_of_an_interrupt_and_can_go_on_with_a_new_communicator(comm, agree, used: bool):
    if comm.size == 1:
        pytest.skip("there is nobody to wait for")
    x = np.full(5, comm.rank + 1.0)
    new = comm.Dup()
    if used:
        allreduce(x, comm=new)
    said = interrupted(lambda: allgather(new, 0, "this")) if comm.rank == 0 else ""
    comm.Barrier()
    after = text_of(lambda: allgather(new, 0, "this"))
    agree(comm, comm.rank != 0 or said == "KeyboardInterrupt: ", said)
    wanted = "PeerError: this: rank 0 has failed in it, or in what came before; "
    if comm.rank == 0:
        wanted = "RuntimeError: this: this communicator is unusable since this was cut short by KeyboardInterrupt; "
    agree(comm, after == wanted + ADVICE, after)
    newer = new.Dup()
    total = allreduce(x, comm=newer)
    agree(comm, bool((total == comm.size * (comm.size + 1) // 2).all()), f"{total}")
    newer.Free()
    new.Free()


def test_a_plan_whose_wait_was_interrupted_holds_nobody_in_another_call(comm, agree):
    from mpi4py import MPI

    if comm.size == 1:
        pytest.skip("there is nobody to wait for")
    new = comm.Dup()
    plan = plan_exact(np.ones(1000), new, MPI.SUM, "ring")
    said = interrupted(plan) if comm.rank == 0 else ""
    comm.Barrier()
    after = text_of(lambda: broadcast(new, 0, "another"))  # the plan's run is still to be made on rank 0
    agree(comm, comm.rank != 0 or said == "KeyboardInterrupt: ", said)
    wanted = ("PeerError: another: rank 0 has failed in it", "RuntimeError: another: this communicator is unusable")
    if comm.rank != 0:
        wanted = ("MismatchError: ranks called different collectives", "PeerError: another: rank 0 has failed in it")
    agree(comm, after.startswith(wanted), after)
    new.Free()


COMPILES = """
import os, time
from mpi4py import MPI
from bitring.collectives.runtime import watch
from bitring.collectives.runtime.context import context_of
from bitring.compression.exchange.once_a_node import once_a_node
context = context_of(MPI.COMM_WORLD)
context.prepare("a test")
MPI.COMM_WORLD.Barrier()
os.environ["BITRING_TIMEOUT"] = "1"
watch.timeout.cache_clear()
once_a_node(context, lambda: time.sleep(2.5 if context.rank == 0 else 0), "a test")
print(f"rank {context.rank} went on", flush=True)
"""


@pytest.mark.single
def test_compiling_does_not_count_against_the_timeout(clean_environment):
    prefix, extra = launcher(2)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", COMPILES],
        env=clean_environment(**extra),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0 and all(f"rank {rank} went on" in told for rank in range(2)), told
