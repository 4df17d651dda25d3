"""A mismatch never hangs: every rank raises, the error names the ranks and what differs, and the next call works."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import plan_exact
from bitring.errors import MismatchError, PeerError


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup(), algorithm="ring")
    yield duplicate
    duplicate.Free()


def outcome(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def works(world) -> bool:
    x = np.full(5, world.rank + 1.0)
    world.Allreduce(None, x)
    return bool((x == world.size * (world.size + 1) / 2).all())


def everyone_raises(world, agree, call, kind: str, *texts: str) -> None:
    got, text = outcome(call)
    agree(world, got == kind and all(part in text for part in texts), f"{got}: {text}")
    agree(world, works(world), "the communicator does not work afterwards")


def calls(world):
    """The same mistake made through a blocking call, a nonblocking one, and a plan."""
    from mpi4py import MPI

    def allreduce(x, op=MPI.SUM, algorithm="ring"):
        Communicator(world, algorithm=algorithm).Allreduce(MPI.IN_PLACE, x, op)

    def iallreduce(x, op=MPI.SUM, algorithm="ring"):
        Communicator(world, algorithm=algorithm).Iallreduce(MPI.IN_PLACE, x, op).Wait()

    def allreduce_init(x, op=MPI.SUM, algorithm="ring"):
        Communicator(world, algorithm=algorithm).Allreduce_init(MPI.IN_PLACE, x, op).Free()

    def plan_allreduce(x, op=MPI.SUM, algorithm="ring"):
        plan_exact(x, world, op, algorithm).free()

    return {
        "Allreduce": allreduce,
        "Iallreduce": iallreduce,
        "Allreduce_init": allreduce_init,
        "plan_allreduce": plan_allreduce,
    }


FUNCTIONS = ["Allreduce", "Iallreduce", "Allreduce_init", "plan_allreduce"]


@pytest.mark.parametrize("after", [0, 100])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_ranks_that_differ(world, agree, function: str, after: int):
    from mpi4py import MPI

    if world.size == 1:
        return
    call, odd, last = calls(world)[function], world.rank == world.size - 1, world.size - 1
    good = np.zeros(4)
    for _ in range(after if function != "Allreduce_init" else 10 * bool(after)):
        call(good)
    # With two ranks neither is the odd one out; the first rank's value then counts as usual.
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("dtype", {"x": np.zeros(4, np.float32 if odd else np.float64)}, "float32", "float64"),
        ("count", {"x": np.zeros(5 if odd else 4)}, "5", "4"),
        ("op", {"x": good, "op": MPI.MAX if odd else MPI.SUM}, "MAX", "SUM"),
        ("algorithm", {"x": good, "algorithm": "mpi" if odd else "ring"}, "mpi", "ring"),
    ]
    for term, arguments, here, there in cases:
        text = f"{function}: ranks disagree on {term}: rank {last} gave {here}, rank 0 gave {there}"
        everyone_raises(world, agree, lambda arguments=arguments: call(**arguments), "MismatchError", text)


@pytest.mark.parametrize("wrong", [None, "0", 0.5, np.zeros(2), -1], ids=repr)
def test_a_root_that_is_no_rank(world, agree, wrong):
    last = world.rank == world.size - 1
    root: Any = wrong if last else 0
    kind = ("ValueError" if isinstance(wrong, int) else "TypeError") if last else "PeerError"
    everyone_raises(world, agree, lambda: world.Bcast(np.zeros(3), root), kind, "Bcast: root must be a rank")
    x, y = np.zeros(3), np.zeros(3)
    everyone_raises(world, agree, lambda: world.Reduce(x, y, root=root), kind, "Reduce: root must be a rank")


def test_no_operation(world, agree):
    from mpi4py import MPI

    x = np.zeros(3)
    for call in calls(world).values():
        everyone_raises(world, agree, lambda call=call: call(x, op=MPI.OP_NULL), "ValueError", "got MPI.OP_NULL")


def test_roots_that_differ(world, agree):
    if world.size == 1:
        return
    last = world.size - 1
    root = int(world.rank == last)
    differ = f"ranks disagree on root: rank {last} gave 1, rank 0 gave 0"
    everyone_raises(world, agree, lambda: world.Bcast(np.zeros(3), root), "MismatchError", f"Bcast: {differ}")
    both = np.zeros((2, 3))
    everyone_raises(
        world, agree, lambda: world.Reduce(both[0], both[1], root=root), "MismatchError", f"Reduce: {differ}"
    )


@pytest.mark.parametrize("after", [0, 100])
def test_different_calls(world, agree, after: int):
    if world.size == 1:
        return
    for _ in range(after):
        world.Allreduce(None, np.zeros(3))
    odd, last = world.rank == world.size - 1, world.size - 1
    text = f"ranks called different collectives: Allreduce, but rank {last} called Bcast"
    call = (lambda: world.Bcast(np.zeros(3))) if odd else (lambda: world.Allreduce(None, np.zeros(3)))
    everyone_raises(world, agree, call, "MismatchError", text)
    text = f"ranks called different collectives: Iallreduce, but rank {last} called plan_allreduce"
    call = calls(world)["plan_allreduce" if odd else "Iallreduce"]
    everyone_raises(world, agree, lambda: call(np.zeros(3)), "MismatchError", text)


def test_several_ranks_that_differ(world, agree):
    if world.size < 5:
        return
    x = np.zeros(6 if world.rank in (1, 3) else 4)
    text = "Allreduce: ranks disagree on count: ranks [1, 3] gave 6, rank 0 gave 4"
    everyone_raises(world, agree, lambda: world.Allreduce(None, x), "MismatchError", text)


def strided():
    return np.zeros((4, 4))[:, 1]


def read_only():
    x = np.zeros(4)
    x.flags.writeable = False
    return x


BAD = {
    "strided": (strided, "ValueError", "must be contiguous; got an array of shape (4,) with strides (32,)"),
    "read-only": (read_only, "ValueError", "must be writable; got a read-only array"),
    "objects": (lambda: np.array([None] * 4), "TypeError", "'O'"),
    "text": (lambda: "abcd", "TypeError", ""),
    "number": (lambda: 4.0, "TypeError", ""),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mistake", BAD)
def test_bad_arguments_on_one_rank(world, agree, function: str, mistake: str):
    make, kind, text = BAD[mistake]
    call, bad, argument = calls(world)[function], world.size - 1, "x" if function.startswith("plan") else "recvbuf"
    if mistake == "objects" and function.startswith("plan"):
        text = "must have a numeric dtype; got object"
    mine = [f"{function}: {argument}", text]
    for _ in range(2):
        if world.rank == bad:
            everyone_raises(world, agree, lambda: call(make()), kind, *mine)
        else:
            theirs = [f"{function}: rank {bad} could not take part: {kind}: ", *mine]
            everyone_raises(world, agree, lambda: call(np.zeros(4)), "PeerError", *theirs)


def test_bad_arguments_of_the_other_calls(world, agree):
    size, rank, bad = world.size, world.rank, world.size - 1
    whole = np.zeros((size, 3))

    def on_one_rank(function, wrong, right, kind, text):
        if rank == bad:
            everyone_raises(world, agree, wrong, kind, f"{function}: ", text)
        else:
            everyone_raises(
                world, agree, right, "PeerError", f"{function}: rank {bad} could not take part: {kind}", text
            )

    def fine():
        world.Allgather(np.zeros(3), whole)

    on_one_rank("Allgather", lambda: world.Allgather(np.zeros(4), whole), fine, "ValueError", "recvbuf must have")
    on_one_rank(
        "Allreduce",
        lambda: world.Allreduce(np.zeros(4), np.zeros(3)),
        lambda: world.Allreduce(np.zeros(4), np.zeros(4)),
        "ValueError",
        "recvbuf must have 4 values of float64",
    )
    on_one_rank(
        "Allreduce",
        lambda: world.Allreduce(np.zeros(4, "f"), np.zeros(4)),
        lambda: world.Allreduce(np.zeros(4), np.zeros(4)),
        "ValueError",
        "recvbuf must have 4 values of float32",
    )
    on_one_rank(
        "Allreduce",
        lambda: world.Allreduce(None, [np.zeros(4), 5]),
        lambda: world.Allreduce(None, np.zeros(5)),
        "ValueError",
        "recvbuf must hold 5 values from position 0 on; got 4 values",
    )
    on_one_rank(
        "Reduce_scatter_block",
        lambda: world.Reduce_scatter_block(whole, np.zeros(2)),
        lambda: world.Reduce_scatter_block(whole, np.zeros(3)),
        "ValueError",
        "recvbuf must have 3 values",
    )
    on_one_rank(
        "Bcast",
        lambda: world.Bcast(np.zeros(3), root=size),
        lambda: world.Bcast(np.zeros(3), root=0),
        "ValueError",
        f"root must be a rank from 0 to {size - 1}; got {size}",
    )
    if size > 1:
        from mpi4py import MPI

        on_one_rank(
            "Reduce",
            lambda: world.Reduce(MPI.IN_PLACE, np.zeros(3), root=0),
            lambda: world.Reduce(np.zeros(3), np.zeros(3), root=0),
            "ValueError",
            "sendbuf may be MPI.IN_PLACE on rank 0, the root, only",
        )


def test_one_error_text_whoever_is_to_blame(world, agree):
    """A rank that is wrong in itself keeps its own error, even when it also calls something else."""
    if world.size == 1:
        return
    bad = world.size - 1
    if world.rank == bad:
        everyone_raises(world, agree, lambda: world.Bcast(strided()), "ValueError", "Bcast: buf must be contiguous")
    else:
        text = f"ranks called different collectives: Allreduce, but rank {bad} called Bcast"
        everyone_raises(world, agree, lambda: world.Allreduce(None, np.zeros(3)), "MismatchError", text)


def test_an_unknown_algorithm_lists_the_known_ones(world, agree):
    known = "unknown algorithm 'rign'; known: binomial_tree, double_binary_tree, leaders, mpi, multilane, rabenseifner"
    everyone_raises(world, agree, lambda: Communicator(world, algorithm="rign"), "ValueError", known)
    from mpi4py import MPI

    if world.rank == 0:
        everyone_raises(world, agree, lambda: plan_exact(np.zeros(3), world, MPI.SUM, "rign"), "ValueError", known)
    else:
        call = calls(world)["plan_allreduce"]
        everyone_raises(world, agree, lambda: call(np.zeros(3)), "PeerError", "rank 0 could not take part", known)


def test_a_failed_request_raises_its_error_from_waitall_too(world, agree):
    from mpi4py import MPI

    if world.size == 1:
        return
    requests = [
        world.Iallreduce(MPI.IN_PLACE, np.zeros(4)),
        world.Iallreduce(MPI.IN_PLACE, np.zeros(4 + (world.rank == 0))),
        world.Iallreduce(MPI.IN_PLACE, np.zeros(4)),
    ]
    everyone_raises(world, agree, lambda: MPI.Request.Waitall(requests), "Exception")


def test_operations_without_meaning_for_the_dtype(world, agree):
    from mpi4py import MPI

    text = "BAND is not defined for float16; defined are SUM, PROD, MAX, MIN"
    for call in calls(world).values():
        everyone_raises(world, agree, lambda call=call: call(np.zeros(3, "e"), op=MPI.BAND), "TypeError", text)


def test_the_errors_are_what_users_catch():
    assert issubclass(MismatchError, ValueError)
    assert issubclass(PeerError, RuntimeError)


@pytest.mark.parametrize("other", ["Allreduce", "Allreduce_init", "plan_allreduce"])
def test_first_calls_that_differ(world, comm, agree, other: str):
    """Iallreduce does not wait until the communicator is prepared, as the others do."""
    if world.size == 1:
        return
    last = world.size - 1
    call = calls(world)[other if world.rank == last else "Iallreduce"]
    text = f"ranks called different collectives: Iallreduce, but rank {last} called {other}"
    everyone_raises(world, agree, lambda: call(np.zeros(3)), "MismatchError", text)


@pytest.mark.parametrize("algorithm", ["mpi", "ring", "auto"])
def test_a_run_of_a_plan_beside_another_call(world, agree, algorithm: str):
    from mpi4py import MPI

    if world.size == 1:
        return
    last = world.size - 1
    plan = plan_exact(np.ones(100), world, MPI.SUM, algorithm)
    odd = world.rank == last
    said = said_of(lambda: world.Iallgather(np.zeros(1), np.zeros(world.size)).Wait() if odd else plan())
    text = "MismatchError: ranks called different collectives: a run of a plan, but "
    agree(world, said == f"{text}rank {last} called Iallgather", said)


def said_of(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
@pytest.mark.parametrize("again", ["start", "call", "freed"])
def test_a_plan_that_one_rank_cannot_run(world, comm, agree, algorithm: str, again: str):
    """The others hear of it, and wait for no run that does not come."""
    from mpi4py import MPI

    if world.size == 1:
        return
    x, odd = np.ones(100), world.rank == world.size - 1
    plans = [plan_exact(x, world, MPI.SUM, algorithm) for _ in range(2)]
    if again != "freed":
        plans[0].start()
    elif odd:
        plans[0].free()
    plan = plans[0] if odd or again == "freed" else plans[1]
    said = said_of(plan if again == "call" else plan.start)
    if said == "done" and again != "call":
        said = said_of(plan.wait)
    first = said_of(plans[0].wait) if again != "freed" else "done"
    agree(comm, first == "done", first)
    number = plans[0].what
    why = "the plan was freed" if again == "freed" else "the last run must be waited for first"
    mine = f"RuntimeError: {number}: start: {why}"
    theirs = f"PeerError: a run of a plan: rank {world.size - 1} could not take part: {mine}"
    wanted = mine if odd else theirs
    if not odd and again != "freed":
        wanted = theirs.replace(plans[1].what, number)
    agree(comm, said == wanted, f"{said} instead of {wanted}")


@pytest.mark.parametrize("algorithm", ["ring", "rabenseifner"])
def test_an_interrupt_between_two_parts_of_a_call(world, comm, agree, monkeypatch, algorithm: str):
    """All ranks have agreed, and the others are in the exchange."""
    from bitring.collectives.call_run import CallRun

    if world.size == 1:
        return
    ours = Communicator(world, algorithm=algorithm)
    x = np.ones(200_000)
    ours.Allgather(x, np.ones(200_000 * world.size))  # what is made is there

    def interrupt(run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if world.rank == 0:
            patch.setattr(CallRun, "_take_runner", interrupt)
        try:
            ours.Allreduce(None, x)
            said = "done"
        except (PeerError, KeyboardInterrupt) as error:
            said = type(error).__name__
    agree(comm, said == ("KeyboardInterrupt" if world.rank == 0 else "PeerError"), said)
