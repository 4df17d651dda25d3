"""Steps in which ranks know what the others' records would say: the bits of others, and whatever goes wrong in them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from bitring.collectives.plan import ExactPlan
from bitring.collectives.runtime.engine import engine
from bitring.errors import MismatchError, PeerError
from bitring.native import native
from bitring.training.data_parallel import DataParallel
from bitring.training.optimizer import cannot_raise
from bitring.training.optimizers.sgd import SGD
from bitring.training.step.bucket import Bucket
from bitring.training.step.meeting import Meeting
from bitring.training.step.undo import arrays_in

SHAPES = {"a": (20, 30), "b": (7,), "c": (901,)}


@pytest.fixture(params=["comm", "apart", "two_nodes"])
def world(request: pytest.FixtureRequest) -> Any:
    """Ranks of one node, of a node each, and of two nodes; nobody minds when it is of no use any more."""
    given = request.getfixturevalue(request.param)
    return given.Dup() if request.param == "comm" else given


class Mine(SGD):
    """One that may raise, as far as the trainer knows."""

    def apply(self, w: Any, g: Any, slots: Any, t: Any, u: Any) -> None:
        super().apply(w, g, slots, t, u)


def new_trainer(comm: Any, optimizer: Any = SGD, times: int = 1, **more: Any) -> DataParallel:
    rng = np.random.default_rng(5)
    shapes = {name: (times, *shape) for name, shape in SHAPES.items()}
    parameters = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return DataParallel(parameters, optimizer(lr=0.1, momentum=0.9), comm=comm, **more)


def gradients_of(trainer: DataParallel, step: int) -> dict[str, Any]:
    rng = np.random.default_rng([trainer.comm.rank, step])
    return {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in trainer.parameters.items()}


def everything(trainer: DataParallel) -> tuple[Any, ...]:
    state = [(at, x.tobytes()) for at, x in arrays_in(trainer.live())]
    residuals = [{key: x.tobytes() for key, x in plan.state_dict().items()} for plan in trainer.plans]
    return state, residuals, trainer.steps


def raised(call: Any, *arguments: Any, **named: Any) -> Any:
    try:
        call(*arguments, **named)
    except BaseException as error:
        return error
    return None


def steps(trainer: DataParallel, first: int, last: int) -> None:
    for step in range(first, last):
        trainer.step(gradients_of(trainer, step))


@contextlib.contextmanager
def interrupted_waits(patch: pytest.MonkeyPatch) -> Generator[None]:
    """Waits end at once by an interrupt."""

    def interrupt(job: Any) -> None:
        raise KeyboardInterrupt

    with patch.context() as context:
        context.setattr(engine, "drive", interrupt)
        yield


def interrupt_first(trainer: DataParallel, patch: pytest.MonkeyPatch, step: int) -> BaseException | None:
    """Rank 0 comes to the step alone, and is interrupted there. What it raised."""
    error = None
    if trainer.comm.rank == 0:
        with interrupted_waits(patch):
            error = raised(trainer.step, gradients_of(trainer, step))
    trainer.comm.Barrier()
    return error


CASES = [
    (SGD, 1, {}),
    (SGD, 100, {}),
    (Mine, 1, {}),
    (SGD, 1, {"bucket_bytes": 2500}),
    (SGD, 3, {"compression": "onebit"}),
    (SGD, 3, {"compression": "powersgd:matrix_rank=1"}),
]


@pytest.mark.parametrize(("optimizer", "times", "more"), CASES, ids=str)
def test_the_bits_are_those_of_steps_with_records(world, agree, monkeypatch, optimizer, times, more):
    """Weights that change, and bits to be told, go with records; the next step is usual again."""
    trainer, twin = (new_trainer(world, optimizer, times, **more) for _ in range(2))
    of_twin: Any = twin._stepper
    of_twin._usual.possible = False
    met: list[Any] = []
    run = Meeting._run
    monkeypatch.setattr(Meeting, "_run", lambda self: [met.append(self), run(self)][1])
    told, records = [], []
    for step in range(20):
        weight = 1 if step < 5 else world.rank + 1
        for each in (trainer, twin):
            met.clear()
            each.notices.own = int(step == 8 and world.rank == 0) << 4
            each.step(gradients_of(each, step), weight=weight)
            told.append(each.notices.everyone)
            records.append(len(met))
    agree(world, everything(trainer) == everything(twin))
    agree(world, told == [int(step == 8) << 4 for step in range(20) for _ in range(2)], f"{told}")
    usual = [count for step, count in enumerate(records[::2]) if step not in (0, 5, 8)]
    agree(world, world.size == 1 or native() is None or usual == [0] * len(usual), f"{records}")
    for each in (trainer, twin):
        each.free()


def test_a_step_whose_wait_was_interrupted_is_made_if_the_others_make_it(world, agree, monkeypatch):
    trainer, twin = (new_trainer(world) for _ in range(2))
    for each in (trainer, twin):
        steps(each, 0, 3)
    stepper: Any = trainer._stepper
    with_end = not stepper._usual._small
    before = everything(trainer)
    error = interrupt_first(trainer, monkeypatch, 3)
    alone = world.size == 1
    if world.rank == 0 and not alone:
        agree(world, type(error) is KeyboardInterrupt and everything(trainer) == before, repr(error))
    elif not alone:
        agree(world, True)
    if with_end:  # of one node: the others wait for it at the end, and are told
        if world.rank == 0:
            error = raised(trainer.step, gradients_of(trainer, 3))
            agree(world, alone or "was interrupted" in str(error), repr(error))
        else:
            error = raised(trainer.step, gradients_of(trainer, 3))
            agree(world, isinstance(error, RuntimeError), repr(error))
        return
    if world.rank:
        trainer.step(gradients_of(trainer, 3))
    twin.step(gradients_of(twin, 3))
    agree(world, everything(trainer) == everything(twin), "the step is not made")
    for step in (4, 5):
        for each in (trainer, twin):
            each.step(gradients_of(each, step))
    agree(world, everything(trainer) == everything(twin))
    for each in (trainer, twin):
        each.free()


def test_who_makes_an_interrupted_step_again_is_told_that_it_is_made(apart, agree, monkeypatch):
    trainer, twin = (new_trainer(apart) for _ in range(2))
    for each in (trainer, twin):
        steps(each, 0, 3)
    interrupt_first(trainer, monkeypatch, 3)
    error = raised(trainer.step, gradients_of(trainer, 3))
    agree(apart, error is None if apart.rank else "is made: all others came to it" in str(error), repr(error))
    twin.step(gradients_of(twin, 3))
    agree(apart, everything(trainer) == everything(twin) and trainer.steps == 4)
    for each in (trainer, twin):
        steps(each, 4, 6)
    agree(apart, everything(trainer) == everything(twin))


@pytest.mark.parametrize("next_one", ["save_checkpoint", "load_state_dict", "free"])
def test_all_go_elsewhere_when_one_was_interrupted_in_a_step(apart, agree, monkeypatch, next_one):
    """The step is made by nobody."""
    trainer, other = (new_trainer(apart) for _ in range(2))
    steps(trainer, 0, 3)
    state, before = trainer.state_dict(), everything(trainer)
    interrupt_first(trainer, monkeypatch, 3)
    if next_one == "save_checkpoint":
        trainer.meet("save_checkpoint", None)
    elif next_one == "load_state_dict":
        trainer.load_state_dict(state)
    else:
        trainer.free()
    agree(apart, everything(trainer) == before)
    if next_one == "free":
        trainer = other
    steps(trainer, 3, 5)
    agree(apart, len(set(apart.allgather(trainer.digest()))) == 1)


def test_an_interrupt_when_the_exchange_is_over_waits_for_the_update(apart, agree, monkeypatch):
    trainer, twin = (new_trainer(apart) for _ in range(2))
    for each in (trainer, twin):
        steps(each, 0, 3)
    last = apart.size - 1
    with monkeypatch.context() as patch:
        if apart.rank == last:
            passes_place = Meeting.passes_place

            def interrupted(self: Any, *arguments: Any) -> bool:
                alike = passes_place(self, *arguments)
                signal.raise_signal(signal.SIGINT)
                return alike

            patch.setattr(Meeting, "passes_place", interrupted)
        error = raised(trainer.step, gradients_of(trainer, 3))
    agree(apart, (type(error) is KeyboardInterrupt) == (apart.rank == last), repr(error))
    twin.step(gradients_of(twin, 3))
    agree(apart, everything(trainer) == everything(twin))
    steps(trainer, 4, 6)
    agree(apart, len(set(apart.allgather(trainer.digest()))) == 1)


@pytest.mark.skipif(native() is None, reason="without the native engine no step is usual")
def test_an_interrupt_in_a_step_with_an_end_is_told_there(world, agree, monkeypatch):
    """It was held back, and the others hear of it before any has made the step."""
    trainer = new_trainer(world, Mine)
    steps(trainer, 0, 3)
    before, last = everything(trainer), world.size - 1
    stepper: Any = trainer._stepper
    exchange = stepper.exchange

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return exchange(*arguments)

    with monkeypatch.context() as patch:
        if world.rank == last:
            patch.setattr(stepper, "exchange", interrupted)
        error = raised(trainer.step, gradients_of(trainer, 3))
    agree(world, type(error) is (KeyboardInterrupt if world.rank == last else PeerError), repr(error))
    agree(world, world.size == 1 or everything(trainer) == before)
    steps(trainer, 3, 6)
    agree(world, len(set(world.allgather(trainer.digest()))) == 1)


def test_an_interrupt_where_an_exchange_is_taken_further_does_not_end_it(apart, agree, monkeypatch):
    trainer, twin = (new_trainer(apart) for _ in range(2))
    for each in (trainer, twin):
        steps(each, 0, 3)
    finish = ExactPlan._finish

    def interrupted(self: Any, progress: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        yield from finish(self, progress)

    with monkeypatch.context() as patch:
        if apart.rank == 0:
            patch.setattr(trainer.plans[0], "_past_engine", None)
            patch.setattr(ExactPlan, "_finish", interrupted)
        error = raised(trainer.step, gradients_of(trainer, 3))
    trainer.meet("save_checkpoint", None)  # where rank 0 makes the step, if it has left it: others may wait for it
    agree(apart, (type(error) is KeyboardInterrupt) == (apart.rank == 0), repr(error))
    twin.step(gradients_of(twin, 3))
    agree(apart, everything(trainer) == everything(twin))
    for each in (trainer, twin):
        steps(each, 4, 6)
    agree(apart, everything(trainer) == everything(twin))


class BoomError(Exception):
    """What the tests' callbacks raise."""


