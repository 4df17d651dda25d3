"""SGD against its definition, written out value by value."""

import ml_dtypes
import numpy as np
import pytest

from bitring.training.optimizer import optimizers
from bitring.training.optimizers.sgd import SGD

pytestmark = pytest.mark.single

SETTINGS = [
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.9),
    SGD(lr=0.1, weight_decay=0.01),
    SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
    SGD(lr=0.1, momentum=0.9, nesterov=True),
    SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
]


def by_definition(settings, w, gradients):
    velocity = np.zeros_like(w)
    for g in gradients:
        g = g + settings.weight_decay * w
        velocity = settings.momentum * velocity + g
        w = w - settings.lr * (g + settings.momentum * velocity if settings.nesterov else velocity)
    return w


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (65537,), (331, 211)], ids=str)
def test_equals_the_definition(settings, shape):
    rng = np.random.default_rng(0)
    w = np.array(rng.standard_normal(shape))
    gradients = [np.array(rng.standard_normal(shape)) for _ in range(4)]
    kept = [g.copy() for g in gradients]
    expected = by_definition(settings, w, gradients)
    parameters = {"w": w}
    state = settings.init(parameters)
    for g in gradients:
        settings.update(parameters, {"w": g}, state)
    np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-12)
    assert all(np.array_equal(g, k) for g, k in zip(gradients, kept, strict=True)), "gradients are only read"


def test_known_values():
    """Two steps worked out by hand, as torch.optim.SGD makes them."""
    w = np.array([1.0])
    settings = SGD(lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.1)
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.array([0.9])}, state)
    # g = 0.9 + 0.1 = 1, v = 1, step 0.1·(1 + 0.5)
    assert w[0] == pytest.approx(0.85)
    settings.update({"w": w}, {"w": np.array([0.415])}, state)
    # g = 0.415 + 0.085 = 0.5, v = 0.5 + 0.5 = 1, step 0.1·(0.5 + 0.5)
    assert w[0] == pytest.approx(0.75)
    assert state["velocity"]["w"][0] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_keeps_the_dtype(settings, dtype):
    w = np.ones(5, dtype)
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.ones(5, dtype)}, state)
    assert w.dtype == dtype and all(slot["w"].dtype == dtype for slot in state.values())
    assert (w.astype(float) < 1).all()


def test_updates_some_of_the_parameters():
    settings = SGD(lr=1.0, momentum=0.5)
    parameters = {"a": np.ones(3), "b": np.ones(4, np.float32)}
    state = settings.init(parameters)
    settings.update({"b": parameters["b"]}, {"b": np.ones(4, np.float32)}, state)
    assert (parameters["a"] == 1).all() and (parameters["b"] == 0).all()


def test_restart_forgets_the_velocity():
    settings = SGD(momentum=0.5)
    w = np.ones(3)
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.ones(3)}, state)
    settings.restart(state)
    assert (state["velocity"]["w"] == 0).all()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"lr": 0}, ValueError, "SGD: lr must be above 0 and finite; got 0"),
        ({"lr": float("nan")}, ValueError, "SGD: lr must be above 0 and finite; got nan"),
        ({"lr": "0.1"}, TypeError, "SGD: lr must be a number; got str"),
        ({"momentum": -0.1}, ValueError, "SGD: momentum must be at least 0 and below 1; got -0.1"),
        ({"momentum": 1}, ValueError, "SGD: momentum must be at least 0 and below 1; got 1"),
        ({"weight_decay": -1}, ValueError, "SGD: weight_decay must be at least 0 and finite; got -1"),
        ({"nesterov": True}, ValueError, "SGD: nesterov=True needs momentum > 0, got momentum=0"),
    ],
    ids=str,
)
def test_wrong_settings(given, error, text):
    with pytest.raises(error) as caught:
        SGD(**given)
    assert str(caught.value) == text


def test_is_registered():
    assert optimizers.get("sgd") is SGD
