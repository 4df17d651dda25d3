"""Exact plans: started, waited for, tested, called; several at once; errors; what they leave behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from waiting import needs_no_job

from bitring.collectives.allreduce import allreduce
from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.engine import engine
from bitring.collectives.schedules.schedule import algorithms
from bitring.compression.compressor import parsed
from bitring.compression.plans.plan import plan_allreduce
from bitring.errors import NonFiniteError, PeerError

ALGORITHMS = [
    "auto",
    *(name for name in algorithms.names() if "allreduce" in algorithms.get(name).collectives()),
    "mpi",
]


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def make(x, comm, algorithm: str = "ring", op=None):
    from mpi4py import MPI

    return plan_exact(x, comm, op or MPI.SUM, algorithm)


def triangle(comm) -> int:
    return comm.size * (comm.size + 1) // 2


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids="with_{}".format)  # pytest-mpi takes "mpi" for its mark
def test_start_wait_test_and_call(world, agree, algorithm: str):
    x = np.empty((3, 41), np.float32)
    plan = make(x, world, algorithm)

    def run(how) -> bool:
        x[:] = world.rank + 1
        how()
        return bool((x == triangle(world)).all())

    def started():
        plan.start()
        plan.wait()

    def polled():
        plan.start()
        while not plan.test():
            time.sleep(0.0001)

    for how in (plan, started, polled, plan):
        agree(world, run(how), f"{how}: {x}")
    agree(world, algorithm in ("auto", plan.algorithm) and bool(plan.why), f"{plan.algorithm}: {plan.why}")
    plan.free()


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_small_buffers_of_any_order(world, agree, n: int):
    x = np.asfortranarray(np.full((n, 3), world.rank + 1, np.int16))
    for algorithm in ALGORITHMS:
        x[:] = world.rank + 1
        plan = make(x, world, algorithm)
        plan()
        agree(world, bool((x == triangle(world)).all()), f"{algorithm}: {x}")
        plan.free()


def test_several_plans_at_once_waited_for_in_any_order(world, agree):
    xs = [np.empty(1000 + 7 * k) for k in range(6)]
    plans = [make(x, world, ALGORITHMS[k % len(ALGORITHMS)]) for k, x in enumerate(xs)]
    for turn in range(5):
        for k, x in enumerate(xs):
            x[:] = (world.rank + 1) * (k + 1)
        for plan in plans:
            plan.start()
        order = np.random.default_rng(world.rank + turn).permutation(len(plans))  # each rank its own
        for k in order:
            plans[k].wait()
        right = [bool((x == triangle(world) * (k + 1)).all()) for k, x in enumerate(xs)]
        agree(world, all(right), str(right))
    for plan in plans:
        plan.free()


def test_plans_on_several_communicators_started_in_different_orders(world, agree):
    comms = [world, world.Dup(), world.Split(0, -world.rank)]
    xs = [np.full(501, world.rank + 1.0) for _ in comms]
    plans = [make(x, comm) for x, comm in zip(xs, comms, strict=True)]
    for k in np.random.default_rng(world.rank).permutation(len(plans)):
        plans[k].start()
    for k in np.random.default_rng(9 + world.rank).permutation(len(plans)):
        plans[k].wait()
    agree(world, all((x == triangle(world)).all() for x in xs), "wrong sum")
    for plan in plans:
        plan.free()
    for comm in comms[1:]:
        comm.Free()


def test_calls_between_start_and_wait(world, agree):
    x, y = np.full(3000, world.rank + 1.0), np.full(11, world.rank + 1.0)
    plan = make(x, world)
    plan.start()
    world.Allreduce(None, y)
    plan.wait()
    agree(world, bool((x == triangle(world)).all() and (y == triangle(world)).all()), "wrong sum")
    plan.free()


def test_misuse_is_told(world, agree):
    x = np.zeros(2_000)
    plan = make(x, world)
    name = r"allreduce of 2000 float64 values by ring \(plan \d+\): "
    with pytest.raises(RuntimeError, match=name + "wait: nothing was started"):
        plan.wait()
    with pytest.raises(RuntimeError, match=name + "test: nothing was started"):
        plan.test()
    plan.start()
    with pytest.raises(RuntimeError, match=name + "start: the last run must be waited for first"):
        plan.start()
    with pytest.raises(RuntimeError, match=name + "start: the last run must be waited for first"):
        plan()
    plan.wait()
    with pytest.raises(RuntimeError, match="wait: nothing was started"):
        plan.wait()
    assert plan.state_dict() == {}
    plan.load_state_dict({})
    with pytest.raises(ValueError, match=r"load_state_dict: state must be empty; got \['residual'\]"):
        plan.load_state_dict({"residual": x})
    plan.free()
    plan.free()
    with pytest.raises(RuntimeError, match=name + "start: the plan was freed"):
        plan.start()
    agree(world, True)


def test_a_plan_is_not_freed_during_its_run(world, agree):
    x = np.zeros(1000)
    plan = make(x, world)
    if world.rank == 0:
        world.Barrier()
    plan.start()
    raised = False
    if world.size > 1 and world.rank != 0:  # rank 0 has not begun
        try:
            plan.free()
        except RuntimeError as error:
            raised = "free: the last run must be waited for first" in str(error)
        world.Barrier()
    elif world.size > 1:
        raised = True
    else:
        raised = True
    plan.wait()
    plan.free()
    agree(world, raised, "no error")


def test_bad_arguments_raise_on_all_ranks(world, agree):
    from mpi4py import MPI

    for wrong, kind, text in [
        (lambda: make(np.zeros((4, 4))[:, 1], world), ValueError, "plan_allreduce: x must be contiguous"),
        (lambda: make([1.0, 2.0], world), TypeError, "plan_allreduce: x must be a NumPy or CuPy array"),
        (lambda: make(np.array(["a"]), world), TypeError, "plan_allreduce: x must have a numeric dtype"),
        (lambda: make(np.zeros(3), world, op=MPI.MAXLOC), TypeError, None),
        (lambda: make(np.zeros(3), world, "none"), ValueError, "unknown algorithm 'none'; known: binomial_tree"),
    ]:
        if text is None:
            continue
        with pytest.raises(kind, match=text):
            wrong()
    own = MPI.Op.Create(lambda a, b, _: None, commute=True)
    with pytest.raises(ValueError, match=r"op must be a predefined operation; got one made by MPI\.Op\.Create"):
        make(np.zeros(3), world, op=own)
    own.Free()
    agree(world, True)


@pytest.mark.parametrize("compression", [None, "onebit", "powersgd"])
def test_what_is_no_operation(world, agree, compression):
    from mpi4py import MPI

    odd = world.rank == world.size - 1
    op: Any = "sum" if odd else MPI.SUM
    calls = [lambda: plan_allreduce(np.ones(4), comm=world, op=op, compression=compression)]
    if compression is None:
        calls += [lambda: allreduce(np.ones(4), comm=world, op=op)]
        calls += [lambda: world.Allreduce(np.ones(4), np.ones(4), op)]
    for call in calls:
        error = None
        try:
            call()
        except (TypeError, PeerError) as raised:
            error = raised
        agree(world, "op must be an MPI.Op such as MPI.SUM; got str" in str(error), repr(error))
        agree(world, isinstance(error, TypeError if odd else PeerError), repr(error))


@pytest.mark.parametrize("function", [allreduce, plan_allreduce])
@pytest.mark.parametrize("wrong", [3, "world"])
def test_what_is_no_communicator(world, agree, function, wrong):
    text = f"{function.__name__}: comm must be an MPI.Intracomm such as MPI.COMM_WORLD; got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=text):
        function(np.ones(4), comm=wrong)
    agree(world, True)


@pytest.mark.parametrize("text", ["topk:density=0.5,block=64", "powersgd:matrix_rank=2"])
def test_compressors_are_asked_for_as_on_the_command_line(world, agree, text):
    plan = plan_allreduce(np.ones(100, np.float32), comm=world, compression=text)
    agree(world, str(parsed(text, "allreduce")) in plan.why, plan.why)
    plan.free()


@pytest.mark.parametrize("usual", ["topk", "powersgd"])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("powersgd:matrix_rank=0", "PowerSGD: matrix_rank must be at least 1; got 0"),
        ("topk:densty=0.1", "unknown setting 'densty' of the compressor topk; known: density"),
        ("zip", "unknown compressor 'zip'; known: bfloat16"),
        ("none", "'none' is no compressor: compression=None is exact; known: bfloat16"),
    ],
)
def test_a_rank_that_asks_for_no_compressor(world, agree, usual, wrong, text):
    odd = world.rank == world.size - 1
    error = None
    try:
        plan_allreduce(np.ones(4, np.float32), comm=world, compression=wrong if odd else usual)
    except (ValueError, PeerError) as raised:
        error = raised
    agree(world, text in str(error) and isinstance(error, ValueError if odd else PeerError), repr(error))


def test_bytes_sent(world, agree):
    p, n = world.size, 40 * world.size
    x = np.zeros(n, np.float32)
    plan = make(x, world)
    agree(world, plan.bytes_sent == 0)
    for times in (1, 2, 3):
        plan()
        agree(world, plan.bytes_sent == times * 2 * (p - 1) * 160, f"{plan.bytes_sent}")
    plan.free()
    plan = make(x, world, "mpi")
    plan()
    agree(world, plan.bytes_sent == 2 * (p - 1) * 160, f"{plan.bytes_sent}")  # the least there can be


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids="with_{}".format)  # pytest-mpi takes "mpi" for its mark
def test_the_second_call_allocates_nothing_big(world, agree, algorithm: str):
    x = np.zeros(1 << 20, np.float32)
    plan = make(x, world, algorithm)
    plan()
    tracemalloc.start()
    for _ in range(2):
        plan()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    agree(world, most < 100_000, f"{most} bytes for a buffer of {x.nbytes}")
    plan.free()


def test_plans_leave_no_requests_behind(world, agree):
    x = np.zeros(64)
    for _ in range(300):
        plan = make(x, world, "recursive_doubling")
        plan()
        del plan  # as free() does
    gc.collect()
    plan = make(x, world)
    plan()
    agree(world, True)
    plan.free()


def test_a_dropped_plan_still_finishes_its_run(world, agree):
    x = np.full(5000, world.rank + 1.0)
    plan = make(x, world)
    plan.start()
    del plan
    y = np.zeros(1)
    world.Allreduce(None, y)  # comes after it
    agree(world, bool((x == triangle(world)).all()), "wrong sum")


@pytest.mark.single
@pytest.mark.parametrize("end", ["MPI.Finalize()", "pass"])
def test_a_plan_that_outlives_mpi(clean_environment, end: str):
    text = f"""