def test_a_rank_that_cannot_pack_says_so_before_anything_is_exchanged(world, agree, monkeypatch):
    trainer = new_trainer(world)
    steps(trainer, 0, 3)
    before, last = everything(trainer), world.size - 1

    def failing(*arguments: Any) -> None:
        raise BoomError("while packing")

    with monkeypatch.context() as patch:
        if world.rank == last:
            patch.setattr(Bucket, "pack", failing)
            patch.setattr(Bucket, "load", failing)
        error = raised(trainer.step, gradients_of(trainer, 3))
    agree(world, type(error) is (BoomError if world.rank == last else PeerError), repr(error))
    agree(world, everything(trainer) == before)
    steps(trainer, 3, 5)
    agree(world, len(set(world.allgather(trainer.digest()))) == 1)


def test_a_read_only_parameter_is_found_before_anything_is_exchanged(apart, agree):
    trainer = new_trainer(apart)
    steps(trainer, 0, 3)
    before = everything(trainer)
    trainer.parameters["b"].flags.writeable = apart.rank != 0
    error = raised(trainer.step, gradients_of(trainer, 3))
    agree(apart, type(error) is (PeerError if apart.rank else ValueError) and "read-only" in str(error), repr(error))
    agree(apart, everything(trainer) == before)
    trainer.parameters["b"].flags.writeable = True
    steps(trainer, 3, 5)


