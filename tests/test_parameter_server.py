"""The modes of the parameter server: against sync and plain optimizers, conservation, who waits, and the end."""

import time
from typing import Any

import numpy as np
import pytest

import bitring
from bitring import DataParallel, NonFiniteError, ParameterServer, PeerError
from bitring.collectives.runtime.objects import allgather

SHAPES = {"a": (13, 4), "b": (7,), "scalar": ()}
NAMED = ["asynchronous", "ssp", "soft_sync", "backup_workers", "parameter_server", "project_adam"]


def parameters(dtype: Any = np.float32) -> dict[str, Any]:
    return {name: np.full(shape, 0.5, dtype) for name, shape in SHAPES.items()}


def gradients_of(w: dict[str, Any], rank: int, step: int) -> dict[str, Any]:
    rng = np.random.default_rng((rank, step))
    return {name: (x - rng.standard_normal(x.shape)).astype(x.dtype) for name, x in w.items()}


def packed(w: dict[str, Any]) -> bytes:
    return b"".join(x.tobytes() for x in w.values())


def trained(comm: Any, mode: Any, optimizer: Any, steps: int = 8, **options: Any) -> bytes:
    w = parameters()
    trainer = DataParallel(w, optimizer, comm=comm, mode=mode, **options)
    for step in range(steps):
        trainer.step(gradients_of(w, comm.rank, step), weight=1 + comm.rank)
    trainer.synchronize()
    trainer.free()
    return packed(w)


def raising(call: Any) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


OPTIMIZERS = [bitring.SGD(lr=0.05, momentum=0.9), bitring.AdaGrad(lr=0.1), bitring.Adam(lr=0.01)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: type(each).__name__)
def test_on_one_rank_each_is_the_optimizer_alone_to_the_bit(comm, agree, optimizer):
    from mpi4py import MPI

    wanted = trained(MPI.COMM_SELF, "sync", optimizer)
    for mode in (*NAMED, "downpour:fetch=1,push=1"):
        agree(comm, trained(MPI.COMM_SELF, mode, optimizer) == wanted, mode)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: type(each).__name__)
def test_gathering_all_without_staleness_is_sync_added_in_rank_order(comm, agree, optimizer):
    w = parameters()
    state = optimizer.init(w)
    total = sum(range(1, comm.size + 1))
    for step in range(8):
        sums: dict[str, Any] = {}
        for rank in range(comm.size):
            for name, g in gradients_of(w, rank, step).items():
                scaled = np.multiply(g, (1 + rank) / total)
                sums[name] = sums[name] + scaled if name in sums else scaled
        optimizer.update(w, sums, state)
    gathering, with_copies = (ParameterServer(gather=comm.size, staleness=0, copies=n) for n in (0, 1))
    for mode in (gathering, with_copies, bitring.BackupWorkers(gather=comm.size)):
        agree(comm, trained(comm, mode, optimizer) == packed(w), repr(mode))
    if comm.size <= 2:
        agree(comm, trained(comm, "sync", optimizer) == packed(w))


def test_adding_up_leaves_nothing_out(comm, agree):
    """SGD(lr=1) from 0: minus the sum of all gradients that were applied, whatever the mode."""
    modes = ("asynchronous:scale=none", "ssp:staleness=1", "downpour:fetch=2,push=3", "project_adam", "soft_sync")
    for mode in (*modes, "ssp:staleness=1,copies=1"):
        w = {"w": np.zeros((9, 2))}
        trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode=mode)
        for _ in range(7):
            trainer.step({"w": -np.ones((9, 2))})
        trainer.synchronize()
        counts = allgather(comm, trainer.telemetry(), "test")
        if mode != "soft_sync":
            agree(comm, bool((w["w"] == 7 * comm.size).all()), f"{mode}: {w['w'][0]}")
        pushes = 7 if "downpour" not in mode else 3
        agree(comm, all(each["applied"] == pushes * comm.size for each in counts), f"{mode}: {counts}")
        trainer.free()


def test_backup_workers_drop_the_slow_ones_updates_and_count_them(comm, agree):
    w = {"w": np.zeros((9, 2))}
    trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode=bitring.BackupWorkers(gather=max(1, comm.size - 1)))
    for _ in range(6):
        if comm.rank == comm.size - 1:
            time.sleep(0.01)
        trainer.step({"w": -np.ones((9, 2))})
    trainer.leave()
    trainer.synchronize()
    counts = trainer.telemetry()
    agree(comm, counts["applied"] + counts["dropped"] == 6 * comm.size, str(counts))
    agree(comm, set(counts["staleness"]) <= {0}, str(counts))
    trainer.free()


