"""Two threads in one communicator's calls: an error that names both, errors on all ranks, and never a hang."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from waiting import needs_no_job

import bitring
from bitring.collectives.communicator import Communicator
from bitring.collectives.fusion import start
from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import allgather
from bitring.training.data_parallel import DataParallel


@pytest.fixture
def world(comm) -> Iterator[Communicator]:
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("MPI allows one thread at a time here")
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


class Things:
    """What is made on a communicator before threads meet in it, on all ranks when it is first asked for."""

    def __init__(self, world: Communicator) -> None:
        self.world = world
        self.x = np.ones(10)
        self.ring = Communicator(world, algorithm="ring")

    @functools.cached_property
    def plan(self) -> Any:
        return bitring.plan_allreduce(np.ones(10), comm=self.world)

    @functools.cached_property
    def ring_plan(self) -> Any:
        return bitring.plan_allreduce(np.ones(10), comm=self.world, algorithm="ring")

    @functools.cached_property
    def onebit(self) -> Any:
        return bitring.plan_allreduce(np.ones(100, np.float32), comm=self.world, compression="onebit")

    @functools.cached_property
    def trainer(self) -> DataParallel:
        return DataParallel({"w": np.ones(3, np.float32)}, "sgd", self.world)

    @functools.cached_property
    def local(self) -> DataParallel:
        return DataParallel({"w": np.ones(3, np.float32)}, "sgd", self.world, mode="local")

    @functools.cached_property
    def request(self) -> Any:
        return self.world.Allreduce_init(None, np.ones(10))


CALLS: dict[str, tuple[str, Callable[[Things], object]]] = {
    "Allreduce": ("Allreduce", lambda t: t.world.Allreduce(None, t.x)),
    "Allreduce by messages": ("Allreduce", lambda t: t.ring.Allreduce(None, t.x)),
    "Iallreduce": ("Iallreduce", lambda t: t.world.Iallreduce(None, t.x).Wait()),
    "Reduce": ("Reduce", lambda t: t.world.Reduce(t.x, np.ones(10))),
    "Reduce_scatter_block": (
        "Reduce_scatter_block",
        lambda t: t.world.Reduce_scatter_block(np.ones(t.world.size), np.ones(1)),
    ),
    "Allgather": ("Allgather", lambda t: t.world.Allgather(np.ones(1), np.ones(t.world.size))),
    "Iallgather": ("Iallgather", lambda t: t.world.Iallgather(np.ones(1), np.ones(t.world.size)).Wait()),
    "Bcast": ("Bcast", lambda t: t.world.Bcast(t.x)),
    "empty": ("empty", lambda t: t.world.empty(3)),
    "Allreduce_init": ("Allreduce_init", lambda t: t.world.Allreduce_init(None, t.x)),
    "Start": ("Start of a request of Allreduce_init", lambda t: (t.request.Start(), t.request.Wait())),
    "allreduce": ("allreduce", lambda t: bitring.allreduce(t.x, comm=t.world)),
    "objects": ("a word", lambda t: allgather(t.world, 1, "a word")),
    "plan": ("allreduce of 10 float64 values", lambda t: t.plan()),
    "plan by messages": ("allreduce of 10 float64 values by ring", lambda t: t.ring_plan()),
    "start": ("allreduce of 10 float64 values", lambda t: (t.plan.start(), t.plan.wait())),
    "start of several": ("start", lambda t: (start([t.plan, t.onebit]), t.plan.wait(), t.onebit.wait())),
    "compressed plan": ("allreduce of 100 float32 values, compressed by", lambda t: t.onebit()),
    "new plan": ("plan_allreduce", lambda t: bitring.plan_allreduce(t.x, comm=t.world)),
    "new compressed plan": (
        "plan_allreduce",
        lambda t: bitring.plan_allreduce(np.ones(9, np.float32), comm=t.world, compression="onebit"),
    ),
    "new reduced plan": (
        "plan_allreduce",
        lambda t: bitring.plan_allreduce(np.ones((9, 9), np.float32), comm=t.world, compression="powersgd"),
    ),
    "step": ("DataParallel.step", lambda t: t.trainer.step({"w": np.ones(3, np.float32)})),
    "synchronize": ("DataParallel.synchronize", lambda t: t.local.synchronize()),
}
FIRST = ["Allreduce", "Allreduce by messages", "plan", "Bcast", "compressed plan", "step"]
MEETINGS = [(first, "Allreduce") for first in FIRST] + [("Allreduce", second) for second in CALLS]


def inside(world: Communicator) -> bool:
    context = context_of(world)
    fast_path = context.queue.fast_path
    return bool(context._turns._thread or (fast_path is not None and fast_path.inside))


@pytest.mark.parametrize(("first", "second"), MEETINGS)
def test_a_thread_that_comes_while_another_is_inside(world, comm, agree, first: str, second: str):
    if comm.size == 1:
        return
    last = comm.size - 1
    things = Things(world)
    for call in (first, second):  # what is made, and compiled, is there from now on
        CALLS[call][1](things)
    told: list[str] = []
    worker = threading.Thread(target=lambda: told.append(outcome(lambda: CALLS[first][1](things))), name="first")
    if comm.rank == last:
        worker.start()
        if first != "Bcast":  # a root need not wait
            while not inside(world):
                time.sleep(1e-3)
        told.append(outcome(lambda: CALLS[second][1](things)))
    comm.Barrier()
    if comm.rank != last:
        told.append(outcome(lambda: CALLS[first][1](things)))
        told.append(outcome(lambda: CALLS[second][1](things)))
    else:
        worker.join()
    then = outcome(lambda: world.Allreduce(None, things.x))
    name, called = threading.current_thread().name, CALLS[second][0]
    want = f"{called}"
    if comm.rank == last:
        ok = (
            told[1] == "done"
            and told[0].startswith(f"RuntimeError: {want}")
            and f"thread '{name}' called it while thread 'first' was in " in told[0]
            and "one thread at a time" in told[0]
        )
    else:
        ok = told[0] == "done" and told[1].startswith("MismatchError") and f"rank {last} refused its call" in told[1]
    agree(comm, ok, str(told))
    agree(comm, "this communicator is unusable since two threads" in then, then)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("what", ["Communicator", "raw", "ring", "plan"])
def test_threads_that_race(world, comm, agree, what: str, warm: bool, stops: bool):
    from mpi4py import MPI

    total = comm.size * (comm.size + 1) / 2
    raw = MPI.Intracomm(world)
    if warm:
        world.Allreduce(None, np.ones(10))
    counted: Counter[str] = Counter()

    def work() -> None:
        for _ in range(500):
            x = np.full(10, comm.rank + 1.0)
            try:
                if what == "raw":
                    x = bitring.allreduce(x, comm=raw)
                elif what == "plan":
                    plan_exact(x, world, MPI.SUM, "auto")()
                else:
                    Communicator(world, algorithm="auto" if what == "Communicator" else what).Allreduce(None, x)
                counted["right" if (x == total).all() else f"wrong: {x}"] += 1
            except (RuntimeError, bitring.MismatchError) as error:
                counted[f"{type(error).__name__}: {error}"[:60]] += 1
                if stops:
                    return

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    agree(comm, not any(text.startswith("wrong") for text in counted), str(counted))


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
def test_threads_that_take_turns(world, comm, agree, algorithm: str):
    ours = Communicator(world, algorithm=algorithm)
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    wrong: list[object] = []

    def work(number: int) -> None:
        for k in range(20):
            x = np.full(10, float(k))
            turns[number].acquire()
            try:
                ours.Allreduce(None, x)
                if not (x == k * comm.size).all():
                    wrong.append(x)
            except Exception as error:
                wrong.append(error)
            turns[1 - number].release()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    agree(comm, not wrong, str(wrong[:3]))


def test_a_communicator_for_each_thread(world, comm, agree):
    ours = [world.Dup() for _ in range(3)]
    wrong: list[object] = []

    def work(mine: Communicator) -> None:
        try:
            for k in range(300):
                x = np.full(10, float(k))
                mine.Allreduce(None, x)
                if not (x == k * comm.size).all():
                    wrong.append(x)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(mine,)) for mine in ours]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    agree(comm, not wrong, str(wrong[:3]))
    for mine in ours:
        mine.Free()


def test_on_one_rank_the_communicator_can_be_used_on(world):
    from mpi4py import MPI

    alone = Communicator(MPI.COMM_SELF.Dup())
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with context_of(alone).turn("Bcast"):
            entered.set()
            leave.wait(150)

    worker = threading.Thread(target=hold, name="holder")
    worker.start()
    entered.wait(150)
    text = r"^Reduce: thread 'MainThread' called it while thread 'holder' was in Bcast on the same communicator"
    with pytest.raises(RuntimeError, match=text):
        alone.Reduce(np.ones(3), np.ones(3))
    leave.set()
    worker.join()
    alone.Allreduce(None, np.ones(3))
    alone.Free()


def test_a_call_made_of_others_goes_past_the_engine(world, comm, agree):
    """In the thread that is in it, and in no other."""
    plan, context = bitring.plan_allreduce(np.ones(10), comm=world), context_of(world)
    if plan.algorithm != "shared_memory":
        return
    with context.turn("a call"):
        past_engine = needs_no_job(comm, context.queue, plan)
    agree(comm, past_engine, "it makes jobs")
    told: list[str] = []
    with context.turn("a call"):
        other = threading.Thread(target=lambda: told.append(outcome(plan)))
        other.start()
        other.join()
    agree(comm, "called it while thread 'MainThread' was in a call" in told[0], told[0])
    then = outcome(lambda: world.Allreduce(None, np.ones(3)))
    agree(comm, "this communicator is unusable since two threads" in then, then)


SCRIPT = """
import threading, numpy as np
from mpi4py import MPI
import bitring
comm = bitring.Communicator(MPI.COMM_WORLD.Dup(), algorithm={algorithm!r})
comm.Allreduce(None, np.ones(3))
told = []
def call():
    try:
        for _ in range(50):
            comm.Allreduce(None, np.ones(3))
    except Exception as error:
        told.append(str(error))
if comm.rank == 0:
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads: thread.start()
    MPI.COMM_WORLD.Barrier()
    for thread in threads: thread.join()
    assert len(told) == 2, told
else:
    MPI.COMM_WORLD.Barrier()
    import time; time.sleep(0.1)
    comm.Allreduce(None, np.ones(3))
MPI.COMM_WORLD.Barrier()
print("over", flush=True)
"""


@pytest.mark.single
@pytest.mark.parametrize(("algorithm", "native"), [("auto", ""), ("ring", "0")])
def test_ranks_that_never_come_to_the_refused_call(on_ranks, algorithm: str, native: str):
    """The process ends all the same."""
    env = {"BITRING_NATIVE": native} if native else {}
    done = on_ranks(2, "-c", SCRIPT.format(algorithm=algorithm), env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over") == 2