import numpy as np
from mpi4py import MPI
from bitring.collectives.plan import plan_exact
plan = plan_exact(np.zeros(5), MPI.COMM_WORLD, MPI.SUM, "ring")
plan.start(); plan.wait()
{end}
print("over", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", text], env=clean_environment(), capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0
    assert done.stdout == "over\n"
    assert done.stderr == ""


@pytest.mark.parametrize(("algorithm", "compression"), [("auto", None), ("ring", None), ("auto", "onebit")])
def test_a_wait_that_was_interrupted_is_made_again(world, agree, monkeypatch, algorithm: str, compression: str | None):
    x = np.full(4096, world.rank + 1, np.float32)
    plan = plan_allreduce(x, comm=world, algorithm=algorithm, compression=compression)

    def interrupt(job) -> None:
        raise KeyboardInterrupt

    interrupted = world.rank == 0 and world.size > 1  # one that is alone waits for nobody
    if interrupted:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "drive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                plan()
        with pytest.raises(RuntimeError, match="free: the last run must be waited for first"):  # the others come later
            plan.free()
    world.Barrier()
    if interrupted:
        plan.wait()
    else:
        plan()
    agree(world, bool((x == triangle(world)).all()))
    plan.free()


def shares_memory(comm) -> bool:
    """Whether runs can pass the engine."""
    from mpi4py import MPI

    several = comm.size > 1 and MPI.Query_thread() == MPI.THREAD_MULTIPLE
    return several and context_of(comm).common is not None


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids="with_{}".format)
def test_a_run_on_one_node_is_no_job(world, agree, algorithm: str):
    """It is one call into the extension, the agreement included, while all goes well."""
    x = np.empty(1000, np.float32)
    plan = make(x, world, algorithm)
    for _ in range(20):
        x[:] = world.rank + 1
        plan()
    agree(world, bool((x == triangle(world)).all()), "wrong sum")
    agree(world, not shares_memory(world) or needs_no_job(world, plan.context.queue, plan), "it makes jobs")