def test_a_read_only_parameter_is_found_where_steps_have_an_end(world, agree):
    trainer = new_trainer(world)
    steps(trainer, 0, 3)
    before = everything(trainer)
    trainer.parameters["b"].flags.writeable = world.rank != 0
    error = raised(trainer.step, gradients_of(trainer, 3))
    agree(world, type(error) is (PeerError if world.rank else ValueError) and "read-only" in str(error), repr(error))
    agree(world, everything(trainer) == before)
    trainer.parameters["b"].flags.writeable = True
    steps(trainer, 3, 5)
    agree(world, len(set(world.allgather(trainer.digest()))) == 1)


def test_an_update_that_fails_in_a_usual_step(apart, agree, monkeypatch):
    """The ranks meet at its end."""
    trainer = new_trainer(apart, Mine)
    steps(trainer, 0, 3)
    before, last = everything(trainer), apart.size - 1

    def failing(self: Any, *arguments: Any) -> None:
        SGD.apply(self, *arguments)
        raise BoomError("in the optimizer")

    with monkeypatch.context() as patch:
        if apart.rank == last:
            patch.setattr(Mine, "apply", failing)
        error = raised(trainer.step, gradients_of(trainer, 3))
    agree(apart, type(error) is (BoomError if apart.rank == last else PeerError), repr(error))
    agree(apart, everything(trainer) == before)
    steps(trainer, 3, 5)
    agree(apart, len(set(apart.allgather(trainer.digest()))) == 1)


