"""Steps whose gradients are handed over one by one: the bits of a whole step, and all or nothing, as it is."""

from __future__ import annotations

from typing import Any

import fake_device
import numpy as np
import pytest
from test_transaction import BoomError, everything, gradients_of, new_trainer, raised
from waiting import SharedClock

import bitring
from bitring import allreduce, arrays
from bitring.compression.factors import Factors
from bitring.compression.plans import telemetry
from bitring.errors import NonFiniteError, PeerError
from bitring.training.data_parallel import DataParallel
from bitring.training.modes.block_momentum import BlockMomentum
from bitring.training.modes.local import Local
from bitring.training.optimizers.sgd import SGD
from bitring.training.step import meeting

COMPRESSIONS = [None, "onebit", "topk:density=0.1", "linear", "powersgd:matrix_rank=1", "randomk", "sufficient_factors"]


@pytest.fixture(params=[False, True], ids=["together", "overlap"])
def overlap(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr("bitring.training.step.bucket_sizes.OVERLAP_BYTES", 0)
    return bool(request.param)


def hand_over(trainer: DataParallel, gradients: dict[str, Any], weight: float, stop_at: str | None = None) -> None:
    """From the last to the first; raises before the one named ``stop_at``."""
    with trainer.begin(weight):
        for name in reversed(gradients):
            if name == stop_at:
                raise BoomError(f"in the backward pass of {name}")
            trainer.ready(name, gradients[name])
        trainer.step()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_bits_of_a_whole_step(comm, agree, overlap, compression):
    """With ranks that have no samples, and steps in which none has."""
    trainer, twin = (new_trainer(comm, "sync", compression, warmup_steps=2) for _ in range(2))
    for step in range(6):
        weight = 0 if step == 4 else (comm.rank + step) % 3
        gradients = gradients_of(comm, step)
        if compression == "sufficient_factors" and step % 2:
            u, v = gradients["a"][:, :3].T.copy(), gradients["a"][:3].copy()
            gradients["a"] = Factors(u, v)
        hand_over(trainer, gradients, weight)
        twin.step(gradients, weight)
        agree(comm, everything(trainer) == everything(twin), f"step {step}")
    for each in (trainer, twin):
        each.free()


def test_the_bits_of_a_whole_step_by_every_algorithm(comm, agree, overlap):
    for algorithm in bitring.algorithms():
        trainer, twin = (new_trainer(comm, "sync", None, algorithm=algorithm) for _ in range(2))
        for step in range(2):
            hand_over(trainer, gradients_of(comm, step), comm.rank + 1)
            twin.step(gradients_of(comm, step), comm.rank + 1)
        agree(comm, everything(trainer) == everything(twin), algorithm)
        for each in (trainer, twin):
            each.free()


def test_gradients_on_a_device(comm, agree, overlap, monkeypatch):
    """Of a device whose work is done late: staged on its stream, with the bits of arrays in host memory."""
    monkeypatch.setitem(arrays.devices, "fake_device", fake_device.FakeDevice)
    twin = new_trainer(comm, "sync", None, algorithm="ring")
    parameters = {name: fake_device.array(w) for name, w in twin.parameters.items()}
    trainer = DataParallel(parameters, SGD(lr=0.1, momentum=0.9), comm=comm, bucket_bytes=9000, algorithm="ring")
    on_device: dict[str, Any] = {}
    for step in range(4):
        gradients = gradients_of(comm, step)
        on_device = {name: fake_device.array(g) for name, g in gradients.items()}
        weight = (comm.rank + step) % 3
        if step % 2:
            hand_over(trainer, on_device, weight)
        else:
            trainer.step(on_device, weight)
        twin.step(gradients, weight)
    same = all((parameters[name].get() == w).all() for name, w in twin.parameters.items())
    agree(comm, same, "other bits than in host memory")
    before = {name: w.get() for name, w in parameters.items()}
    error = raised(hand_over, trainer, on_device, 1.0, "b" if comm.rank == 0 else None)
    agree(comm, type(error) is (BoomError if comm.rank == 0 else PeerError), repr(error))
    agree(comm, all((parameters[name].get() == w).all() for name, w in before.items()), "something has changed")
    for each in (trainer, twin):
        each.free()
    arrays._made.pop("fake_device", None)


@pytest.mark.parametrize("mode", [Local(tau=2), BlockMomentum(tau=2), "delayed"], ids=str)
def test_other_modes_take_the_gradients_at_the_end(comm, agree, overlap, mode):
    trainer, twin = (new_trainer(comm, mode, "onebit") for _ in range(2))
    for step in range(5):
        hand_over(trainer, gradients_of(comm, step), 1.0)
        twin.step(gradients_of(comm, step))
    for each in (trainer, twin):
        each.synchronize()
    agree(comm, everything(trainer) == everything(twin))
    for each in (trainer, twin):
        each.free()


@pytest.mark.parametrize("where", ["a", "c", "d"])
@pytest.mark.parametrize("compression", [None, "onebit", "powersgd:matrix_rank=1"])
def test_an_exception_while_gradients_are_computed(comm, agree, overlap, compression, where):
    """In the first layer's backward pass, in one between, in the last one's: all raise, nothing has changed."""
    trainer, twin = (new_trainer(comm, "sync", compression) for _ in range(2))
    for each in (trainer, twin):
        each.step(gradients_of(comm, 0))
    before, wrong = everything(trainer), comm.size - 1
    for again in range(2):
        error = raised(hand_over, trainer, gradients_of(comm, 1), 1.0, where if comm.rank == wrong else None)
        if comm.rank == wrong:
            agree(comm, type(error) is BoomError, repr(error))
        else:
            agree(
                comm, type(error) is PeerError and f"rank {wrong} raised BoomError: in the" in str(error), repr(error)
            )
        agree(comm, everything(trainer) == before, f"something has changed, {again}")
    for step in (1, 2):
        hand_over(trainer, gradients_of(comm, step), 1.0)
        twin.step(gradients_of(comm, step))
    agree(comm, everything(trainer) == everything(twin))
    for each in (trainer, twin):
        each.free()


@pytest.mark.parametrize("compression", [None, "onebit", "randomk"])
@pytest.mark.parametrize("name", ["a", "d"])
def test_nan_in_the_last_bucket_and_in_the_first(comm, agree, overlap, compression, name):
    trainer = new_trainer(comm, "sync", compression)
    hand_over(trainer, gradients_of(comm, 0), 1.0)
    before, gradients = everything(trainer), gradients_of(comm, 1)
    if comm.rank == 0:
        gradients[name].flat[-1] = np.nan
    error = raised(hand_over, trainer, gradients, 1.0)
    agree(comm, type(error) is NonFiniteError and f"'{name}' holds NaN on rank 0" in str(error), repr(error))
    agree(comm, everything(trainer) == before, "something has changed")
    hand_over(trainer, gradients_of(comm, 1), 1.0)
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)
    trainer.free()


