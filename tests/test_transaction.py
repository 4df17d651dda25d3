"""A step that fails leaves everything as it was, on all ranks, and can be made again: in every mode, bit for bit."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

import numpy as np
import pytest

from bitring.errors import MismatchError, NonFiniteError, PeerError
from bitring.training.data_parallel import DataParallel
from bitring.training.modes.block_momentum import BlockMomentum
from bitring.training.modes.local import Local
from bitring.training.optimizer import cannot_raise
from bitring.training.optimizers.adagrad import AdaGrad
from bitring.training.optimizers.sgd import SGD
from bitring.training.step.undo import arrays_in

SHAPES = {"a": (40, 60), "b": (7,), "c": (3001,), "d": (2000,)}
MODES = ["sync", "delayed", Local(tau=2), BlockMomentum(tau=2), BlockMomentum(tau=2, nesterov=False)]
COMPRESSIONS = [None, "onebit", "topk:density=0.1", "linear", "powersgd:matrix_rank=1", "randomk"]


def new_trainer(comm: Any, mode: Any, compression: Any, dtype: Any = np.float32, **more: Any) -> DataParallel:
    """Several buckets, some of them compressed."""
    rng = np.random.default_rng(5)
    parameters = {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
    return DataParallel(
        parameters, SGD(lr=0.1, momentum=0.9), comm=comm, mode=mode, compression=compression, bucket_bytes=9000, **more
    )


def gradients_of(comm: Any, step: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng([comm.rank, step])
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def everything(trainer: DataParallel) -> list[Any]:
    """All of this rank's state, when what goes on between two steps is over."""
    stepper: Any = trainer._stepper
    stepper.settle()
    kept = [(at, x.tobytes()) for at, x in arrays_in(trainer.live())]
    numbers = {key: x for key, x in trainer.live()["mode"].items() if not isinstance(x, dict)}
    plans = [{key: x.tobytes() for key, x in plan.state_dict().items()} for plan in trainer.plans]
    return [kept, numbers, plans, trainer.steps]


def raised(call: Any, *arguments: Any, **named: Any) -> Any:
    try:
        call(*arguments, **named)
    except Exception as error:
        return error
    return None


class BoomError(Exception):
    """What the tests' callbacks raise."""


def fail_in_optimizer(trainer: DataParallel, patch: pytest.MonkeyPatch) -> None:
    """In the middle: the first parameters have been updated."""
    apply, calls = SGD.apply, []

    def failing(self: Any, *arguments: Any) -> None:
        apply(self, *arguments)
        calls.append(1)
        raise BoomError("in the optimizer")

    patch.setattr(SGD, "apply", failing)


def fail_between_buckets(trainer: DataParallel, patch: pytest.MonkeyPatch) -> None:
    """The second bucket is never asked for."""
    stepper: Any = trainer._stepper
    exchange = stepper.exchange

    def failing(*arguments: Any, **named: Any) -> Any:
        for means in exchange(*arguments, **named):
            yield means
            raise BoomError("between buckets")

    patch.setattr(stepper, "exchange", failing)


def fail_while_packing(trainer: DataParallel, patch: pytest.MonkeyPatch) -> None:
    """The first buckets are on their way, where they overlap."""
    load = type(trainer.buckets[0]).load

    def failing(self: Any, *arguments: Any, **named: Any) -> None:
        load(self, *arguments, **named)
        if self is trainer.buckets[1]:
            raise BoomError("while packing")

    patch.setattr(type(trainer.buckets[0]), "load", failing)


FAULTS = [fail_in_optimizer, fail_between_buckets, fail_while_packing]
ALWAYS = [
    ("sync", "onebit", fail_in_optimizer, True),
    ("sync", "onebit", fail_while_packing, False),
    ("sync", None, fail_between_buckets, True),
    ("sync", "powersgd:matrix_rank=1", fail_between_buckets, False),
    (Local(tau=2), "onebit", fail_in_optimizer, False),
    (Local(tau=2), "topk:density=0.1", fail_between_buckets, True),
    (BlockMomentum(tau=2), "onebit", fail_between_buckets, False),
]
EVERY = [
    pytest.param(mode, compression, fault, overlap, marks=pytest.mark.slow)
    for mode in MODES
    for compression in COMPRESSIONS
    for fault in FAULTS
    for overlap in (False, True)
    if (mode, compression, fault, overlap) not in ALWAYS
]


def name_of(parameter: Any) -> str:
    return str(getattr(parameter, "__name__", parameter))


