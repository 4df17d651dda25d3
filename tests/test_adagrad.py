"""AdaGrad against its definition, written out value by value."""

import ml_dtypes
import numpy as np
import pytest

from bitring.training.optimizer import optimizers
from bitring.training.optimizers.adagrad import AdaGrad

pytestmark = pytest.mark.single


@pytest.mark.parametrize("settings", [AdaGrad(lr=0.1), AdaGrad(lr=0.1, eps=1e-3, weight_decay=0.01)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (65537,)], ids=str)
def test_equals_the_definition(settings, shape):
    rng = np.random.default_rng(0)
    w = np.array(rng.standard_normal(shape))
    expected, squares = w.copy(), np.zeros(shape)
    parameters = {"w": w}
    state = settings.init(parameters)
    for _ in range(4):
        gradient = np.array(rng.standard_normal(shape))
        kept = gradient.copy()
        settings.update(parameters, {"w": gradient}, state)
        assert np.array_equal(gradient, kept), "gradients are only read"
        g = kept + settings.weight_decay * expected
        squares = squares + g**2
        expected = expected - settings.lr * g / (np.sqrt(squares) + settings.eps)
    np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state["squares"]["w"], squares, rtol=1e-12)


def test_known_values():
    """Gradients 3 and 4: steps of 0.1·3/3 and 0.1·4/5."""
    w = np.array([1.0])
    settings = AdaGrad(lr=0.1)
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.array([3.0])}, state)
    assert w[0] == pytest.approx(0.9)
    settings.update({"w": w}, {"w": np.array([4.0])}, state)
    assert w[0] == pytest.approx(0.82)


def test_a_zero_gradient_changes_nothing():
    w = np.ones(3, np.float32)
    settings = AdaGrad()
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.zeros(3, np.float32)}, state)
    assert (w == 1).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_keeps_the_dtype(dtype):
    w = np.ones(5, dtype)
    settings = AdaGrad(weight_decay=0.1)
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.ones(5, dtype)}, state)
    assert w.dtype == dtype and state["squares"]["w"].dtype == dtype
    assert (w.astype(float) < 1).all()


def test_restart_keeps_the_squares():
    w = np.ones(3)
    settings = AdaGrad()
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.ones(3)}, state)
    settings.restart(state)
    assert (state["squares"]["w"] == 1).all()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lr": -1}, "AdaGrad: lr must be above 0 and finite; got -1"),
        ({"eps": 0}, "AdaGrad: eps must be above 0 and finite; got 0"),
        ({"weight_decay": float("inf")}, "AdaGrad: weight_decay must be at least 0 and finite; got inf"),
    ],
    ids=str,
)
def test_wrong_settings(given, text):
    with pytest.raises(ValueError) as caught:
        AdaGrad(**given)
    assert str(caught.value) == text


def test_is_registered():
    assert optimizers.get("adagrad") is AdaGrad
