"""Joint work: where it fails on one rank all raise, and go on with the communicator, whatever the exception was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.jointly import jointly
from bitring.errors import PeerError
from bitring.training.data_parallel import DataParallel
from bitring.training.modes.sync import Sync
from bitring.training.optimizers.sgd import SGD


@pytest.fixture
def world(comm: Any) -> Any:
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def raised(call: Any) -> str:
    try:
        call()
    except BaseException as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_communicator_stays_usable(world, agree, error: type[BaseException]):
    def work() -> None:
        if world.rank == 0:
            raise error

    def call() -> None:
        with context_of(world).turn("call"):
            jointly(world, "call", lambda: None)
            jointly(world, "call", work)

    for turn in range(2):
        got, wanted = raised(call), error.__name__ if world.rank == 0 else PeerError.__name__
        agree(world, got == wanted, f"turn {turn}: {got} instead of {wanted}")
    x = np.ones(3)
    world.Allreduce(None, x)
    agree(world, bool((x == world.size).all()), f"{x}")


def test_an_interrupt_between_two_joint_works_ends_it(world, agree):
    """The others are in the second one: they are told, and do not wait for ever."""

    def call() -> None:
        with context_of(world).turn("call"):
            jointly(world, "call", lambda: None)
            jointly(world, "call", lambda: None)
            if world.rank == 0:
                raise KeyboardInterrupt
            jointly(world, "call", lambda: None)

    got = raised(call)
    agree(world, got == ("KeyboardInterrupt" if world.rank == 0 else "PeerError"), got)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_step_that_fails_on_one_rank_is_made_again(world, agree, monkeypatch, error: type[BaseException]):
    """All have heard of it when it ends."""
    w, fails, whole = {"w": np.zeros(300, np.float32)}, False, Sync.step

    def half(self: Any, *arguments: Any) -> None:
        whole(self, *arguments)
        if fails and world.rank == 0:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Sync, "step", half)
        trainer, gradients = DataParallel(w, SGD(lr=1.0), comm=world), {"w": np.ones(300, np.float32)}
        trainer.step(gradients)
        before, fails = w["w"].copy(), True
        got, wanted = raised(lambda: trainer.step(gradients)), error.__name__ if world.rank == 0 else "PeerError"
    agree(world, got == wanted and bool((w["w"] == before).all()), f"{got}: {w['w'][:2]} instead of {before[:2]}")
    trainer.step(gradients)
    agree(world, bool((w["w"] == -2).all()) and trainer.steps == 2, f"{w['w'][:2]} after {trainer.steps} steps")