@pytest.mark.parametrize(("mode", "compression", "fault", "overlap"), [*ALWAYS, *EVERY], ids=name_of)
def test_one_rank_fails(comm, agree, monkeypatch, mode, compression, fault, overlap):
    """It raises its own error and the others one that names it; made again, the step gives the bits it would have."""
    if overlap:
        monkeypatch.setattr("bitring.training.step.bucket_sizes.OVERLAP_BYTES", 0)
    trainer, twin = new_trainer(comm, mode, compression), new_trainer(comm, mode, compression)
    for step in range(3):  # the next one exchanges, in all modes
        for each in (trainer, twin):
            each.step(gradients_of(comm, step))
    before = everything(trainer)
    wrong = comm.size - 1
    with monkeypatch.context() if comm.rank == wrong else contextlib.nullcontext() as patch:
        if patch is not None:
            fault(trainer, patch)
        error = raised(trainer.step, gradients_of(comm, 3), weight=comm.rank + 1)
    if comm.rank == wrong:
        agree(comm, type(error) is BoomError, repr(error))
    else:
        agree(comm, type(error) is PeerError and f"rank {wrong} raised BoomError" in str(error), repr(error))
    agree(comm, everything(trainer) == before, "something has changed")
    for step in (3, 4, 5):
        for each in (trainer, twin):
            each.step(gradients_of(comm, step), weight=comm.rank + 1)
    agree(comm, everything(trainer) == everything(twin), "the step that was made again is another")
    for each in (trainer, twin):
        each.free()


@pytest.mark.parametrize(("mode", "dtype"), [(mode, np.float32) for mode in MODES] + [("sync", np.float64)])
def test_nan_in_the_last_bucket(comm, agree, mode, dtype):
    trainer = new_trainer(comm, mode, "onebit", dtype)
    for step in range(3):
        trainer.step(gradients_of(comm, step, dtype))
    before = everything(trainer)
    bad = gradients_of(comm, 3, dtype)
    if comm.rank == 0:
        bad["a"][3, 5] = np.nan
    error = raised(trainer.step, bad)
    agree(comm, type(error) is NonFiniteError and "'a' holds NaN on rank 0" in str(error), repr(error))
    agree(comm, everything(trainer) == before, "something has changed")
    trainer.step(gradients_of(comm, 3, dtype))
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)
    trainer.free()


def test_a_rank_that_fails_alone_is_heard_when_ranks_meet(comm, agree, monkeypatch):
    """In the middle of a block it skips its step, as with bad arguments."""
    trainer = new_trainer(comm, Local(tau=2), None)
    before = everything(trainer)
    with monkeypatch.context() if comm.rank == 0 else contextlib.nullcontext() as patch:
        if patch is not None:
            fail_in_optimizer(trainer, patch)
        error = raised(trainer.step, gradients_of(comm, 0))
    agree(comm, error is None and trainer.steps == 1, repr(error))
    agree(comm, comm.rank != 0 or everything(trainer)[0] == before[0])
    error = raised(trainer.step, gradients_of(comm, 1))
    agree(comm, type(error) is (BoomError if comm.rank == 0 else PeerError), repr(error))
    trainer.step(gradients_of(comm, 1))
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1 and trainer.steps == 2)
    trainer.free()


@pytest.mark.parametrize("compression", ["onebit", "powersgd:matrix_rank=1"])
def test_a_plan_takes_back_its_runs(comm, agree, compression):
    """As a trainer asks it to; residuals, warm starts and counters included."""
    import bitring

    rng = np.random.default_rng(comm.rank)
    x = rng.standard_normal((60, 50)).astype(np.float32)
    plan = bitring.plan_allreduce(x, comm=comm, compression=compression)
    plan()
    before = {key: value.tobytes() for key, value in plan.state_dict().items()}
    plan.mark()
    for _ in range(3):
        x[...] = rng.standard_normal(x.shape)
        plan()
    plan.undo()
    agree(comm, {key: value.tobytes() for key, value in plan.state_dict().items()} == before)
    plan.free()


def test_settings_that_differ_are_named(comm, agree):
    """Nothing has changed, and when they are mended the step is made."""
    trainer = new_trainer(comm, "sync", "onebit")
    trainer.step(gradients_of(comm, 0))
    before = everything(trainer)
    last = comm.size - 1
    if comm.rank == last:
        trainer.optimizer = SGD(lr=0.5, momentum=0.9)
    error = raised(trainer.step, gradients_of(comm, 1))
    if comm.size > 1:
        texts = f"rank {last} has the optimizer SGD(lr=0.5, ", "rank 0 has the optimizer SGD(lr=0.1, "
        usual = comm.size > 2 or all(text in str(error) for text in texts)
        agree(comm, type(error) is MismatchError and texts[0] in str(error) and usual, repr(error))
        agree(comm, everything(trainer) == before)
    trainer.optimizer = SGD(lr=0.05, momentum=0.9)
    trainer.step(gradients_of(comm, 1))
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1 and trainer.steps == 2 + (comm.size == 1))
    trainer.free()