def test_the_first_steps_may_be_made_by_one_rank(comm, agree):
    w = {"w": np.zeros(4)}
    trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode=ParameterServer(lone_steps=3, staleness=0))
    seen = []
    for _ in range(3 if comm.rank == 0 else 1):
        trainer.step({"w": -np.ones(4)})
        seen.append(float(w["w"][0]))
    agree(comm, seen == ([1.0, 2.0, 3.0] if comm.rank == 0 else [3.0]), str(seen))
    trainer.synchronize()
    for _ in range(2):
        trainer.step({"w": -np.ones(4)})
    trainer.synchronize()
    agree(comm, bool((w["w"] == 3 + 2 * comm.size).all()), str(w))
    trainer.free()


@pytest.mark.parametrize(
    "mode", ["ssp:staleness=1", "soft_sync:gather=3", "backup_workers:gather=3", "downpour", "downpour:copies=1"]
)
def test_ranks_may_make_any_numbers_of_steps(comm, agree, mode):
    w = parameters()
    with DataParallel(w, "sgd", comm=comm, mode=mode) as trainer:
        for step in range(2 + 3 * comm.rank):
            trainer.step(gradients_of(w, comm.rank, step))
    error = raising(lambda: trainer.step(gradients_of(w, comm.rank, 0)))
    agree(comm, "this rank has left; it can synchronize, save and free" in str(error), repr(error))
    trainer.synchronize()
    agree(comm, len(set(allgather(comm, trainer.digest(), "test"))) == 1)
    trainer.free()


def test_a_gradient_that_is_no_number_raises_once_on_all_and_holds_nobody_back(comm, agree):
    last = comm.size - 1
    w = {"w": np.zeros(3)}
    trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode="ssp:staleness=0")
    said: list[str] = []
    for step in range(8):
        bad = step == 2 and comm.rank == last
        error = raising(lambda bad=bad: trainer.step({"w": np.full(3, np.nan if bad else -1.0)}))
        if error is not None:
            said.append(f"{step} {error!r}")
            trainer.step({"w": -np.ones(3)})
    agree(comm, len(said) == 1 and "NonFiniteError" in said[0], str(said))
    agree(comm, f"'w' holds NaN on rank {last}" in said[0], str(said))
    trainer.synchronize()
    agree(comm, bool((w["w"] == 8 * comm.size - 1).all()), str(w))
    trainer.free()


def test_what_is_told_is_raised_by_synchronize_at_the_latest(comm, agree):
    for mode in (ParameterServer(), ParameterServer(servers=1), ParameterServer(copies=1)):
        w = {"w": np.zeros(3)}
        trainer = DataParallel(w, "sgd", comm=comm, mode=mode)
        trainer.step({"w": np.full(3, np.inf if comm.rank == comm.size - 1 else 1.0)})
        error = raising(trainer.synchronize)
        agree(comm, type(error) is NonFiniteError, repr(error))
        trainer.synchronize()
        trainer.free()


def test_gradients_may_come_one_by_one(comm, agree):
    w = parameters()
    trainer = DataParallel(w, "sgd", comm=comm, mode="ssp", unused="zeros")
    g = gradients_of(w, comm.rank, 0)
    with trainer.begin(weight=2):
        for name in ("b", "a"):
            trainer.ready(name, g[name])
        trainer.step()
    agree(comm, "no step is open" in str(raising(lambda: trainer.ready("a", g["a"]))))
    try:
        with trainer.begin(weight=2):
            raise OSError("no data")
    except OSError:
        pass
    trainer.step(g)
    agree(comm, trainer.steps == 2)
    trainer.begin()
    agree(comm, "was not made" in str(raising(trainer.begin)))
    trainer.synchronize()
    trainer.free()