def test_a_step_that_fails_when_the_others_have_made_it_ends_the_communicator(apart, agree, monkeypatch):
    """It cannot by itself; whatever does it, all are told."""
    trainer = new_trainer(apart)
    steps(trainer, 0, 3)
    before = everything(trainer)

    def failing(*arguments: Any) -> None:
        for rank in range(1, apart.size):  # which has made the step
            apart.recv(source=rank)
        raise BoomError("in the end")

    with monkeypatch.context() as patch:
        if apart.rank == 0:
            patch.setattr(trainer._stepper.notices, "hear", failing)
        error = raised(trainer.step, gradients_of(trainer, 3))
    if apart.rank != 0:
        apart.send(None, dest=0)
    agree(apart, type(error) is BoomError if apart.rank == 0 else error is None, repr(error))
    agree(apart, apart.rank != 0 or everything(trainer) == before)
    error = raised(trainer.step, gradients_of(trainer, 4))
    agree(apart, isinstance(error, RuntimeError), repr(error))


def test_trainers_that_are_mixed_up(world, agree):
    one, other = (new_trainer(world) for _ in range(2))
    for each in (one, other):
        steps(each, 0, 3)
    before = everything(one), everything(other)
    last = world.size - 1
    error = raised(lambda: steps(other if world.rank == last else one, 3, 4))
    if world.size > 1:
        agree(world, type(error) is MismatchError and "trainer number" in str(error), repr(error))
        agree(world, (everything(one), everything(other)) == before)
        for each in (one, other):
            steps(each, 3, 5)
            agree(world, len(set(world.allgather(each.digest()))) == 1)


def test_replicas_are_compared_in_usual_steps(apart, agree):
    """A rank whose parameter was changed is found in the step in which it is due."""
    trainer = new_trainer(apart, check_every=2)
    steps(trainer, 0, 5)
    if apart.rank == 0:
        trainer.parameters["c"][0, 5] += 1
    error = raised(lambda: steps(trainer, 5, 8))
    agree(apart, isinstance(error, Exception) and "'c'" in str(error), repr(error))


def test_an_update_is_whole_when_its_step_is_interrupted(apart, agree, monkeypatch):
    trainer, twin = (new_trainer(apart) for _ in range(2))
    for each in (trainer, twin):
        steps(each, 0, 3)
    apply = SGD.apply

    @cannot_raise
    def interrupted(self: Any, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        apply(self, *arguments)

    with monkeypatch.context() as patch:
        if apart.rank == 0:
            patch.setattr(SGD, "apply", interrupted)
            patch.setattr(SGD, "update_natively", lambda *given: False)
        error = raised(trainer.step, gradients_of(trainer, 3))
    agree(apart, (type(error) is KeyboardInterrupt) == (apart.rank == 0), repr(error))
    twin.step(gradients_of(twin, 3))
    agree(apart, everything(trainer) == everything(twin))
