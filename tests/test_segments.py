"""Updates that travel in segments: what they are cut into, who applies them early, and what the others see."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitring
from bitring import NonFiniteError
from bitring.collectives.runtime.objects import allgather
from bitring.native import native
from bitring.settings import make
from bitring.training.optimizer import optimizers
from bitring.training.store import making, native_service, segments
from bitring.training.store.layout import Layout
from bitring.training.store.messages import MessageTable
from bitring.training.store.owner import Kind
from bitring.training.store.packing import Form, Piece, bytes_of, pack
from bitring.training.store.replay import Journal
from bitring.training.store.rule import Terms
from bitring.training.store.table import Setup, Update

WAYS = ["native", "some in Python", "in Python"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """By messages, in segments of 64 bytes."""
    monkeypatch.setattr(making, "serves", lambda setup: False)
    monkeypatch.setattr(segments, "SEGMENT_NBYTES", 64)


def served(way: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    able = native() is not None and (way == "native" or (way == "some in Python" and rank % 2 == 1))
    serves = native_service.serves
    monkeypatch.setattr(native_service, "serves", lambda *setup: able and serves(*setup))


def kinds_posted(table: MessageTable, monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """What the table posts from now on."""
    posted: list[Kind] = []
    post = table._service.post

    def keep(rank: int, kind: Kind, *more: Any) -> None:
        posted.append(kind)
        post(rank, kind, *more)

    monkeypatch.setattr(table._service, "post", keep)
    return posted


@pytest.mark.single
def test_all_values_are_in_one_segment_each_and_none_is_too_large():
    w = {"a": np.zeros((40, 5)), "b": np.zeros(50, np.float32), "c": np.zeros((2, 100)), "d": np.zeros(())}
    layout = Layout(w, 1, False)
    pieces = [Piece(k, None, bytes_of(np.arange(x.size, dtype=x.dtype))) for k, x in enumerate(w.values())]
    found = list(segments.segments(pieces, layout))
    values: dict[int, bytes] = dict.fromkeys(range(4), b"")
    for segment in found:
        assert sum(p.data.size for p in segment) <= 64 or (len(segment) == 1 and segment[0].parameter == 2)
        for piece in segment:
            parameter = layout.parameters[piece.parameter]
            row = parameter.width * parameter.dtype.itemsize
            assert (piece.first or 0) * row == len(values[piece.parameter]), "in order"
            values[piece.parameter] += piece.data.tobytes()
    assert list(values.values()) == [p.data.tobytes() for p in pieces]
    assert [p.parameter for p in found[-1]] == [3]
    assert list(segments.segments([], layout)) == [[]]
    whole = [Piece(0, np.arange(40), pieces[0].data), Piece(1, None, pieces[1].data, Form.ENCODED)]
    assert [p for segment in segments.segments(whole, layout) for p in segment] == whole


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["sgd:lr=0.1,momentum=0.9,weight_decay=0.1", "adagrad:lr=0.1"])
@pytest.mark.parametrize("encoder", [None, bitring.OneBit(block=64)], ids=["as they are", "onebit"])
def test_the_bits_are_those_of_whole_updates(comm, agree, monkeypatch, way, optimizer, encoder):
    """One rank at a time pushes, so that the order is fixed."""
    served(way, comm.rank, monkeypatch)
    ends: list[bytes] = []
    for nbytes in (64, 1 << 20):
        monkeypatch.setattr(segments, "SEGMENT_NBYTES", nbytes)
        values = {"w": np.ones((31, 5), np.float32), "v": np.ones(650), "scalar": np.ones(())}
        made = make(optimizer, optimizers)
        table = MessageTable(Setup(comm, "test", values, made, Terms(), encoders={"v": encoder}))
        posted = kinds_posted(table, monkeypatch)
        rng = np.random.default_rng(0)
        for turn in range(2 * comm.size):
            g = {name: rng.standard_normal(w.shape).astype(w.dtype) for name, w in values.items()}
            rows = np.array([1, 7, 30])
            if turn % comm.size == comm.rank:
                if turn % 2:
                    table.push(Update(g | {"w": g["w"][rows]}, {"w": rows}))
                else:
                    table.push(Update(g, {}))
                table.tick()
            table.settle()
        assert (Kind.PART in posted) == (nbytes == 64)
        ends.append(b"".join(x.tobytes() for each in (table.settle(), *table.slots().values()) for x in each.values()))
        counts = allgather(comm, table.counts().get("applied", 0), "test")
        assert sum(counts) == 2 * comm.size * comm.size, counts
        table.free()
    agree(comm, ends[0] == ends[1])


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_when_all_push_at_once_and_a_checkpoint_comes_between(comm, agree, monkeypatch, way):
    served(way, comm.rank, monkeypatch)
    store = bitring.ParameterStore({"w": np.zeros((60, 7))}, bitring.SGD(lr=1.0), comm=comm, staleness=2)
    for clock in range(6):
        store.inc({"w": np.full((60, 7), -(2.0**clock))})
        seen = store.get()["w"]
        agree(comm, (seen >= 2.0 ** (clock + 1) - 1).all(), f"own updates are missing: {seen.min()}")
        store.clock()
        if clock == 2:  # as a checkpoint does: all that was pushed counts, to the last segment
            agree(comm, (store.synchronize()["w"] == 7.0 * comm.size).all())
    agree(comm, (store.synchronize()["w"] == 63.0 * comm.size).all())
    store.free()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_an_update_with_a_nan_in_its_last_segment_is_applied(comm, agree, monkeypatch, way):
    served(way, comm.rank, monkeypatch)
    store = bitring.ParameterStore({"w": np.zeros(300)}, bitring.SGD(lr=1.0), comm=comm, servers=1)
    g = np.ones(300)
    g[-1] = np.nan
    raised = False
    try:
        store.inc({"w": g})
    except NonFiniteError:
        raised = True
    store.clock()
    agree(comm, raised and (store.synchronize()["w"] == 0).all())
    agree(comm, store.clocks == [1.0] * comm.size, str(store.clocks))
    store.free()


@pytest.mark.parametrize("way", WAYS)
def test_a_trainers_nan_in_the_last_segment_applies_nothing_but_moves_its_clock(comm, agree, monkeypatch, way):
    served(way, comm.rank, monkeypatch)
    w = {"w": np.zeros(300)}
    trainer = bitring.DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode="ssp:staleness=0")
    g = np.full(300, -1.0)
    if comm.rank == comm.size - 1:
        g[-1] = np.inf
    errors = 0
    for step in range(3):
        try:
            trainer.step({"w": g if step == 0 else np.full(300, -1.0)})
        except NonFiniteError:
            errors += 1
    try:
        trainer.synchronize()
    except NonFiniteError:
        errors += 1
    steps = 3 * comm.size - 1 - comm.size  # the first of one rank, and a later one of each that raised, are not made
    agree(comm, errors == 1, str(errors))
    agree(comm, len(set(w["w"])) == 1 and w["w"][0] in (steps, steps + 1), str(w["w"][0]))
    trainer.free()


@pytest.mark.parametrize("way", WAYS)
def test_a_read_between_segments_is_served_at_once_and_sees_those_that_have_come(comm, agree, monkeypatch, way):
    """As in shared memory; the update counts, and the version is another, once all of it has come."""
    if comm.size == 1:
        return
    served(way, comm.rank, monkeypatch)
    table = MessageTable(Setup(comm, "test", {"w": np.zeros(40)}, bitring.SGD(lr=1.0), Terms(staleness=1), servers=1))
    run = -np.ones(10)
    if comm.rank == comm.size - 1:
        post = table._service.post
        post(0, Kind.PART, 0, (), pack([Piece(0, None, bytes_of(run), first=0)]))
        post(0, Kind.PART, 0, (), pack([Piece(0, None, bytes_of(run), first=20)]))
        table.pull({"w": np.array([0])})  # both have come
    allgather(comm, None, "test")
    seen = table.pull()["w"]
    agree(comm, seen.tolist() == [1.0] * 10 + [0.0] * 10 + [1.0] * 10 + [0.0] * 10, str(seen))
    applied = allgather(comm, table.counts().get("applied", 0), "test")
    agree(comm, sum(applied) == 0, str(applied))
    if comm.rank == comm.size - 1:
        rest = [Piece(0, None, bytes_of(run), first=first) for first in (10, 30)]
        table._service.post(0, Kind.PUSH, 0, (1.0, np.nan), pack(rest))
        table._sent[0] += 1
    agree(comm, (table.settle()["w"] == 1.0).all())
    agree(comm, sum(allgather(comm, table.counts().get("applied", 0), "test")) == 1)
    table.free()


def test_where_a_part_cannot_be_alone_updates_travel_whole(comm, agree, monkeypatch, mpi_tmp_path: Path):
    whole: dict[str, Any] = {
        "gathered": {"terms": Terms(gather=2)},
        "dropped": {"terms": Terms(late="drop")},
        "recorded": {"journal": Journal(str(mpi_tmp_path / "run"), None)},
        "copied": {"copies": 1},
        "an optimizer that counts": {"optimizer": bitring.Adam()},
        "as it comes": {},
    }
    for name, given in whole.items():
        settings = {"optimizer": bitring.SGD(), "terms": Terms()} | given
        table = MessageTable(Setup(comm, "test", {"w": np.zeros(500)}, **settings))
        posted = kinds_posted(table, monkeypatch)
        table.push(Update({"w": np.ones(500)}, {}))
        agree(comm, (Kind.PART in posted) == (name == "as it comes"), f"{name}: {posted}")
        table.settle()
        table.free()


@pytest.mark.parametrize("mode", ["asynchronous", "ssp:staleness=2", "project_adam"])
def test_a_record_is_replayed_to_the_bit(comm, agree, monkeypatch, mpi_tmp_path: Path, mode):
    path, ends = mpi_tmp_path / "run", []
    for way in ("record", "replay"):
        w = {"w": np.ones(200)}
        given = f"{mode}{',' if ':' in mode else ':'}{way}={path}"
        trainer = bitring.DataParallel(w, bitring.SGD(lr=0.05, momentum=0.5), comm=comm, mode=given)
        for step in range(5):
            trainer.step({"w": w["w"] - np.random.default_rng((comm.rank, step)).standard_normal(200)})
        trainer.synchronize()
        trainer.free()
        ends.append(w["w"].tobytes())
    agree(comm, ends[0] == ends[1])


DEATH = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
import bitring
from bitring.training.store import making, native_service
from bitring.training.store.owner import Kind
from bitring.training.store.packing import Piece, bytes_of, pack
making.serves = lambda setup: False
if sys.argv[1] == "in Python":
    native_service.serves = lambda *setup: False
comm = MPI.COMM_WORLD
store = bitring.ParameterStore({"w": np.zeros(40)}, bitring.SGD(lr=1.0), comm=comm, servers=1)
store.synchronize()
if comm.rank == 2:
    post = store._table._service.post
    post(0, Kind.PART, 0, (), pack([Piece(0, None, bytes_of(-np.ones(10)), first=0)]))
    store.get(rows={"w": [0]})
    comm.send(None, 1)
    comm.recv(source=1)
    os.kill(os.getpid(), signal.SIGKILL)
if comm.rank == 1:
    comm.recv(source=2)
    first = store.get()["w"][[0, 10]].tolist()
    store.inc({"w": -np.ones(40)})
    print("rank 1 saw", first, store.get()["w"][[0, 10]].tolist(), flush=True)
    comm.send(None, 2)
try:
    store.synchronize()
except bitring.DeadRankError as error:
    print("rank", comm.rank, "heard of", error.ranks, flush=True)
    os._exit(0)
"""


@pytest.mark.single
@pytest.mark.parametrize("way", ["native", "in Python"])
def test_a_worker_that_dies_in_the_midst_leaves_what_has_come_and_holds_nobody_up_until_it_is_named(tmp_path, way):
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    if "HYDRA" not in subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout:
        pytest.skip("needs the mpirun of MPICH, which can be told to let the others live")
    script = tmp_path / "script.py"
    script.write_text(DEATH)
    shell = ("sh", "-c", 'trap "" USR1; "$0" "$@" || exit 3')  # the launcher ends all when its own child is killed
    words = [mpirun, "-disable-auto-cleanup", "-n", "3", *shell, sys.executable, str(script), way]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    said = done.stdout + done.stderr
    assert "rank 1 saw [1.0, 0.0] [2.0, 1.0]" in said, said
    assert all(f"rank {rank} heard of (2,)" in said or f"rank {rank} heard of [2]" in said for rank in (0, 1)), said
