"""What every registered mode must do; a new file in training/modes/ is covered the moment it exists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitring.collectives.communicator import Communicator
from bitring.errors import NonFiniteError
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import FreeMode, modes
from bitring.training.optimizers.sgd import SGD

each_mode = pytest.mark.parametrize("name", modes.names())
FREE = {name for name in modes.names() if issubclass(modes.get(name), FreeMode)}
STEPS = 7


def new_trainer(comm: Any, name: str, compression: str | None = None) -> DataParallel:
    parameters = {"a": Communicator(comm).empty((40, 30)), "b": Communicator(comm).empty(7, np.float64)}
    parameters["a"][...], parameters["b"][...] = 1, 0
    return DataParallel(parameters, SGD(lr=0.1, momentum=0.9), comm=comm, mode=name, compression=compression)


def train(trainer: DataParallel, steps: int) -> None:
    """Steps that depend on the rank, the step and the parameters, of unequal weights."""
    for _ in range(steps):
        random = np.random.default_rng((trainer.rank, trainer.steps))
        gradients = {n: (w - random.standard_normal(w.shape)).astype(w.dtype) for n, w in trainer.parameters.items()}
        trainer.step(gradients, weight=(trainer.rank + trainer.steps) % 3)


def equal_everywhere(trainer: DataParallel) -> bool:
    return len(set(trainer.comm.allgather(trainer.digest()))) == 1


@each_mode
def test_settings_are_frozen_and_equal_by_value(name: str) -> None:
    make: Any = modes.get(name)
    assert make() == make() and hash(make()) == hash(make())
    with pytest.raises(AttributeError):
        make().anything = 1


@each_mode
@pytest.mark.parametrize("compression", [None, "onebit"])
def test_replicas_are_equal_after_synchronize(comm: Any, agree: Any, name: str, compression: str | None) -> None:
    if compression is not None and name == "hogwild":  # nothing travels there
        with pytest.raises(ValueError, match="compression"):
            new_trainer(comm, name, compression)
        return
    trainer = new_trainer(comm, name, compression)
    before = trainer.digest()
    train(trainer, STEPS)
    trainer.synchronize()
    agree(comm, equal_everywhere(trainer) and trainer.digest() != before)
    trainer.free()


@each_mode
def test_state_goes_back_in_time(comm: Any, agree: Any, name: str) -> None:
    if name in FREE and comm.size > 1:
        pytest.skip("of which no two runs are the same")
    trainer, other = (new_trainer(comm, name) for _ in range(2))
    train(trainer, 3)
    state = trainer.state_dict()
    train(trainer, STEPS)
    train(other, 1)
    for each in (other, trainer):
        wanted = trainer.digest()
        each.load_state_dict(state)
        train(each, STEPS)
        agree(comm, each.digest() == wanted, "went another way")
    for each in (trainer, other):
        each.free()


@each_mode
def test_no_samples_change_nothing(comm: Any, agree: Any, name: str) -> None:
    """On no rank; and a rank without any has no say, whatever its gradients are."""
    trainer = new_trainer(comm, name)
    before = trainer.digest()
    zeros = {parameter: np.zeros_like(w) for parameter, w in trainer.parameters.items()}
    for _ in range(STEPS):
        trainer.step(zeros, weight=0)
    trainer.synchronize()
    agree(comm, trainer.digest() == before and trainer.steps == STEPS)
    trainer.free()


@each_mode
def test_not_finite_raises_everywhere_and_the_step_can_be_made_again(comm: Any, agree: Any, name: str) -> None:
    """At the latest when ranks meet next; nothing of it is left."""
    good, bad = (new_trainer(comm, name) for _ in range(2))
    train(good, 2)
    train(bad, 2)
    gradients = {parameter: np.ones_like(w) for parameter, w in bad.parameters.items()}
    if comm.rank == comm.size - 1:
        gradients["b"][3] = np.inf
    said: Exception | None = None
    comm.Barrier()
    for call in (lambda: bad.step(gradients), bad.synchronize):
        try:
            call()
        except Exception as error:  # whichever it is, the others must not wait
            said = error
            if name not in FREE:  # of which each rank raises it once, at one of the two
                break
    agree(comm, isinstance(said, NonFiniteError) and "b" in str(said), repr(said))
    finite = all(np.isfinite(w).all() for w in bad.parameters.values())
    agree(comm, bool(finite))
    for trainer in (good, bad):
        trainer.free()