def test_modes_that_differ_are_named(comm, agree):
    trainer = new_trainer(comm, Local(tau=2), None)
    if comm.rank == 0:
        trainer.mode = Local(tau=1)
    error = raised(lambda: [trainer.step(gradients_of(comm, step)) for step in range(2)])
    if comm.size > 1:
        agree(comm, type(error) is MismatchError and "the mode Local(tau=" in str(error), repr(error))
    trainer.free()


def test_nothing_is_copied_for_an_optimizer_that_cannot_raise(comm, agree):
    """What one of a user's changes is."""

    class Mine(SGD):
        def apply(self, w: Any, g: Any, slots: Any, t: Any, u: Any) -> None:
            w -= g

    for mode, optimizer, copied in [
        ("sync", SGD(momentum=0.9), False),
        ("sync", AdaGrad(), False),
        ("sync", Mine(), True),
        (Local(tau=3), SGD(), False),
        (Local(tau=3), Mine(), True),
    ]:
        parameters = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
        trainer = DataParallel(parameters, optimizer, comm=comm, mode=mode)
        for step in range(2):
            trainer.step(gradients_of(comm, step))
        stepper: Any = trainer._stepper
        agree(comm, bool(stepper._transaction.undo._copies) == copied, f"{mode} {optimizer}")
        trainer.free()


@pytest.mark.parametrize("mode", ["sync", Local(tau=3)], ids=name_of)
def test_an_interrupt_in_the_middle_of_an_update_waits_for_its_end(comm, agree, monkeypatch, mode):
    trainer, twin = new_trainer(comm, mode, "onebit"), new_trainer(comm, mode, "onebit")
    apply, calls = SGD.apply, []

    @cannot_raise
    def interrupted(self: Any, *arguments: Any) -> None:
        apply(self, *arguments)
        if not calls:
            signal.raise_signal(signal.SIGINT)
        calls.append(1)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() if comm.rank == 0 else contextlib.nullcontext() as patch:
        if patch is not None:
            patch.setattr(SGD, "apply", interrupted)
            patch.setattr(SGD, "update_natively", lambda *given: False)
        try:
            trainer.step(gradients_of(comm, 0))
            came = False
        except KeyboardInterrupt:
            came = True
    twin.step(gradients_of(comm, 0))
    agree(comm, came == (comm.rank == 0) and signal.getsignal(signal.SIGINT) is before)
    agree(comm, everything(trainer) == everything(twin) and trainer.steps == 1, "the step is not whole")
    for step in (1, 2):
        for each in (trainer, twin):
            each.step(gradients_of(comm, step))
    agree(comm, everything(trainer) == everything(twin))


def test_a_parameter_that_was_made_read_only_is_found_before_anything_changes(comm, agree):
    trainer = new_trainer(comm, "sync", "onebit")
    trainer.step(gradients_of(comm, 0))
    before, last = everything(trainer), trainer.parameters["d"]
    last.flags.writeable = comm.rank != 0
    error = raised(trainer.step, gradients_of(comm, 1))
    text = "the parameter 'd' must be writable, and was made read-only"
    agree(comm, type(error) is (PeerError if comm.rank else ValueError) and text in str(error), repr(error))
    agree(comm, everything(trainer) == before, "something has changed")
    last.flags.writeable = True
    trainer.step(gradients_of(comm, 1))
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)


def test_numbers_that_overflow_do_not_end_an_update_in_the_middle(comm, agree):
    """Whatever NumPy was told to do about them."""
    trainer = new_trainer(comm, "sync", None)
    largest = {name: np.full(shape, 3e38, np.float32) for name, shape in SHAPES.items()}
    trainer.optimizer = SGD(lr=100.0, momentum=0.9)
    with np.errstate(over="raise"):
        error = raised(trainer.step, largest)
    agree(comm, error is None and trainer.steps == 1, repr(error))
    agree(comm, all(np.isinf(x).all() for x in trainer.parameters.values()))


def test_what_an_exchange_between_nodes_keeps(two_nodes, agree):
    """Each rank has the residual of its lane of the values."""
    import bitring

    rng = np.random.default_rng(two_nodes.rank)
    x = rng.standard_normal(20_000).astype(np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=two_nodes, compression="onebit", hierarchical=True)
    plan()
    before = {key: value.tobytes() for key, value in plan.state_dict().items()}
    plan.mark()
    for _ in range(2):
        x[...] = rng.standard_normal(x.shape)
        plan()
    after = {key: value.tobytes() for key, value in plan.state_dict().items()}
    plan.undo()
    agree(two_nodes, plan._route.exchange is None or after["residual"] != before["residual"])  # it may have no lane
    agree(two_nodes, {key: value.tobytes() for key, value in plan.state_dict().items()} == before)
    plan.free()