def test_a_step_that_is_not_made_ends_everywhere(comm, agree, overlap):
    """By another begin, by another operation, by gradients given to step after all."""
    trainer = new_trainer(comm, "sync", "onebit")
    trainer.step(gradients_of(comm, 0))
    before, gradients, last = everything(trainer), gradients_of(comm, 1), comm.size - 1
    for call in (trainer.begin, trainer.synchronize, lambda: trainer.step(gradients), lambda: trainer.step(weight=2)):
        trainer.begin()
        trainer.ready("d", gradients["d"])
        if comm.rank == last:
            error = raised(call)
            agree(comm, type(error) in (RuntimeError, TypeError) and "begin" in str(error), repr(error))
        else:
            error = raised(finish, trainer, gradients)
            agree(comm, type(error) is PeerError and f"rank {last} raised" in str(error), repr(error))
        agree(comm, everything(trainer) == before, "something has changed")
    error = raised(trainer.ready, "d", gradients["d"])
    agree(comm, type(error) is RuntimeError and "begin" in str(error), repr(error))
    trainer.free()


def finish(trainer: DataParallel, gradients: dict[str, Any]) -> None:
    """A step that has the gradient of "d"."""
    for name in ("c", "b", "a"):
        trainer.ready(name, gradients[name])
    trainer.step()