@pytest.mark.parametrize("call", ["Allreduce", "Reduce", "Bcast", "Allgather", "Reduce_scatter_block"])
def test_a_repeated_call_on_one_node_is_no_job(world, agree, call: str):
    comm = Communicator(world, algorithm="ring")
    n = 60
    x, many = np.full(n, comm.rank + 1.0), np.empty(n * comm.size)
    everything = np.repeat(np.arange(1.0, comm.size + 1), n)
    expected = {"Bcast": 1.0, "Allgather": everything}.get(call, triangle(comm))

    def once():
        if call == "Bcast":
            result = x.copy()
            comm.Bcast(result)
        elif call == "Allgather":
            result = many
            comm.Allgather(x, result)
        elif call == "Reduce_scatter_block":
            result = np.empty(n)
            comm.Reduce_scatter_block(np.tile(x, comm.size), result)
        else:
            result = np.empty(n)
            getattr(comm, call)(x, result)
            if call == "Reduce" and comm.rank != 0:
                result = expected
        return bool(np.all(result == expected))

    agree(world, sum(once() for _ in range(20)) == 20, "wrong result")
    queue = context_of(comm).queue
    agree(world, not shares_memory(comm) or needs_no_job(world, queue, once), "it makes jobs")


@pytest.mark.parametrize("algorithm", ["ring", "mpi"])
def test_other_plans_are_told_apart_past_the_engine(world, agree, algorithm: str):
    """Late, too: after many runs that were right."""
    one, other = np.ones(5), np.ones(5)
    plans = [make(one, world, algorithm), make(other, world, algorithm)]
    for _ in range(50):
        plans[0]()
        plans[1]()
    error = raised(plans[world.rank == 0])
    expected = "MismatchError" if world.size > 1 else None
    untouched = bool((one == other).all()) or not shares_memory(world)
    agree(world, error == expected and untouched, f"{error}, {one}, {other}")


