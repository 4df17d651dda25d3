"""The parameter store: what a read sees, who waits, rows, leaving, and the end."""

import dataclasses
import math
import time
from typing import Any, cast

import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring import MismatchError, NonFiniteError, ParameterStore, PeerError
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.objects import allgather
from bitring.native import native
from bitring.training.store import making, native_service, parameter_store
from bitring.training.store.messages import MessageTable
from bitring.training.store.owner import Kind
from bitring.training.store.rule import Terms
from bitring.training.store.table import Setup


def ones(**shapes: Any) -> dict[str, Any]:
    return {name: np.ones(shape) for name, shape in shapes.items()}


def zeros(**shapes: Any) -> dict[str, Any]:
    return {name: np.zeros(shape) for name, shape in shapes.items()}


def raising(call: Any) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def one_clock(store: ParameterStore) -> None:
    store.get()
    store.inc({"w": -np.ones(4)})
    store.clock()


UP = bitring.SGD(lr=1.0)


WAYS = ("as it is", "by messages", "some in Python", "with copies")


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a node values are in shared memory where that serves; services are native where they can."""
    if request.param == "with copies":
        monkeypatch.setattr(
            parameter_store, "make_table", lambda s: making.make_table(dataclasses.replace(s, copies=1))
        )
    elif request.param != "as it is":
        if native() is None:
            pytest.skip("without the native engine it is so as it is")
        monkeypatch.setattr(making, "serves", lambda setup: False)
    if request.param == "some in Python":
        able = native_service.serves
        monkeypatch.setattr(
            native_service, "serves", lambda setup, *more: setup.comm.Get_rank() % 2 == 1 and able(setup, *more)
        )


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_read_sees_all_that_it_must_and_nobody_is_too_far_ahead(comm, agree, staleness):
    """Each rank adds 1 to a place of its own in each clock: a value is the number of its updates seen."""
    store = ParameterStore(zeros(w=(comm.size, 3)), UP, comm=comm, staleness=staleness)
    mine = np.zeros((comm.size, 3))
    mine[comm.rank] = -1
    bad = []
    for c in range(12):
        seen = store.get()["w"]
        if (seen < max(0, c - staleness)).any() or (seen[comm.rank] != c).any():
            bad.append((c, seen[:, 0].tolist()))
        if seen.max() - seen.min() > staleness + 1:
            bad.append((c, "apart", seen.tolist()))
        if (c + comm.rank) % 3 == 0:
            time.sleep(0.002)
        store.inc({"w": mine})
        store.clock()
    values = store.synchronize()["w"]
    agree(comm, not bad, str(bad))
    agree(comm, (values == 12).all(), str(values))
    agree(comm, store.clocks == [12.0] * comm.size, str(store.clocks))
    applied = sum(allgather(comm, store.telemetry()["applied"], "test"))
    agree(comm, applied >= 12 * comm.size)
    store.free()


@pytest.mark.parametrize("optimizer", [bitring.SGD(lr=0.1, momentum=0.9), bitring.AdaGrad(lr=0.1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_optimizer_runs_where_the_shards_are_with_its_bits(comm, agree, optimizer, dtype):
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(1)
    shapes = {"a": (17, 3), "b": (1,), "empty": (0, 4), "scalar": (), "c": (5, 2, 3)}
    w = {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    store = ParameterStore(w, optimizer, comm=comm, staleness=0)
    state = optimizer.init(w)
    for step in range(4):
        g = {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
        if step % comm.size == comm.rank:
            store.inc(g)
        store.clock()
        optimizer.update(w, g, state)
        got = store.get()
        same = {name: got[name].tobytes() == w[name].tobytes() for name in w}
        agree(comm, all(same.values()), str(same))
    store.free()


def test_sums_are_complete_whoever_serves(comm, agree):
    for servers in (1, 2, None):
        store = ParameterStore([np.zeros(10, np.float32), np.zeros((3, 5))], "sgd:lr=1", comm=comm, servers=servers)
        for _ in range(20):
            store.inc({"0": -np.ones(10, np.float32), "1": -np.ones((3, 5))})
        values = store.synchronize()
        agree(comm, all((x == 20 * comm.size).all() for x in values.values()), str(values))
        store.free()


def test_rows_travel_alone_in_any_order_and_add_up(comm, agree):
    table = np.arange(4000.0).reshape(1000, 4)
    store = ParameterStore({"t": table, "b": np.zeros(3)}, UP, comm=comm, staleness=0)
    rows = np.array([999, 3, 3, 0])
    got = store.get(rows={"t": rows})
    agree(comm, list(got) == ["t"] and (got["t"] == table[rows]).all(), str(got))
    before = store.bytes_sent
    store.inc({"t": -np.ones((4, 4))}, rows={"t": rows})
    store.clock()
    got = store.get(rows={"t": [3, 5]})["t"] - table[[3, 5]]
    agree(comm, (got == np.array([[2.0], [0.0]]) * comm.size).all(), str(got))
    agree(comm, store.bytes_sent - before < table.nbytes, f"{store.bytes_sent - before} bytes for four rows")
    got = store.get()
    agree(comm, (got["t"].sum() == table.sum() + 16 * comm.size) and not got["b"].any())
    agree(comm, store.get(rows={"t": []})["t"].shape == (0, 4))
    store.free()


@pytest.mark.parametrize("way", WAYS[:3], indirect=True)
@pytest.mark.parametrize("optimizer", [UP, bitring.AdaGrad(lr=1.0)], ids=["made in the cache", "read anew"])
@pytest.mark.parametrize("staleness", [0, 2])
def test_cached_rows_are_as_new_as_the_staleness_asks(comm, agree, optimizer, staleness):
    """Each rank adds to a row of its own in each clock, and all read all rows three times a clock."""
    for cache in (False, True):
        store = ParameterStore(zeros(w=(comm.size, 3)), optimizer, comm=comm, staleness=staleness, cache=cache)
        per_clock = np.cumsum([1 / math.sqrt(c + 1) for c in range(12)]) if optimizer is not UP else np.arange(1, 13)
        after = np.concatenate(([0.0], per_clock))  # a row's value after so many updates
        bad: list[Any] = []
        for c in range(12):
            for _ in range(3):
                seen = store.get(rows={"w": np.arange(comm.size)})["w"]
                low = after[max(0, c - staleness)]
                if (seen < low - 1e-9).any() or not np.allclose(seen[comm.rank], after[c]):
                    bad.append((c, seen[:, 0].tolist()))
            store.inc({"w": -np.ones((1, 3))}, rows={"w": [comm.rank]})
            seen = store.get(rows={"w": [comm.rank]})["w"]
            if not np.allclose(seen, after[c + 1]):
                bad.append((c, "own", seen.tolist()))
            store.clock()
        counts = store.telemetry()
        if counts.get("cached_rows", 0) < 24 * comm.size and cache and isinstance(store._table, MessageTable):
            bad.append(("cached", counts))
        store.leave()
        values = store.synchronize()["w"]
        agree(comm, not bad and np.allclose(values, after[12]), f"{bad} {values}")
        agree(comm, store.get(rows={"w": [0]})["w"].tobytes() == values[:1].tobytes())
        store.free()


def test_a_whole_gradient_and_a_whole_read_renew_what_is_cached(comm, agree):
    store = ParameterStore(zeros(w=(5, 2), b=(3,)), UP, comm=comm, staleness=1, cache=True)
    for c in range(4):
        agree(comm, (store.get(rows={"w": [4, 1, 1], "b": [0]})["w"] >= c).all())
        store.inc({"w": -np.ones((5, 2)), "b": -np.ones(3)})
        mine = store.get(rows={"w": [1], "b": [0, 2]})
        agree(comm, (mine["w"] >= c + 1).all() and (mine["b"] >= c + 1).all(), str(mine))
        whole = store.get()["w"]
        agree(comm, (store.get(rows={"w": np.arange(5)})["w"] >= whole).all())
        store.clock()
    store.synchronize()
    agree(comm, (store.get(rows={"w": [3]})["w"] == 4 * comm.size).all())
    store.free()


def test_adagrad_sees_the_rows_that_are_touched(comm, agree):
    store = ParameterStore({"t": np.zeros((6, 2))}, bitring.AdaGrad(lr=1.0), comm=comm)
    if comm.rank == comm.size - 1:
        store.inc({"t": np.full((1, 2), 3.0)}, rows={"t": [2]})
        store.inc({"t": np.full((1, 2), 4.0)}, rows={"t": [2]})
    values = store.synchronize()["t"]
    agree(comm, np.allclose(values[2], -1 - 4 / 5) and not np.delete(values, 2, 0).any(), str(values))
    store.free()


def await_their_reads(store: ParameterStore, others: int) -> None:
    """Until so many ranks are held back here, where it can be seen."""
    owner = store._table._service.owner if isinstance(store._table, MessageTable) else None
    until = time.monotonic() + 30
    while owner is not None and owner.waiting < others and time.monotonic() < until:
        time.sleep(1e-3)


def test_a_slow_rank_holds_back_by_staleness_alone_and_none_waits_for_none(comm, agree):
    """Rank 0 stays at clock 0 until others have come to clock s + 1, with None to the end; then it leaves."""
    for staleness in (1, None):
        store = ParameterStore(zeros(w=4), UP, comm=comm, staleness=staleness)
        bad: list[Any] = []
        if comm.rank == 0:
            for other in range(1, comm.size):
                comm.recv(source=other)
            if staleness is not None:
                await_their_reads(store, comm.size - 1)
        for c in range(6 * (comm.rank > 0)):
            if staleness is not None and c == staleness + 1:
                comm.send("here", 0)
            store.get()
            waited = math.isinf(store.clocks[0])
            if waited != (staleness is not None and c > staleness):
                bad.append((c, store.clocks))
            store.inc(ones(w=4))
            store.clock()
        if staleness is None and comm.rank > 0:
            comm.send("through", 0)
        store.leave()
        named = set(store.telemetry()["waited_for"])
        asked = comm.rank > 0 and isinstance(store._table, MessageTable)  # else rank 0 may have left before
        if named if staleness is None else asked and 0 not in named:
            bad.append(("waited for", named))
        agree(comm, not bad, str(bad))
        store.free()


@pytest.mark.parametrize("how", ["leave", "with", "free"])
def test_who_has_left_is_waited_for_by_nobody(comm, agree, how):
    store = ParameterStore(zeros(w=4), UP, comm=comm, staleness=0)
    steps = 3 + 2 * comm.rank
    if how == "with":
        with store:
            for _ in range(steps):
                one_clock(store)
    else:
        for _ in range(steps):
            one_clock(store)
        if how == "leave":
            store.leave()
    if how != "free":
        wrong = [raising(lambda: store.inc(ones(w=4))), raising(store.clock)]
        agree(comm, all("has left" in str(each) for each in wrong), str(wrong))
        values = store.synchronize()["w"]
        total = sum(3 + 2 * rank for rank in range(comm.size))
        agree(comm, (values == total).all() and (store.get()["w"] == total).all(), f"{values}, not {total}")
        agree(comm, all(math.isinf(clock) for clock in store.clocks), str(store.clocks))
    store.free()
    agree(comm, "has been freed" in str(raising(store.get)))


def test_who_waits_for_all_holds_nobody_back_and_clocks_are_equal_then(comm, agree):
    store = ParameterStore(zeros(w=4), UP, comm=comm, staleness=1)
    for _ in range(1 + 5 * (comm.rank == comm.size - 1)):
        one_clock(store)
    values = store.synchronize()["w"]
    agree(comm, (values == comm.size + 5).all(), str(values))
    agree(comm, store.clocks == [6.0] * comm.size, str(store.clocks))
    for _ in range(3):
        one_clock(store)
    agree(comm, (store.synchronize()["w"] == 4 * comm.size + 5).all())
    store.free()


def test_collectives_beside_a_store(comm, agree):
    """One rank is in an Allreduce while the others pull from its shard."""
    shared = bitring.Communicator(comm)
    for _ in range(3):
        shared.Allreduce(MPI.IN_PLACE, np.ones(8))
    store = ParameterStore(zeros(w=40), UP, comm=comm)
    if comm.rank:
        for _ in range(20):
            store.get()
            store.inc(ones(w=40))
    x = np.ones(5)
    shared.Allreduce(MPI.IN_PLACE, x)
    agree(comm, (x == comm.size).all())
    agree(comm, (store.synchronize()["w"] == -20 * (comm.size - 1)).all())
    store.free()


def test_two_stores_and_many_made_and_freed(comm, agree):
    first, second = (ParameterStore(zeros(w=4), UP, comm=comm) for _ in range(2))
    first.inc(ones(w=4))
    second.inc({"w": 2 * np.ones(4)})
    agree(comm, (second.synchronize()["w"] == -2 * comm.size).all())
    agree(comm, (first.synchronize()["w"] == -comm.size).all())
    second.free()
    first.free()
    for _ in range(8):
        with ParameterStore(zeros(w=3), UP, comm=comm) as store:
            store.inc(ones(w=3))
        store.free()


def test_what_is_wrong_with_a_call_is_said_and_changes_nothing(comm, agree):
    store = ParameterStore({"w": np.zeros((3, 2)), "s": np.zeros(())}, UP, comm=comm)
    nan, number = np.full((3, 2), np.nan), cast(Any, [1])
    cases = [
        (lambda: store.inc(number), TypeError, "ParameterStore.inc: gradients must be a dict of arrays, got list"),
        (lambda: store.inc({"x": nan}), ValueError, "ParameterStore.inc: 'x' is no parameter; known: w, s"),
        (
            lambda: store.inc({"w": np.zeros((3, 3))}),
            ValueError,
            "the gradient of 'w' must be float64 of shape (3, 2), got float64 of shape (3, 3)",
        ),
        (lambda: store.inc({"w": np.zeros((3, 2), "f")}), ValueError, "must be float64 of shape (3, 2), got float32"),
        (lambda: store.inc({"w": nan}), NonFiniteError, f"the gradient of 'w' holds NaN on rank {comm.rank}"),
        (lambda: store.inc({}, rows={"w": [0]}), ValueError, "rows names 'w', of which gradients has none"),
        (lambda: store.get(rows=number), TypeError, "ParameterStore.get: rows must be a dict of a parameter's name"),
        (lambda: store.get(rows={"x": [0]}), ValueError, "rows: 'x' is no parameter; known: w, s"),
        (lambda: store.get(rows={"s": [0]}), ValueError, "'s' has no dimensions, and so no rows"),
        (
            lambda: store.get(rows={"w": [0.5]}),
            TypeError,
            "rows of 'w' must be 1-D integers, got float64 of shape (1,)",
        ),
        (lambda: store.get(rows={"w": [0, 3]}), ValueError, "rows of 'w' must be 0 to 2, got 3"),
        (lambda: store.get(rows={"w": [-1]}), ValueError, "rows of 'w' must be 0 to 2, got -1"),
    ]
    for call, kind, text in cases:
        error = raising(call)
        agree(comm, type(error) is kind and text in str(error), f"{text}: {error!r}")
    agree(comm, not store.synchronize()["w"].any())
    store.free()


def test_bad_arguments_raise_on_all_ranks(comm, agree):
    last = comm.rank == comm.size - 1
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"parameters": 3}, TypeError, "ParameterStore: parameters must be a dict or a list of arrays, got int"),
        ({"optimizer": "none"}, ValueError, "ParameterStore: unknown optimizer 'none'"),
        ({"staleness": -1}, ValueError, "ParameterStore: staleness must be at least 0; got -1"),
        ({"staleness": 1.5}, TypeError, "ParameterStore: staleness must be an int; got float"),
        ({"servers": 0}, ValueError, "ParameterStore: servers must be at least 1; got 0"),
        ({"copies": 2}, ValueError, "ParameterStore: copies must be 0 to 1; got 2"),
    ]
    for wrong, kind, text in cases:
        given: dict[str, Any] = {"parameters": zeros(w=3), "optimizer": UP, "staleness": None, "servers": None}
        given |= wrong if last else {}
        parameters, optimizer = given.pop("parameters"), given.pop("optimizer")
        error = raising(lambda p=parameters, o=optimizer, g=given: ParameterStore(p, o, comm=comm, **g))
        agree(comm, type(error) is (kind if last else PeerError) and text in str(error), repr(error))
    if comm.size > 1:
        error = raising(lambda: ParameterStore(zeros(w=3), UP, comm=comm, staleness=comm.rank))
        agree(comm, type(error) is MismatchError and "staleness" in str(error), repr(error))
        error = raising(lambda: ParameterStore(zeros(w=3 + comm.rank), UP, comm=comm))
        agree(comm, type(error) is MismatchError and "parameters" in str(error), repr(error))


def test_one_thread_at_a_time(comm, agree):
    store = ParameterStore(zeros(w=3), UP, comm=comm)
    store._calling.acquire()
    error = raising(store.get)
    store._calling.release()
    agree(comm, "ParameterStore.get: another thread is in one of its calls" in str(error))
    store.free()


def test_the_end_may_have_come_when_a_rank_has_just_said_its_own(monkeypatch):
    """Another thread, which serves the store, sees the last word and is done before its sender looks again."""
    store = MessageTable(Setup(MPI.COMM_SELF, "test", {"w": np.zeros(3)}, bitring.SGD(lr=1.0), Terms()))
    post, job = store._service.post, store._job._job

    def and_serve(rank: int, kind: Kind, *what: Any) -> None:
        post(rank, kind, *what)
        if kind == Kind.END:
            engine.drive(job)

    monkeypatch.setattr(store._service, "post", and_serve)
    store.free()
    assert store.over and job.error is None