@pytest.mark.parametrize(
    ("hand", "said"),
    [
        (lambda t, g: t.ready("e", g["a"]), "name must be a parameter's: a, b, c, d; got 'e'"),
        (lambda t, g: t.ready("a", g["a"].T), "the gradient of 'a' must be float32 of shape (40, 60)"),
        (lambda t, g: [t.ready("a", g["a"]), t.ready("a", g["a"])], "was handed over already"),
        (lambda t, g: [t.ready("a", g["a"]), t.step()], "missing: ['b', 'c', 'd']"),
    ],
    ids=["name", "shape", "twice", "missing"],
)
def test_what_is_no_gradient(comm, agree, overlap, hand, said):
    trainer = new_trainer(comm, "sync", None)
    before, gradients, wrong = everything(trainer), gradients_of(comm, 0), comm.size - 1
    if comm.rank == wrong:
        error = raised(lambda: [trainer.begin(), hand(trainer, gradients)])
        agree(comm, isinstance(error, ValueError) and said in str(error), repr(error))
    else:
        error = raised(hand_over, trainer, gradients, 1.0)
        agree(comm, type(error) is PeerError and said in str(error), repr(error))
    agree(comm, everything(trainer) == before)
    for weight in ("much", -1):
        error = raised(hand_over, trainer, gradients, weight if comm.rank == wrong else 1)
        agree(comm, "weight must be" in str(error) and type(error) is not RuntimeError, repr(error))
    hand_over(trainer, gradients, 1.0)
    trainer.free()


def test_gradients_that_do_not_come_may_be_zeros(comm, agree, overlap):
    trainer, twin = (new_trainer(comm, "sync", "onebit", unused="zeros") for _ in range(2))
    gradients = gradients_of(comm, 0)
    trainer.begin()
    trainer.ready("c", gradients["c"])
    trainer.step()
    twin.step({"c": gradients["c"]})
    agree(comm, everything(trainer) == everything(twin))
    for each in (trainer, twin):
        each.free()


def test_the_hidden_share_is_told(comm, agree, overlap):
    trainer = new_trainer(comm, "sync", None)
    hand_over(trainer, gradients_of(comm, 0), 1.0)
    told = trainer.telemetry().get("hidden_share")
    agree(comm, (told is None) == (not overlap) and 0 <= (told or 0) <= 1, repr(told))
    agree(comm, "hidden_share" not in trainer.telemetry())
    trainer.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_the_timeline_of_a_step(comm, agree, overlap, compression):
    """Every bucket is packed, travels and is waited for, in this order; the update comes last."""
    trainer = new_trainer(comm, "sync", compression)
    for whole in (False, True):
        for step in range(2):
            if whole:
                trainer.step(gradients_of(comm, step))
            else:
                hand_over(trainer, gradients_of(comm, step), 1.0)
        spans = trainer.timeline()
        agree(comm, all(0 <= span.start <= span.end for span in spans) and spans[-1].kind == "apply", repr(spans))
        agree(comm, any(span.kind == "compute" for span in spans))
        for number in range(len(trainer.buckets)):
            times = {span.kind: span for span in spans if span.bucket == number}
            agree(comm, {"pack", "wire", "wait"} <= times.keys(), repr(times))
            agree(comm, times["pack"].start <= times["wire"].end <= times["wait"].end + 1e-3, repr(times))
    trainer.free()


@pytest.mark.parametrize("mode", ["delayed", Local(tau=2)], ids=str)
@pytest.mark.parametrize("end", ["exception", "interrupt", "synchronize"])
def test_a_mode_that_takes_them_at_the_end_hears_of_a_step_not_made(comm, agree, mode, end):
    """Where the mode's ranks meet next; then all have made as many steps, and go on."""
    trainer = new_trainer(comm, mode, "onebit")
    trainer.step(gradients_of(comm, 0))
    gradients, last = gradients_of(comm, 1), comm.size - 1

    def not_made() -> None:
        with trainer.begin():
            trainer.ready("d", gradients["d"])
            if end == "synchronize":
                trainer.synchronize()
            raise BoomError("boom") if end == "exception" else KeyboardInterrupt

    def interrupted() -> None:
        try:
            not_made()
        except KeyboardInterrupt as error:
            raise BoomError("interrupted") from error

    error = raised(interrupted) if comm.rank == last else raised(hand_over, trainer, gradients, 1.0)
    expected = {"exception": BoomError, "interrupt": BoomError, "synchronize": RuntimeError}[end]
    agree(comm, type(error) is (expected if comm.rank == last else PeerError), repr(error))
    for step in range(2, 5):
        hand_over(trainer, gradients_of(comm, step), 1.0)
    trainer.synchronize()
    agree(comm, comm.allgather(trainer.digest()) == [trainer.digest()] * comm.size, "replicas differ")
    trainer.free()


