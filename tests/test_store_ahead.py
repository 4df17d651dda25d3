"""Wait-free pushes: gradients travel while others are computed, with the bits of ``step``; and factors of matrices."""

import contextlib
import time
from typing import Any

import numpy as np
import pytest

import bitring
from bitring import DataParallel, Factors, NonFiniteError
from bitring.collectives.runtime.objects import allgather
from bitring.training.store import worker

SHAPES = {"a": (40, 16), "b": (70,), "c": (64, 8)}


def gradients_of(w: dict[str, Any], rank: int, step: int) -> dict[str, Any]:
    rng = np.random.default_rng((rank, step))
    return {name: (x - rng.standard_normal(x.shape)).astype(x.dtype) for name, x in w.items()}


def wait_until(there: Any) -> bool:
    until = time.monotonic() + 30
    while not there() and time.monotonic() < until:
        time.sleep(1e-3)
    return bool(there())


def trained(comm: Any, compression: Any, ahead: bool, gather: int) -> bytes:
    w: dict[str, Any] = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}
    mode = bitring.ParameterServer(gather=gather, staleness=0, servers=comm.size)
    trainer = DataParallel(w, bitring.SGD(lr=0.1, momentum=0.5), comm=comm, mode=mode, compression=compression)
    for step in range(4):
        g = gradients_of(w, comm.rank, step)
        if not ahead:
            trainer.step(g, weight=2 + comm.rank)
            continue
        if step == 2:  # one that is not made leaves no trace
            with contextlib.suppress(OSError), trainer.begin():
                trainer.ready("c", 3 * g["c"])
                raise OSError("no data")
        sent = trainer.bytes_sent
        trainer.begin(weight=2 + comm.rank)
        for name in ("c", "b", "a"):
            trainer.ready(name, g[name])
        assert comm.size == 1 or wait_until(lambda sent=sent: trainer.bytes_sent > sent)
        trainer.step()
    state = trainer.state_dict()
    trainer.free()
    held = [*w.values(), *state["mode"].get("residual", {}).values()]
    return b"".join(x.tobytes() for x in held)


@pytest.mark.parametrize("compression", [None, "onebit:block=64"])
def test_what_travels_ahead_gives_the_bits_of_step(comm, agree, monkeypatch, compression):
    wanted = trained(comm, compression, False, comm.size)
    monkeypatch.setattr(worker, "AHEAD_NBYTES", 1)
    agree(comm, trained(comm, compression, True, comm.size) == wanted)


def test_a_nan_after_some_have_gone_ahead_applies_nothing_and_is_told(comm, agree, monkeypatch):
    monkeypatch.setattr(worker, "AHEAD_NBYTES", 1)
    last, ones = comm.size - 1, np.ones((50, 3))
    w = {"a": np.zeros((50, 3)), "b": np.zeros((50, 3))}
    trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode=f"ssp:staleness=0,servers={comm.size}")
    said: list[str] = []
    for step in range(5):
        bad = step == 1 and comm.rank == last
        for again in range(2):
            try:
                with trainer.begin():
                    trainer.ready("b", -ones)
                    trainer.ready("a", np.nan * ones if bad and not again else -ones)
                    trainer.step()
                break
            except NonFiniteError as error:
                said.append(f"{step} {error}")
    agree(comm, len(said) == 1 and f"'a' holds NaN on rank {last}" in said[0], str(said))
    trainer.synchronize()
    wanted = 5 * comm.size - 1
    agree(comm, all(bool((x == wanted).all()) for x in w.values()), str({name: x[0] for name, x in w.items()}))
    trainer.free()


