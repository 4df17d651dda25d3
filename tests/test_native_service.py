"""The native service of stores: it serves while its rank holds the interpreter, and hands over what is rare."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import select
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.objects import allgather
from bitring.native import extension, native
from bitring.settings import make
from bitring.training.optimizer import optimizers
from bitring.training.store import making, native_service
from bitring.training.store.messages import MessageTable
from bitring.training.store.native_service import NativeService
from bitring.training.store.owner import WINDOW, Kind
from bitring.training.store.rule import Terms
from bitring.training.store.table import Setup, Update

pytestmark = pytest.mark.skipif(native() is None, reason="there is no native engine")


@pytest.fixture(autouse=True)
def by_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "serves", lambda setup: False)


def service_of(store: bitring.ParameterStore) -> Any:
    assert isinstance(store._table, MessageTable)
    return store._table._service


class _Poll(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


def holds_the_interpreter_until(descriptor: int, milliseconds: int) -> bool:
    """Whether something can be read in that time, in which no other thread of this process runs any Python."""
    watched = _Poll(descriptor, select.POLLIN, 0)
    return bool(ctypes.PyDLL(None).poll(ctypes.byref(watched), 1, milliseconds))


def progress_is_native() -> bool:
    """Whether the progress thread is inside the extension."""
    assert engine._thread is not None and engine._thread.ident is not None
    frame = sys._current_frames()[engine._thread.ident]
    return frame.f_code is engine._turn.__func__.__code__ and engine._lock.locked()


@pytest.mark.skipif(MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="there is no progress thread")
@pytest.mark.parametrize("encoder", [None, bitring.OneBit(block=64)], ids=["as they are", "onebit"])
def test_a_rank_that_holds_the_interpreter_serves(comm, agree, mpi_tmp_path: Path, encoder):
    """Rank 0 does nothing but hold it until the others say, past MPI, that their updates are applied and read."""
    if comm.size == 1:
        return
    pipe = mpi_tmp_path / "pipe"
    if comm.rank == 0:
        os.mkfifo(pipe)
    values, encoders = {"w": np.zeros(64)}, {"w": encoder}
    if encoder is not None:
        encoder.warm_up(np.float64)
    store = MessageTable(Setup(comm, "test", values, bitring.SGD(lr=1.0), Terms(), servers=1, encoders=encoders))
    served = False
    descriptor = os.open(pipe, os.O_RDWR)
    for attempt in range(1, 9):  # it may have come back to Python just then
        store.settle()
        if comm.rank == 0:
            while not progress_is_native():
                time.sleep(1e-3)
            told = 0
            while told < comm.size - 1 and holds_the_interpreter_until(descriptor, 3_000):
                told += len(os.read(descriptor, 1))
            served = served or told == comm.size - 1
        else:
            store.push(Update({"w": -np.ones(64)}, {}))
            agree_here = store.pull()["w"][0] >= attempt
            if agree_here:
                os.write(descriptor, b"x")
        served = allgather(comm, served, "test")[0]
        if served:
            break
    agree(comm, served, "nothing was served while the interpreter was held")
    os.close(descriptor)
    store.free()


@dataclasses.dataclass(frozen=True)
class WithoutKernels(bitring.OneBit):
    def encode(self, values: Any, residual: Any, payload: Any, seed: int = 0) -> int:  # type: ignore[override]
        return super().encode(values, residual, payload, seed)


@pytest.mark.parametrize("served", [True, False])
def test_what_is_encoded_by_kernels_is_served_natively(comm, agree, served):
    encoder = bitring.OneBit(block=64) if served else WithoutKernels(block=64)
    setup = Setup(comm, "test", {"w": np.zeros((99, 2))}, bitring.SGD(), Terms(), encoders={"w": encoder})
    table = MessageTable(setup)
    agree(comm, isinstance(table._service, NativeService) == served)
    table.push(Update({"w": np.ones((99, 2))}, {}))
    table.pull()
    table.free()


def test_what_is_served_natively(comm, agree):
    stores = {
        "plain": bitring.ParameterStore({"w": np.zeros(8)}, "adagrad:lr=1", comm=comm, staleness=1),
        "no kernel": bitring.ParameterStore({"w": np.zeros(8)}, "adam", comm=comm),
        "16 bits": bitring.ParameterStore({"w": np.zeros(8, np.float16)}, "sgd", comm=comm),
    }
    kinds = {name: isinstance(service_of(store), NativeService) for name, store in stores.items()}
    agree(comm, kinds == {"plain": True, "no kernel": False, "16 bits": False}, str(kinds))
    for store in stores.values():
        store.free()


@pytest.mark.parametrize("terms", [Terms(gather=9, staleness=0), Terms(gather=9, late="drop")], ids=["mean", "rounds"])
@pytest.mark.parametrize("optimizer", ["sgd:lr=0.1,momentum=0.9", "adagrad:lr=0.1"])
@pytest.mark.parametrize("encoder", [None, bitring.OneBit(block=64), bitring.OneBit(block=64, levels="rank_one")])
def test_gathered_updates_have_the_references_bits(comm, agree, monkeypatch, terms, optimizer, encoder):
    """All ranks' are gathered in each clock, whole and of some rows, of different weights, whoever serves them.

    What is read has the same bits, too, as has what encoding left out.
    """
    able = native_service.serves
    ends: dict[str, bytes] = {}
    for way in ("native", "some in Python", "in Python"):
        mine = way == "native" or (way == "some in Python" and comm.rank % 2 == 1)
        monkeypatch.setattr(native_service, "serves", lambda *setup, mine=mine: mine and able(*setup))
        values = {"w": np.ones((31, 5), np.float32), "v": np.ones(65), "scalar": np.ones(())}
        gathers = dataclasses.replace(terms, gather=comm.size)
        encoders = dict.fromkeys(values, encoder)
        table = MessageTable(Setup(comm, "test", values, make(optimizer, optimizers), gathers, encoders=encoders))
        agree(comm, isinstance(table._service, NativeService) == mine)
        rng = np.random.default_rng(comm.rank)
        seen: list[Any] = []
        for clock in range(6):
            rows = np.flatnonzero(rng.random(31) < 0.5)
            some = clock % 3 != 1 and (clock % 3 == 0 or comm.rank > 0)
            g = {name: rng.standard_normal(w.shape).astype(w.dtype) for name, w in values.items()}
            if some:
                g["w"] = g["w"][rows]
            table.push(Update(g, {"w": rows} if some else {}, weight=float(comm.rank + 1)))
            table.tick()
            seen += table.pull().values()
        seen += [*table.settle().values(), *table.residuals.values()]
        ends[way] = b"".join(x.tobytes() for x in seen)
        counts = table.counts()
        agree(comm, counts["applied"] == 6 * comm.size and counts["dropped"] == 0, f"{way}: {counts}")
        table.free()
    agree(comm, len(set(ends.values())) == 1, str({way: hash(end) for way, end in ends.items()}))


def test_its_numbers_are_those_of_the_reference():
    assert extension.StoreOwner.window == WINDOW
    known = {name.upper(): kind.value for name, kind in extension.StoreKind.__members__.items()}
    of_copies = {"DIED", "HEARD", "COPY", "COPIED", "TAKES_OVER"}  # which are served in Python
    assert known == {name: kind for name, kind in Kind.__members__.items() if name not in of_copies}


def test_other_settings_hold_for_updates_from_then_on(comm, agree):
    """As a trainer's that are changed: they are handed over to Python, in order."""
    store = bitring.ParameterStore({"w": np.zeros(40)}, bitring.SGD(lr=1.0), comm=comm)
    for lr in (1.0, 10.0, 100.0):
        store._table.use(bitring.SGD(lr=lr))
        for _ in range(3):
            store.inc({"w": -np.ones(40)})
    values = store.synchronize()["w"]
    agree(comm, (values == 333 * comm.size).all(), str(values))
    agree(comm, sum(allgather(comm, store.telemetry()["applied"], "test")) >= 9 * comm.size)
    store.free()


def test_nothing_is_left_of_a_store_that_is_freed(comm, agree):
    def shard_of_one_that_is_freed() -> Any:
        store = bitring.ParameterStore({"w": np.zeros(8)}, "sgd", comm=comm)
        store.inc({"w": np.ones(8)})
        shard = weakref.ref(service_of(store).owner.shard)
        store.free()
        return shard

    shards = [shard_of_one_that_is_freed() for _ in range(3)]
    gc.collect()
    agree(comm, [shard() for shard in shards[:2]] == [None, None])


def test_an_update_that_does_not_fit_is_an_error_and_nothing_is_written(comm, agree):
    store = bitring.ParameterStore({"w": np.zeros(8)}, bitring.SGD(lr=1.0), comm=comm, servers=1)
    raised = ""
    if comm.rank == comm.size - 1:
        service_of(store).post(0, Kind.PUSH, 0, (1.0, 0.0), np.array([1, 0, 1, 8, 0, 99, 0], np.int64))
    try:
        store.synchronize()
    except (RuntimeError, bitring.PeerError) as error:
        raised = str(error)
    agree(comm, "does not fit the shard" in raised or (comm.rank > 0 and "rank 0 has failed" in raised), raised)