def raised(call) -> str | None:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


@pytest.mark.parametrize("compression", [None, "onebit", "powersgd"])
def test_a_run_calls_back_when_it_is_over(world, agree, compression):
    """And need not be waited for; what went wrong comes with the call."""
    x = np.ones((8, 40), np.float32)
    plan = plan_allreduce(x, comm=world, compression=compression, algorithm="ring" if compression is None else "auto")
    over = threading.Event()
    heard: list[BaseException | None] = []

    def on_done(error: BaseException | None) -> None:
        heard.append(error)
        over.set()

    for _ in range(3):
        x[:] = 1
        over.clear()
        plan.start(on_done=on_done)
        while not over.is_set():
            engine.poll()  # below MPI.THREAD_MULTIPLE nobody else drives it
    agree(world, heard == [None] * 3 and np.allclose(x, world.size), f"{heard}, {x[0, 0]}")
    if compression is not None:
        x[0, 0] = np.nan if world.rank == 0 else 1
        over.clear()
        plan.start(on_done=on_done)
        while not over.is_set():
            engine.poll()
        agree(world, type(heard[-1]).__name__ == "NonFiniteError", repr(heard[-1]))
        with pytest.raises(NonFiniteError):
            plan.wait()


@pytest.mark.parametrize("compression", [None, "onebit", "powersgd"])
def test_a_plan_is_made_again_on_another_communicator(world, agree, compression):
    x = np.ones((8, 40), np.float32)
    plan = plan_allreduce(x, comm=world, compression=compression, shapes=[(8, 40)])
    half = world.Split(world.rank % 2)
    again = plan.on(half)
    again()
    same = (again.algorithm == plan.algorithm or compression is None) and type(again) is type(plan)
    agree(world, same and np.allclose(x, half.size), f"{again.algorithm}, {x[0, 0]}")
    x[:] = 1
    plan()
    agree(world, np.allclose(x, world.size), f"{x[0, 0]}")
    half.Free()


@pytest.mark.parametrize("algorithm", ["ring", "mpi"])
def test_what_an_interrupted_run_works_on_is_kept(world, agree, monkeypatch, algorithm: str):
    """Messages into it may be under way: the MPI library writes there later."""
    plan = make(np.ones(5), world, algorithm)
    queue = plan.context.queue

    def interrupt() -> int:
        raise KeyboardInterrupt

    if shares_memory(world):
        monkeypatch.setattr(plan, "_past_engine", interrupt)
        with pytest.raises(KeyboardInterrupt):
            plan()
    kept = plan in queue.wrecks or not shares_memory(world)
    agree(world, kept and bool(queue.broken) == shares_memory(world), f"{queue.wrecks}")
