"""Every registered model: gradients against finite differences, their order, errors; and that they learn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from bitring.models.dataset import load
from bitring.models.model import Model, models
from bitring.models.networks.cnn import CNN
from bitring.models.networks.mlp import MLP
from bitring.models.networks.softmax import Softmax

pytestmark = pytest.mark.single


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """BLAS threads that wait for each other on a busy machine make these small products very slow."""
    with threadpool_limits(1):
        yield


SHAPES = {"cnn": [(8, 8), (6, 5, 3), (28, 28)]}  # same padding, odd sides after the pool, unpadded
CASES = [(name, shape) for name in models.names() for shape in SHAPES.get(name, [(3, 4), (7,)])]
IDS = [f"{name}-{'x'.join(map(str, shape))}" for name, shape in CASES]


def batch(shape: tuple[int, ...], samples: int, classes: int, dtype: Any = np.float64) -> tuple[Any, Any]:
    random = np.random.default_rng(7)
    return random.random((samples, *shape)).astype(dtype), random.integers(0, classes, samples)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_gradients_equal_finite_differences(name: str, shape: tuple[int, ...]) -> None:
    model = models.get(name)(shape, 5, dtype=np.float64, seed=1)
    x, y = batch(shape, 3, 5)
    random = np.random.default_rng(8)
    for parameter in model.parameters.values():  # biases other than 0
        parameter += 0.01 * random.standard_normal(parameter.shape)
    loss, gradients = model.loss_and_gradients(x, y)
    assert loss == pytest.approx(model.loss(x, y), rel=1e-12)
    step = 1e-6
    for parameter, values in model.parameters.items():
        flat = values.reshape(-1)
        assert np.shares_memory(flat, values)
        for at in random.choice(flat.size, min(6, flat.size), replace=False):
            before = flat[at]
            flat[at] = before + step
            above = model.loss(x, y)
            flat[at] = before - step
            below = model.loss(x, y)
            flat[at] = before
            measured = (above - below) / (2 * step)
            assert gradients[parameter].reshape(-1)[at] == pytest.approx(measured, rel=1e-5, abs=1e-8), parameter


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_gradients_come_from_the_last_to_the_first(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    model = models.get(name)(shape, 5, dtype=dtype)
    for samples in (0, 1, 3):
        x, y = batch(shape, samples, 5, dtype)
        calls: list[tuple[str, Any]] = []
        loss, gradients = model.loss_and_gradients(x, y, lambda *call, calls=calls: calls.append(call))
        assert [call[0] for call in calls] == list(reversed(model.parameters))
        assert list(gradients) == list(model.parameters)
        for parameter, gradient in calls:
            assert gradients[parameter] is gradient
            assert gradient.shape == model.parameters[parameter].shape
            assert gradient.dtype == dtype and gradient.flags.c_contiguous
            assert not any(np.shares_memory(gradient, value) for value in model.parameters.values())
        if samples:
            assert isinstance(loss, float) and loss > 0 and any(gradient.any() for gradient in gradients.values())
        else:
            assert loss == 0.0 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_gradients_stay_as_they_were_when_the_next_come(name: str, shape: tuple[int, ...]) -> None:
    model = models.get(name)(shape, 5)
    x, y = batch(shape, 6, 5, np.float32)
    _, first = model.loss_and_gradients(x[:3], y[:3])
    copies = {name: gradient.copy() for name, gradient in first.items()}
    model.loss_and_gradients(x[3:], y[3:])
    model.accuracy(x, y)
    for parameter, gradient in first.items():
        np.testing.assert_array_equal(gradient, copies[parameter])


@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_weighted_parts_add_up_to_the_whole_batch(name: str, shape: tuple[int, ...]) -> None:
    """The identity that data-parallel training rests on, for uneven and empty parts."""
    model = models.get(name)(shape, 5, dtype=np.float64)
    x, y = batch(shape, 7, 5)
    loss, whole = model.loss_and_gradients(x, y)
    parts = [slice(0, 0), slice(0, 2), slice(2, 7)]
    results = [(len(x[part]), *model.loss_and_gradients(x[part], y[part])) for part in parts]
    assert sum(n * part_loss for n, part_loss, _ in results) / 7 == pytest.approx(loss, rel=1e-12)
    for parameter, gradient in whole.items():
        summed = sum(n * gradients[parameter] for n, _, gradients in results) / 7
        np.testing.assert_allclose(summed, gradient, rtol=1e-9, atol=1e-13)


def test_evaluation_in_batches_is_evaluation_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP((4, 4), 3, hidden=(8,), dtype=np.float64)
    x, y = batch((4, 4), 23, 3)
    at_once = model.logits(x), model.loss(x, y), model.accuracy(x, y)
    assert at_once[0].shape == (23, 3)
    assert at_once[1] == pytest.approx(model.loss_and_gradients(x, y)[0], rel=1e-12)
    assert at_once[2] == np.mean(at_once[0].argmax(axis=1) == y)
    monkeypatch.setattr(Model, "EVALUATION_BATCH", 5)
    np.testing.assert_allclose(model.logits(x), at_once[0], rtol=1e-12)
    assert model.loss(x, y) == pytest.approx(at_once[1], rel=1e-12)
    assert model.accuracy(x, y) == at_once[2]
    assert model.logits(x[:0]).shape == (0, 3) and model.loss(x[:0], y[:0]) == 0 and model.accuracy(x[:0], y[:0]) == 0


def test_the_network_of_the_card() -> None:
    """Unpadded at 28×28: 28 -> 24 -> 12 -> 8 -> 4; the 8×8 digits keep their size: 8 -> 4 -> 2."""
    shapes = {name: value.shape for name, value in CNN((28, 28), 10).parameters.items()}
    assert shapes == {
        "conv1.weight": (32, 5, 5, 1),
        "conv1.bias": (32,),
        "conv2.weight": (64, 5, 5, 32),
        "conv2.bias": (64,),
        "dense1.weight": (1024, 4 * 4 * 64),
        "dense1.bias": (1024,),
        "dense2.weight": (10, 1024),
        "dense2.bias": (10,),
    }
    assert CNN((8, 8), 10).parameters["dense1.weight"].shape == (1024, 2 * 2 * 64)
    assert CNN((32, 32, 3), 10).parameters["conv1.weight"].shape == (32, 5, 5, 3)
    assert list(Softmax((8, 8), 10).parameters) == ["dense1.weight", "dense1.bias"]
    assert [value.shape for value in MLP((8, 8), 10, hidden=(7, 5)).parameters.values()] == [
        (7, 64),
        (7,),
        (5, 7),
        (5,),
        (10, 5),
        (10,),
    ]


def test_pool_before_relu_is_relu_before_pool() -> None:
    from bitring.models.layers import MaxPool, ReLU, Workspace

    x, dy = np.random.default_rng(9).standard_normal((2, 4, 6, 6, 3)), np.ones((4, 3, 3, 3))
    ends: list[Any] = []
    pool, relu = MaxPool(), ReLU()
    for layers in ((pool, relu), (relu, pool)):
        workspace, y, backwards = Workspace(np), x[0].copy(), list[Any]()
        for layer in layers:
            y, backward = layer.forward(workspace, {}, y)
            backwards.append(backward)
        d = dy.copy()
        for backward in reversed(backwards):
            d = backward(d, None)
        ends.append((y.copy(), d.copy()))
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_seed_makes_the_parameters(name: str, shape: tuple[int, ...]) -> None:
    one, two, other = (models.get(name)(shape, 5, seed=seed) for seed in (4, 4, 5))
    for parameter, value in one.parameters.items():
        assert value.dtype == np.float32 and value.flags.c_contiguous and value.flags.writeable
        np.testing.assert_array_equal(value, two.parameters[parameter])
        if parameter.endswith(".bias"):
            assert not value.any()
        else:
            assert (value != other.parameters[parameter]).any()
            if value.size > 1000:  # He: standard deviation sqrt(2 / inputs)
                inputs = np.prod(value.shape[1:])
                assert value.std() == pytest.approx(np.sqrt(2 / inputs), rel=0.1)


def test_parameters_are_read_in_every_call() -> None:
    model = Softmax((2,), 2, dtype=np.float64)
    x, y = np.ones((1, 2)), np.array([0])
    model.parameters["dense1.weight"][...] = 0
    assert model.loss(x, y) == pytest.approx(np.log(2))
    model.parameters["dense1.weight"][0] = 50
    assert model.loss(x, y) == pytest.approx(0, abs=1e-12)


def test_a_channel_axis_of_one_may_be_there_or_not_and_float_kinds_mix() -> None:
    model = CNN((8, 8), 4)
    x, y = batch((8, 8), 3, 4)
    expected = model.logits(x.astype(np.float32))
    np.testing.assert_array_equal(model.logits(x), expected)
    np.testing.assert_array_equal(model.logits(x[..., None]), expected)
    np.testing.assert_array_equal(CNN((8, 8, 1), 4).logits(x), expected)
    strided = np.asfortranarray(x)[::1]
    np.testing.assert_array_equal(model.logits(strided), expected)
    x.flags.writeable = False
    model.loss_and_gradients(x, y)


def test_nan_reaches_the_loss_and_the_gradients() -> None:
    model = CNN((8, 8), 4)
    x, y = batch((8, 8), 3, 4, np.float32)
    x[1, 3, 3] = np.nan
    loss, gradients = model.loss_and_gradients(x, y)
    assert np.isnan(loss)
    assert all(np.isnan(gradient).any() for gradient in gradients.values())


GOOD_X, GOOD_Y = np.zeros((3, 8, 8), np.float32), np.array([0, 1, 3])


@pytest.mark.parametrize(
    ("x", "y", "error", "text"),
    [
        (GOOD_X[:, :7], GOOD_Y, ValueError, "CNN.loss_and_gradients: x must have shape (N, 8, 8), got (3, 7, 8)"),
        (GOOD_X[0], GOOD_Y, ValueError, "x must have shape (N, 8, 8), got (8, 8)"),
        (np.float32(1) * np.ones(()), GOOD_Y, TypeError, "x must be a numpy array, got numpy.float"),
        (np.zeros((3, 8, 8, 3), np.float32), GOOD_Y, ValueError, "got (3, 8, 8, 3)"),
        (GOOD_X.tolist(), GOOD_Y, TypeError, "x must be a numpy array, got builtins.list"),
        (GOOD_X.astype(np.uint8), GOOD_Y, TypeError, "x must be floating, such as float32, got uint8"),
        (GOOD_X, [0, 1, 3], TypeError, "y must be a numpy array, got builtins.list"),
        (GOOD_X, None, TypeError, "y must be a numpy array, got builtins.NoneType"),
        (GOOD_X, GOOD_Y.astype(np.float32), TypeError, "y must be integers, got float32"),
        (GOOD_X, GOOD_Y[:2], ValueError, "y must have shape (3,), as many as x, got (2,)"),
        (GOOD_X, GOOD_Y[:, None], ValueError, "y must have shape (3,), as many as x, got (3, 1)"),
        (GOOD_X, GOOD_Y + 1, ValueError, "y must be from 0 to 3, got 1 to 4"),
        (GOOD_X, GOOD_Y - 1, ValueError, "y must be from 0 to 3, got -1 to 2"),
    ],
)
def test_bad_batches(x: Any, y: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        CNN((8, 8), 4).loss_and_gradients(x, y)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: models.get("rnn"), f"unknown model 'rnn'; known: {', '.join(models.names())}"),
        (lambda: Softmax((), 3), "Softmax: input_shape must be one or more positive sizes, got ()"),
        (lambda: Softmax((3, 0), 3), "Softmax: input_shape must be one or more positive sizes, got (3, 0)"),
        (lambda: Softmax((3,), 1), "Softmax: classes must be at least 2; got 1"),
        (lambda: Softmax((3,), 2, dtype=np.float16), "Softmax: dtype must be float32 or float64, got float16"),
        (lambda: Softmax((3,), 2, seed=-1), "Softmax: seed must be at least 0; got -1"),
        (lambda: MLP((3,), 2, hidden=(4, 0)), "MLP: hidden must be positive sizes, got (4, 0)"),
        (lambda: CNN((64,), 2), "CNN: input_shape must be (H, W) or (H, W, C) with H and W from 4 on, got (64,)"),
        (lambda: CNN((3, 8), 2), "with H and W from 4 on, got (3, 8)"),
    ],
)
def test_bad_models(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def test_the_registry_has_the_models() -> None:
    assert {"cnn", "mlp", "softmax"} <= set(models.names())
    assert models.get("cnn") is CNN


def train(model: Model, x: Any, y: Any, epochs: int) -> None:
    """One process, SGD with momentum; the learning rate, momentum and batch size of the quick start."""
    velocity = {name: np.zeros_like(value) for name, value in model.parameters.items()}
    for epoch in range(epochs):
        order = np.random.default_rng([0, epoch]).permutation(len(x))
        for first in range(0, len(x), 64):
            chosen = order[first : first + 64]
            _, gradients = model.loss_and_gradients(x[chosen], y[chosen])
            for name, value in model.parameters.items():
                velocity[name] *= 0.9
                velocity[name] += gradients[name]
                value -= 0.02 * velocity[name]


@pytest.mark.parametrize(("name", "epochs", "accuracy"), [("cnn", 10, 0.97), ("mlp", 10, 0.94), ("softmax", 10, 0.88)])
def test_learns_the_digits(name: str, epochs: int, accuracy: float) -> None:
    pytest.importorskip("sklearn")
    data = load("digits")
    model = models.get(name)(data.input_shape, data.classes)
    train(model, data.x_train, data.y_train, epochs)
    reached = model.accuracy(data.x_test, data.y_test)
    assert reached >= accuracy
