"""The engine: who drives jobs, what silence leads to, forks, and the end of the process."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from run import launcher
from silence import Told, hears_from

from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime import watch
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.watch import ADVICE, timeout


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup(), algorithm="ring")
    yield duplicate
    duplicate.Free()


def make(x, comm):
    from mpi4py import MPI

    return plan_exact(x, comm, MPI.SUM, "ring")


def test_a_started_plan_runs_beside_its_starter(world, agree):
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("no progress thread below MPI.THREAD_MULTIPLE")
    x = np.full(200_000, 1.0, np.float32)
    plan = make(x, world)
    plan.start()
    until = time.monotonic() + 60
    # Nobody waits, nobody tests: the sum appears all the same.
    while x[0] != world.size and time.monotonic() < until:
        time.sleep(0.001)
    agree(world, x[0] == world.size, f"{x[0]} after 60 s")
    plan.wait()
    agree(world, bool((x == world.size).all()), "wrong sum")
    plan.free()


def test_the_progress_thread_sleeps_when_idle(world, agree):
    x = np.zeros(10)
    plan = make(x, world)
    plan.start()
    plan.wait()
    world.Barrier()
    time.sleep(0.05)
    clocks = []
    for thread in threading.enumerate():
        if thread.name == "bitring-progress" and thread.ident is not None:
            clock = time.pthread_getcpuclockid(thread.ident)
            before = time.clock_gettime(clock)
            time.sleep(0.2)
            clocks.append(time.clock_gettime(clock) - before)
    agree(world, max(clocks, default=0.0) < 0.02, f"used {clocks} s of 0.2")
    agree(world, len(clocks) <= 1, f"{len(clocks)} progress threads")
    plan.free()


def test_several_threads_may_wait(world, agree):
    xs = [np.full(3000, 1.0) for _ in range(4)]
    plans = [make(x, world) for x in xs]
    for plan in plans:
        plan.start()
    waiters = [threading.Thread(target=plan.wait) for plan in plans]
    for waiter in waiters:
        waiter.start()
    for waiter in waiters:
        waiter.join()
    agree(world, all((x == world.size).all() for x in xs), "wrong sum")
    for plan in plans:
        plan.free()


def test_silence_is_warned_of_once_and_harms_nothing(world, agree, caplog, monkeypatch, mpi_tmp_path):
    """The late rank is in no call until all others have complained."""
    late = world.size - 1
    x = np.full(100, 1.0)
    world.Allreduce(None, np.zeros(1))
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 0.8)
    monkeypatch.setattr(logging.getLogger("bitring"), "propagate", True)
    hears_from(monkeypatch, range(late))
    told_of = Told(mpi_tmp_path, world.rank)
    logging.getLogger("bitring").addHandler(told_of)
    world.Barrier()
    with caplog.at_level(logging.WARNING, logger="bitring"):
        if world.rank == late:
            told_of.await_all(range(late))
        world.Allreduce(None, x)
    logging.getLogger("bitring").removeHandler(told_of)
    records = [record.getMessage() for record in caplog.records if record.name == "bitring"]
    told = [re.sub(r"waited \d+ s", "waited 1 s", record) for record in records]
    if world.size == 1 or world.rank == late:
        want = told == []
    else:
        text = f"rank {world.rank} has waited 1 s in Allreduce; ranks that have not come to it: [{late}]"
        want = told == [text]
    agree(world, want, str(told))
    agree(world, bool((x == world.size).all()), "wrong sum")
    monkeypatch.undo()
    for _ in range(3):
        x[:] = 1
        world.Allreduce(None, x)
        agree(world, bool((x == world.size).all()), "wrong sum afterwards")


def test_an_error_in_the_middle_closes_the_communicator(comm, agree):
    world = Communicator(comm.Dup(), algorithm="ring")
    context = context_of(world)

    class CutShortError(Exception):
        pass

    def steps(progress):
        progress.exchanging = True
        raise CutShortError
        yield

    with pytest.raises(CutShortError):
        context.queue.submit(steps, "a test").wait()
    with pytest.raises(
        RuntimeError, match="Allreduce: this communicator is unusable since a test was cut short by CutShortError"
    ):
        world.Allreduce(None, np.zeros(3))
    agree(comm, True)
    world.Free()


@pytest.mark.parametrize("used", [False, True])
def test_a_forked_child_gets_a_clear_error(world, agree, used: bool):
    text = ""
    if used:
        world.Allreduce(None, np.zeros(4))
    if world.rank == 0:
        x = np.zeros(4)
        reader, writer = os.pipe()
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of any fork beside threads
            child = os.fork()
        if child == 0:
            try:
                world.Allreduce(None, x)
                said = "nothing"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writer, said.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
    function = "Allreduce" if used else "the first collective of a communicator"
    want = f"RuntimeError: {function}: this process was forked after MPI started; use the 'spawn' or 'forkserver' start"
    agree(world, world.rank != 0 or text.startswith(want), text)
    agree(world, world.rank != 0 or "import mpi4py inside main()" in text, text)
    y = np.full(4, 1.0)
    world.Allreduce(None, y)
    agree(world, bool((y == world.size).all()), "the parent does not work afterwards")


# Scripts of their own.

START = """
import os, sys, time
import numpy as np
from mpi4py import MPI
from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import plan_exact
comm = Communicator(MPI.COMM_WORLD, algorithm="ring")
x = np.ones(1000)
comm.Allreduce(MPI.IN_PLACE, x)
"""


def run(clean_environment, text: str, ranks: int, **environment: str):
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


# From here on a wait is an error after so many seconds; whoever is away for less has time to answer.
LIMITED = """
from bitring.collectives.runtime import watch
watch._ANSWER_SECONDS = 3.0
os.environ["BITRING_TIMEOUT"] = "6"
watch.timeout.cache_clear()
"""


@pytest.mark.single
def test_a_timeout_is_an_error_that_names_the_missing(clean_environment):
    text = f"""
