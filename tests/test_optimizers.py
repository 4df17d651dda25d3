"""What every registered optimizer must do; a new file in training/optimizers/ is covered the moment it exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitring import SGD, AdaGrad
from bitring.training.optimizer import Optimizer, optimizers

pytestmark = pytest.mark.single

each_optimizer = pytest.mark.parametrize("name", optimizers.names())
SHAPES = {"scalar": (), "none": (0,), "small": (7, 3), "large": (70_001,)}


def gradients_of(step: int, dtype: Any = np.float64) -> dict[str, Any]:
    random = np.random.default_rng(step)
    return {name: np.array(random.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}


@each_optimizer
def test_settings_are_frozen_and_equal_by_value(name: str) -> None:
    make: Any = optimizers.get(name)
    assert make() == make() and hash(make()) == hash(make())
    with pytest.raises(AttributeError):
        make().lr = 1


@each_optimizer
def test_update_is_apply_value_by_value(name: str) -> None:
    """Small arrays together, large ones piece by piece, or each value alone: the same."""
    optimizer: Any = optimizers.get(name)()
    parameters = gradients_of(0)
    state = optimizer.init(parameters)
    alone = {parameter: w.reshape(-1)[:5].copy() for parameter, w in parameters.items()}
    slots = {parameter: {slot: np.zeros_like(w) for slot in optimizer.slots} for parameter, w in alone.items()}
    for step in range(1, 5):
        gradients = gradients_of(step)
        kept = {parameter: g.copy() for parameter, g in gradients.items()}
        optimizer.update(parameters, gradients, state)
        assert all(np.array_equal(g, kept[parameter]) for parameter, g in gradients.items()), "they are only read"
        for parameter, w in alone.items():
            for i in range(w.size):
                one = slice(i, i + 1)
                of_one = {slot: array[one] for slot, array in slots[parameter].items()}
                of_one |= dict.fromkeys(optimizer.counters, step)
                optimizer.apply(w[one], kept[parameter].reshape(-1)[one], of_one, np.empty(1), np.empty(1))
    for parameter, w in alone.items():
        np.testing.assert_allclose(parameters[parameter].reshape(-1)[:5], w, rtol=1e-13, atol=1e-15)
        for slot, array in slots[parameter].items():
            np.testing.assert_allclose(state[slot][parameter].reshape(-1)[:5], array, rtol=1e-13, atol=1e-15)


@each_optimizer
def test_goes_down(name: str) -> None:
    """Half the squared distance to a target becomes smaller."""
    optimizer: Any = optimizers.get(name)()
    parameters = {"w": np.zeros(50)}
    state = optimizer.init(parameters)
    for _ in range(30):
        optimizer.update(parameters, {"w": parameters["w"] - 1}, state)
    assert (parameters["w"] > 0).all() and (parameters["w"] < 2).all()


@each_optimizer
def test_zeros_change_nothing_and_restart_keeps_shapes(name: str) -> None:
    optimizer: Any = optimizers.get(name)()
    parameters, before = gradients_of(0), gradients_of(0)
    state = optimizer.init(parameters)
    optimizer.update(parameters, {parameter: np.zeros_like(w) for parameter, w in parameters.items()}, state)
    assert all(np.array_equal(w, before[parameter]) for parameter, w in parameters.items())
    optimizer.restart(state)
    for slot in optimizer.slots:
        assert {parameter: x.shape for parameter, x in state[slot].items()} == SHAPES
    assert set(state) == set(optimizer.kept)


@each_optimizer
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_keeps_the_dtype(name: str, dtype: Any) -> None:
    optimizer: Any = optimizers.get(name)()
    parameters = gradients_of(0, dtype)
    state = optimizer.init(parameters)
    optimizer.update(parameters, gradients_of(1, dtype), state)
    slots = [state[slot] for slot in optimizer.slots]
    assert all(x.dtype == dtype for arrays in (parameters, *slots) for x in arrays.values())


@each_optimizer
def test_counts_the_updates_of_each_parameter(name: str) -> None:
    """Parameters that were updated less often are as if they were alone."""
    optimizer: Any = optimizers.get(name)()
    parameters, alone = gradients_of(0), gradients_of(0)
    state, state_alone = optimizer.init(parameters), optimizer.init(alone)
    for step in range(1, 4):
        gradients = gradients_of(step)
        some = [p for i, p in enumerate(parameters) if i < step]
        optimizer.update({p: parameters[p] for p in some}, gradients, state)
        for p in some:
            optimizer.update({p: alone[p]}, gradients, state_alone)
    for counter in optimizer.counters:
        assert [int(state[counter][p]) for p in parameters] == [3, 2, 1, 0]
        assert all(x.shape == () and x.dtype == np.int64 for x in state[counter].values())
    for p in parameters:
        np.testing.assert_allclose(parameters[p], alone[p], rtol=1e-13, atol=1e-15)


@dataclass(frozen=True)
class Normed(Optimizer):
    """A step of one length for each parameter, whose rows it sees."""

    @property
    def slots(self) -> tuple[str, ...]:
        return ("rows",)

    def update_parameter(self, w: Any, g: Any, slots: Any) -> None:
        assert w.shape == g.shape == slots["rows"].shape
        slots["rows"] += g
        w -= g / (np.linalg.norm(g) or 1.0)


def test_an_optimizer_can_see_whole_parameters() -> None:
    parameters, gradients = gradients_of(0), gradients_of(1)
    before = {name: w.copy() for name, w in parameters.items()}
    optimizer = Normed()
    state = optimizer.init(parameters)
    optimizer.update(parameters, gradients, state)
    for name, w in parameters.items():
        length = np.linalg.norm(gradients[name]) or 1.0
        np.testing.assert_allclose(w, before[name] - gradients[name] / length)
        np.testing.assert_array_equal(state["rows"][name], gradients[name])
    assert optimizer.may_raise


@dataclass(frozen=True)
class Halving(Normed):
    """Its steps become shorter with each."""

    counters = ("made",)

    def update_parameter(self, w: Any, g: Any, slots: Any) -> None:
        w -= g / 2 ** slots["made"]


def test_an_optimizer_of_whole_parameters_can_count() -> None:
    parameters, gradients = gradients_of(0), gradients_of(1)
    before = {name: w.copy() for name, w in parameters.items()}
    state = Halving().init(parameters)
    for _ in range(2):
        Halving().update(parameters, gradients, state)
    for name, w in parameters.items():
        np.testing.assert_allclose(w, before[name] - gradients[name] * 0.75)
        assert state["made"][name] == 2


@pytest.mark.parametrize("base", [SGD, AdaGrad])
def test_what_has_another_update_than_the_class_it_is_derived_from_has_not_its_kernel(base: Any) -> None:
    class Renamed(base):
        """The same."""

    class Half(base):
        def apply(self, w: Any, g: Any, slots: Any, t: Any, u: Any) -> None:
            super().apply(w, g / 2, slots, t, u)

    class Clipped(base):
        def update(self, parameters: Any, gradients: Any, state: Any) -> None:
            super().update(parameters, {name: np.clip(g, -1, 1) for name, g in gradients.items()}, state)

    assert Renamed(lr=1.0).native_update() == base(lr=1.0).native_update()
    assert Half(lr=1.0).native_update() is None and Clipped(lr=1.0).native_update() is None