def test_two_trainers_take_turns_in_their_steps(comm, agree, overlap):
    """Another trainer of the communicator makes steps while one has its open."""
    trainer, other, twin, lone = (new_trainer(comm, "sync", "onebit") for _ in range(4))
    for step in range(3):
        gradients, theirs = gradients_of(comm, step), gradients_of(comm, 10 + step)
        weight = (comm.rank + step) % 3
        with trainer.begin(weight):
            other.step(theirs, 2.0)
            trainer.ready("d", gradients["d"])
            with other.begin(3.0):
                for name in ("c", "b", "a"):
                    trainer.ready(name, gradients[name])
                for name in ("a", "b", "c", "d"):
                    other.ready(name, theirs[name])
                trainer.step()
                other.step()
        twin.step(gradients, weight)
        lone.step(theirs, 2.0)
        lone.step(theirs, 3.0)
        agree(comm, everything(trainer) == everything(twin), f"step {step}")
        agree(comm, everything(other) == everything(lone), f"the other's step {step}")
    for each in (trainer, other, twin, lone):
        each.free()


def test_calls_of_the_communicator_between_begin_and_step(comm, agree, overlap):
    """They come at the same places on all ranks, those without samples too."""
    trainer, twin = (new_trainer(comm, "sync", None) for _ in range(2))
    gradients, weight, totals = gradients_of(comm, 0), comm.rank, []
    with trainer.begin(weight):
        for name in reversed(gradients):
            trainer.ready(name, gradients[name])
            totals.append(float(allreduce(np.ones(3, np.float32), comm=comm)[0]))
        trainer.step()
    twin.step(gradients, weight)
    agree(comm, totals == [comm.size] * len(gradients) and everything(trainer) == everything(twin), repr(totals))
    for each in (trainer, twin):
        each.free()


def test_computing_is_not_waiting(comm, agree, monkeypatch, mpi_tmp_path):
    """The rank that computes longest is the slowest, and the others' waits are as long as it lets them wait."""
    trainer, last = new_trainer(comm, "sync", None), comm.size - 1
    trainer.step(gradients_of(comm, 0))
    trainer.telemetry()
    gradients = gradients_of(comm, 1)
    clock = SharedClock(comm, mpi_tmp_path, monkeypatch, meeting, telemetry)
    with trainer.begin():
        clock.comes_last(last)
        for name in reversed(gradients):
            trainer.ready(name, gradients[name])
        trainer.step()
    told = trainer.telemetry()
    *waits, wait = comm.allgather(told.get("wait_seconds") or 0.0)
    fine = told.get("slowest_rank") == last and min(waits, default=1.0) >= 1.0 > wait
    agree(comm, fine or comm.size == 1, f"{told} {waits} {wait}")
    trainer.free()


def test_a_state_loaded_ends_the_open_step(comm, agree, overlap):
    trainer = new_trainer(comm, "sync", "onebit")
    trainer.step(gradients_of(comm, 0))
    state = trainer.state_dict()
    trainer.step(gradients_of(comm, 1))
    before, gradients = everything(trainer), gradients_of(comm, 2)
    trainer.begin()
    trainer.ready("d", gradients["d"])
    error = raised(trainer.load_state_dict, state)
    agree(comm, type(error) is RuntimeError and "begin" in str(error) and everything(trainer) == before, repr(error))
    trainer.load_state_dict(state)
    trainer.step(gradients_of(comm, 1))
    agree(comm, everything(trainer) == before, "not as before")
    trainer.free()