@pytest.mark.single
@pytest.mark.parametrize(("mode", "waits"), [("asynchronous", "Worker._fetch"), ("peers", "PeerReplica._apply")])
def test_an_interrupted_step_that_has_been_made_counts(comm, agree, monkeypatch, mode, waits):
    from bitring.training.store import peer_replica, worker

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    w = parameters()
    trainer = DataParallel(w, bitring.SGD(lr=0.05), comm=comm, mode=mode)
    trainer.step(gradients_of(w, 0, 0))
    wheres = {"Worker": worker, "PeerReplica": peer_replica}
    kind, method = waits.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(wheres[kind], kind), method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.step(gradients_of(w, 0, 1))
    agree(comm, trainer.steps == 2)
    with monkeypatch.context() as patch:  # before it has been made
        patch.setattr(getattr(wheres[kind], kind), "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.step(gradients_of(w, 0, 2))
    trainer.synchronize()
    agree(comm, trainer.steps == 2)
    trainer.free()


def test_settings_put_in_later_hold_for_the_pushes_after(comm, agree):
    w = {"w": np.zeros(3)}
    trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode="ssp:staleness=0")
    for lr in (1.0, 0.5, 0.25):
        trainer.optimizer = bitring.SGD(lr=lr)
        trainer.step({"w": -np.ones(3)})
    trainer.synchronize()
    agree(comm, bool((w["w"] == 1.75 * comm.size).all()), str(w))
    error = raising(lambda: setattr(trainer, "mode", "ssp:staleness=2"))
    agree(comm, "SSP: its settings hold for a trainer's life, got" in str(error), repr(error))
    trainer.free()


def test_a_rank_may_raise_and_go_on_alone(comm, agree):
    w = {"w": np.zeros(3)}
    trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode="ssp:staleness=2")
    ok = True
    for step in range(4):
        if comm.rank == 0 and step == 1:
            error = raising(lambda: trainer.step({"w": np.ones(4)}))
            ok = "must be float64 of shape (3,)" in str(error)
        trainer.step({"w": -np.ones(3)})
    trainer.synchronize()
    agree(comm, ok)
    agree(comm, bool((w["w"] == 4 * comm.size).all()), str(w))
    trainer.free()


def test_what_cannot_be_is_said_on_all_ranks(comm, agree):
    w = parameters()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "ssp", "compression": "powersgd"}, "SSP: compression must be an encoder, whose payloads can go to"),
        ({"mode": "ssp", "check_every": 3}, "check_every must be 0 in mode ssp, in which ranks do not make"),
        ({"mode": "ssp:staleness=-1"}, "staleness must be at least 0; got -1"),
        ({"mode": "backup_workers:staleness=1"}, "BackupWorkers: late='drop' goes in rounds, and needs staleness=None"),
        ({"mode": "ssp:copies=1,record=x"}, "SSP: copies: whoever takes a shard over writes and follows no record"),
        ({"mode": "backup_workers:fetch=2"}, "BackupWorkers: late='drop' goes in rounds, and needs a fetch after each"),
    ]
    for options, text in cases:
        error = raising(lambda options=options: DataParallel(w, "sgd", comm=comm, **options))
        agree(comm, text in str(error), repr(error))
    trainer = DataParallel(w, "sgd", comm=comm)
    error = raising(trainer.leave)
    agree(comm, "in mode sync all ranks make equally many steps" in str(error), repr(error))
    trainer.free()
    if comm.size > 1:
        error = raising(lambda: DataParallel(w, "sgd", comm=comm, mode=f"ssp:staleness={comm.rank}"))
        agree(comm, isinstance(error, (bitring.MismatchError, PeerError)), repr(error))


@pytest.mark.parametrize(
    ("mode", "compression"),
    [
        ("asynchronous", "onebit"),
        ("ssp", "float16"),
        ("backup_workers:gather=2", "onebit"),
        ("backup_workers:gather=2,copies=1", "onebit"),
    ],
)
def test_encoded_both_ways_it_comes_to_the_same_place(comm, agree, mode, compression):
    """A quadratic with its minimum at 1, and noise of no mean; few bytes travel."""
    rng = np.random.default_rng(comm.rank)
    sent = {}
    mode += (":" if ":" not in mode else ",") + f"servers={comm.size}"  # shards that are reached by messages
    for each in (None, compression):
        w = {"w": np.zeros((64, 64), np.float32)}
        trainer = DataParallel(w, bitring.SGD(lr=0.1), comm=comm, mode=mode, compression=each)
        for _ in range(40):
            noise = rng.standard_normal((64, 64)).astype(np.float32) * 0.1
            trainer.step({"w": (w["w"] - 1 + noise).astype(np.float32)})
        trainer.synchronize()
        sent[each] = trainer.bytes_sent
        away = float(np.abs(w["w"] - 1).mean())
        agree(comm, away < 0.15, f"{away} away")
        agree(comm, len(set(allgather(comm, trainer.digest(), "test"))) == 1)
        trainer.free()
    if comm.size > 1 and compression == "onebit":
        agree(comm, sent[compression] * 4 < sent[None], str(sent))