def test_an_interrupt_while_a_step_is_dropped_leaves_nothing_of_it(comm, agree, monkeypatch):
    monkeypatch.setattr(worker, "AHEAD_NBYTES", 1)
    w = {"a": np.zeros((50, 3)), "b": np.zeros((50, 3))}
    trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode=f"ssp:staleness=0,servers={comm.size}")
    gradients = {name: -np.ones_like(x) for name, x in w.items()}

    def interrupted() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    trainer.begin()
    trainer.ready("b", gradients["b"])
    monkeypatch.setattr(f"{worker.__name__}.Worker.forget", lambda self: interrupted())
    raised: list[type[BaseException]] = []
    while not trainer.steps:
        try:
            trainer.step(gradients)
        except BaseException as error:
            raised.append(type(error))
    agree(comm, raised == [KeyboardInterrupt, TypeError], str(raised))
    trainer.synchronize()
    agree(comm, all(bool((x == comm.size).all()) for x in w.values()), str({name: x[0] for name, x in w.items()}))
    trainer.free()


def test_without_messages_or_with_own_updates_between_they_are_kept(comm, agree, monkeypatch):
    monkeypatch.setattr(worker, "AHEAD_NBYTES", 1)
    for mode in ("ssp", "downpour:fetch=1,push=2", "project_adam", "hogwild" if comm.size == 1 else "ssp:fetch=2"):
        w = {"a": np.zeros((50, 3)), "b": np.zeros(4)}
        trainer = DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode=mode)
        for _ in range(2):
            trainer.begin()
            for name, x in w.items():
                trainer.ready(name, -np.ones_like(x))
            trainer.step()
        trainer.synchronize()
        agree(comm, all(bool((x == 2 * comm.size).all()) for x in w.values()), f"{mode}: {w}")
        trainer.free()


def structured(comm: Any, choice: Any, given: Any) -> tuple[dict[str, Any], int]:
    """A rank-8 gradient of a matrix, by ``ready``; and a vector's."""
    w: dict[str, Any] = {"m": np.ones((300, 200), np.float32), "v": np.zeros(300, np.float32)}
    mode = bitring.SSP(staleness=2, servers=comm.size)
    trainer = DataParallel(w, bitring.SGD(lr=0.5), comm=comm, mode=mode, compression=choice)
    if isinstance(choice, bitring.Structure) and comm.size > 1:
        assert isinstance(trainer.picked["m"].compressor, bitring.RowOwners)
    for step in range(3):
        rng = np.random.default_rng((comm.rank, step))
        samples = 8 if step or comm.rank else 0
        u, v = (rng.standard_normal((samples, n)).astype(np.float32) for n in (300, 200))
        trainer.begin(weight=8)
        trainer.ready("v", u.sum(0))
        trainer.ready("m", given(u, v))
        trainer.step()
    trainer.synchronize()
    agreed = len(set(allgather(comm, trainer.digest(), "test"))) == 1
    sent = trainer.bytes_sent
    trainer.free()
    assert agreed
    return w, sent


@pytest.mark.parametrize("choice", ["row_owners", "structure"])
def test_factors_travel_to_the_owners_of_rows_who_multiply_them(apart, agree, monkeypatch, choice):
    """Wait-free, structure-aware and under bounded staleness in one run: Poseidon's combination."""
    monkeypatch.setattr(worker, "AHEAD_NBYTES", 1)
    if choice == "structure":
        choice = bitring.Structure(batch=8, bandwidth=1e6, latency=0.0)
    comm = apart
    wanted, dense = structured(comm, None, lambda u, v: u.T @ v)
    got, fewer = structured(comm, choice, Factors)
    for name, x in wanted.items():
        agree(comm, np.allclose(got[name], x, rtol=1e-4, atol=1e-4), name)
    if comm.size > 1:
        answers = dense * 3 / 7  # 3 pushes, 3 fetches and what synchronize brings
        agree(comm, fewer < dense - 0.7 * answers, f"{fewer} of {dense} bytes")


@pytest.mark.single
def test_structure_weighs_what_goes_by_owners():
    from bitring.training.prediction.cluster import Cluster

    cluster = Cluster(4, 4, 1.25e8, 1e-5)
    shapes = {"wide": (1000, 800), "bias": (1000,)}
    picked = bitring.Structure(batch=8).pick(shapes, cluster, by_owners=True)
    assert set(picked["wide"].seconds) == {"exact", "row_owners"}
    assert isinstance(picked["wide"].compressor, bitring.RowOwners) and picked["bias"].compressor is None
