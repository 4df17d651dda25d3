"""Gradients applied some steps later, whose exchange goes on between the steps."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
from test_transaction import everything, gradients_of, new_trainer, raised

from bitring.errors import PeerError
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import write_checkpoint
from bitring.training.modes.delayed import Delayed
from bitring.training.step.timeline import Timeline


def weight_of(comm: Any, step: int) -> float:
    return float((comm.rank + step) % 3 if step != 4 else 0)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("compression", [None, "onebit", "topk:density=0.1", "powersgd:matrix_rank=1"])
def test_is_a_plain_loop_that_applies_old_means(comm, agree, compression, steps):
    """The means are those of a trainer in mode sync, whose update is noted down instead of made."""
    trainer, twin = new_trainer(comm, Delayed(steps), compression), new_trainer(comm, "sync", compression)
    means: list[dict[str, Any] | None] = []
    stepper: Any = twin._stepper
    update = stepper.update
    stepper.update = lambda gradients, at_end=False: means[-1].update(  # type: ignore[union-attr]
        {name: g.copy() for name, g in gradients.items()}
    )
    expected = {name: w.copy() for name, w in trainer.parameters.items()}
    velocity = {name: np.zeros_like(w) for name, w in expected.items()}

    def apply(old: dict[str, Any] | None) -> None:
        if old:
            trainer.optimizer.update(expected, old, {"velocity": velocity})

    for step in range(8):
        weight = weight_of(comm, step)
        trainer.step(gradients_of(comm, step), weight)
        means.append({})
        twin.step(gradients_of(comm, step), weight)
        if step >= steps:
            apply(means[step - steps])
        agree(comm, all(np.array_equal(w, expected[name]) for name, w in trainer.parameters.items()), f"step {step}")
    trainer.synchronize()
    for old in means[-steps:]:
        apply(old)
    agree(comm, all(np.array_equal(w, expected[name]) for name, w in trainer.parameters.items()), "synchronize")
    stepper.update = update
    for each in (trainer, twin):
        each.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_a_checkpoint_keeps_what_was_not_applied(comm, agree, mpi_tmp_path, compression):
    path = mpi_tmp_path / "checkpoint"
    trainer, resumed = (new_trainer(comm, Delayed(2), compression) for _ in range(2))
    for step in range(3):
        trainer.step(gradients_of(comm, step))
    write_checkpoint(path, trainer, {})
    load_checkpoint(path, resumed)
    for step in range(3, 6):
        for each in (trainer, resumed):
            each.step(gradients_of(comm, step))
    for each in (trainer, resumed):
        each.synchronize()
    agree(comm, everything(trainer) == everything(resumed))
    for each in (trainer, resumed):
        each.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_a_step_that_fails_leaves_what_is_under_way(comm, agree, compression):
    trainer, twin = (new_trainer(comm, "delayed", compression) for _ in range(2))
    for each in (trainer, twin):
        each.step(gradients_of(comm, 0))
    bad = gradients_of(comm, 1)
    if comm.rank == comm.size - 1:
        bad["a"][0, 0] = np.nan
    error = raised(trainer.step, bad)
    agree(comm, "'a' holds NaN" in str(error), repr(error))
    for step in (1, 2):
        for each in (trainer, twin):
            each.step(gradients_of(comm, step))
    for each in (trainer, twin):
        each.synchronize()
    agree(comm, everything(trainer) == everything(twin))
    for each in (trainer, twin):
        each.free()


def test_the_number_of_steps_stays(comm, agree):
    trainer = new_trainer(comm, "delayed", None)
    error = raised(lambda: setattr(trainer, "mode", Delayed(2)))
    agree(comm, isinstance(error, (ValueError, PeerError)) and "steps must stay 1" in str(error), repr(error))
    trainer.free()


@pytest.mark.parametrize("place", ["came", "ended"])
def test_an_interrupt_while_the_sums_come(comm, agree, monkeypatch, place):
    """The call can be made again, and has lost nothing."""
    trainer, twin = (new_trainer(comm, "delayed", None) for _ in range(2))
    for step in range(2):
        for each in (trainer, twin):
            each.step(gradients_of(comm, step))
    interrupted = False
    if comm.rank == comm.size - 1:
        with monkeypatch.context() as patch:
            patch.setattr(Timeline, place, lambda *_: signal.raise_signal(signal.SIGINT))
            try:
                trainer.step(gradients_of(comm, 2))
            except KeyboardInterrupt:
                interrupted = True
    agree(comm, interrupted == (comm.rank == comm.size - 1), "no interrupt")
    for step in range(2, 5):
        for each in (trainer, twin):
            each.step(gradients_of(comm, step))
    agree(comm, everything(trainer) == everything(twin))
    for each in (trainer, twin):
        each.free()