other = Communicator(MPI.COMM_WORLD.Dup(), algorithm="ring")
other.Allreduce(MPI.IN_PLACE, x)
world = MPI.COMM_WORLD
world.Barrier()
{LIMITED}
def tell(call):
    try:
        call()
    except (TimeoutError, RuntimeError) as error:
        sys.stdout.write(f"{{error}}\\n")  # at once: lines of several ranks must not run into each other
        sys.stdout.flush()
if comm.rank == 1:  # in no call of bitring's until the others have told it
    [world.recv(source=rank) for rank in (0, 2)]
    [world.send(None, rank) for rank in (0, 2)]
else:
    request = other.Iallreduce(MPI.IN_PLACE, np.ones(1000))
    tell(lambda: comm.Allreduce(MPI.IN_PLACE, x))
    tell(request.Wait)
    tell(lambda: comm.Allreduce(MPI.IN_PLACE, x))
    tell(lambda: other.Iallreduce(MPI.IN_PLACE, x).Wait())
    world.send(None, 1)
    world.recv(source=1)
os._exit(0)
"""
    done, _ = run(clean_environment, text, 3)
    told = re.sub(r"waited \d+ s", "waited 6 s", done.stdout).splitlines()
    for function in ("Allreduce", "Iallreduce"):
        for rank in (0, 2):
            text = f"rank {rank} has waited 6 s in {function}; ranks that have not come to it: [1] (BITRING_TIMEOUT=6)"
            assert text in told, done.stdout + done.stderr
        unusable = f"{function}: this communicator is unusable since {function} timed out; {ADVICE}"
        assert told.count(unusable) == 2, done.stdout


@pytest.mark.single
def test_a_timeout_in_the_first_collective_of_all(clean_environment):
    text = f"""
new = Communicator(MPI.COMM_WORLD.Dup(), algorithm="ring")
{LIMITED.replace('"6"', '"1"')}
if comm.rank == 1:
    MPI.COMM_WORLD.recv(source=0)
    os._exit(0)
try:
    new.Allreduce(MPI.IN_PLACE, x)
except TimeoutError as error:
    print(f"{{error}}" + chr(10), end="", flush=True)
MPI.COMM_WORLD.send(None, 1)
os._exit(0)
"""
    done, _ = run(clean_environment, text, 2)
    told = "rank 0 has waited 1 s in Allreduce; some rank has not come to it (BITRING_TIMEOUT=1)"
    assert told in re.sub(r"waited \d+ s", "waited 1 s", done.stdout), done.stdout + done.stderr


@pytest.mark.single
@pytest.mark.parametrize("text", ["soon", "-3", "nan"])
def test_a_timeout_that_is_no_number(monkeypatch, text):
    monkeypatch.setenv("BITRING_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"BITRING_TIMEOUT must be a number of seconds above 0; got '{text}'"):
        timeout.__wrapped__()


@pytest.mark.single
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_interpreter_ends_with_a_plan_under_way(clean_environment, ranks: int):
    text = """
x = np.ones(1 << 20)
plan = plan_exact(x, comm, MPI.SUM, "ring")
plan(); plan.start()
requests = [comm.Iallreduce(MPI.IN_PLACE, np.ones(1000)) for _ in range(3)]
print("over", flush=True)
"""
    done, seconds = run(clean_environment, text, ranks)
    assert done.stdout.count("over") == ranks
    assert "Traceback" not in done.stderr
    assert "Fatal" not in done.stderr
    assert seconds < 60


@pytest.mark.single
def test_finalize_by_hand(clean_environment):
    text = """
plan = plan_exact(x, comm, MPI.SUM, "ring")
plan.start(); plan.wait()
MPI.Finalize()
del plan
print("over", flush=True)
"""
    done, _ = run(clean_environment, text, 2)
    assert (done.returncode, done.stdout.count("over"), done.stderr) == (0, 2, "")


@pytest.mark.single
def test_after_the_end_jobs_are_refused():
    script = (
        START + "from bitring.collectives.runtime.ending import stop\nstop('it is late')\ncomm.Allreduce(None, x)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
    assert "RuntimeError: Allreduce: it is late" in done.stderr


@pytest.mark.single
@pytest.mark.parametrize("level", ["single", "funneled", "serialized"])
def test_below_thread_multiple_everything_runs_when_waited_for(clean_environment, level: str):
    text = """
import threading
y, z = np.ones(70_000), np.ones(10)
plan = plan_exact(y, comm, MPI.SUM, "ring")
plan.start()
one = comm.Iallreduce(MPI.IN_PLACE, z)
plan.wait()
MPI.Request.Waitall([one])
again = comm.Allreduce_init(MPI.IN_PLACE, z)
for _ in range(2):
    again.Start(); again.Wait()
plan.start()
while not plan.test(): pass
names = [thread.name for thread in threading.enumerate()]
right = (y == comm.size ** 2).all() and (z == comm.size ** 3).all()
print(f"{right} {names}" + chr(10), end="", flush=True)
"""
    rc = f"import mpi4py; mpi4py.rc.thread_level = {level!r}\n"
    prefix, extra = launcher(2)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", rc + START + text],
        env=clean_environment(**extra),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stdout.count("True ['MainThread']") == 2, done.stdout + done.stderr


def test_the_engine_keeps_no_finished_queue(world, agree):
    world.Allreduce(None, np.zeros(3))
    queues = engine._queues
    agree(world, context_of(world).queue not in queues or not context_of(world).queue.jobs, "a finished job stays")
