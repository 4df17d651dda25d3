"""Models as graphs: branches, joins, shared layers, an LSTM; against finite differences, plain loops, and torch."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.models.graph import INPUT, kept_values
from bitring.models.layers import Workspace
from bitring.models.model import Model
from bitring.models.recurrent import LSTM

pytestmark = pytest.mark.single


def two_branches(shape: tuple[int, ...] = (2, 5, 3), units: int = 4, **settings: Any) -> Model:
    """The network of a shared LSTM on two sequences."""
    lstm = bitring.LSTM("lstm", units)
    return bitring.Graph(
        {
            "a": (bitring.Select(0), "input"),
            "b": (bitring.Select(1), "input"),
            "code_a": (lstm, "a"),
            "code_b": (lstm, "b"),
            "both": (bitring.Concatenate(), ("code_a", "code_b")),
            "dense1": (bitring.Dense("dense1", 2), "both"),
        },
        shape,
        2,
        **settings,
    )


def residual(**settings: Any) -> Model:
    """Sums, a layer that overwrites a value which others take, and a value that is taken twice by one layer."""
    return bitring.Graph(
        {
            "d1": (bitring.Dense("dense1", 6), "input"),
            "r1": (bitring.ReLU(), "d1"),
            "d2": (bitring.Dense("dense2", 6), "r1"),
            "sum": (bitring.Add(), ("d1", "d2", "d1")),
            "r2": (bitring.ReLU(), "sum"),
            "shared": (bitring.Dense("dense2", 6), "r2"),
            "all": (bitring.Concatenate(), ("shared", "r1", "d2")),
            "out": (bitring.Dense("dense3", 3), "all"),
        },
        (7,),
        3,
        **settings,
    )


def conv_branches(**settings: Any) -> Model:
    return bitring.Graph(
        {
            "c1": (bitring.Convolution("conv1", 3, kernel=3, padding=1), "input"),
            "left": (bitring.Convolution("conv2", 2, kernel=3, padding=1), "c1"),
            "right": (bitring.Convolution("conv3", 2, kernel=1), "c1"),
            "joined": (bitring.Concatenate(), ("left", "right")),
            "relu": (bitring.ReLU(), "joined"),
            "pool": (bitring.MaxPool(), "relu"),
            "out": (bitring.Dense("dense1", 3), "pool"),
        },
        (6, 5),
        3,
        **settings,
    )


MODELS = {"two_branches": two_branches, "residual": residual, "conv_branches": conv_branches}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_finite_differences(name: str) -> None:
    model = MODELS[name](dtype=np.float64, seed=1)
    random = np.random.default_rng(3)
    x, y = random.standard_normal((4, *model.input_shape)), random.integers(0, model.classes, 4)
    for parameter in model.parameters.values():
        parameter += 0.05 * random.standard_normal(parameter.shape)
    before = x.copy()
    emitted: list[str] = []
    loss, gradients = model.loss_and_gradients(x, y, on_gradient=lambda name, _: emitted.append(name))
    np.testing.assert_array_equal(x, before)
    assert sorted(emitted) == sorted(model.parameters) == sorted(gradients)
    assert loss == pytest.approx(model.loss(x, y), rel=1e-13)
    for parameter, values in model.parameters.items():
        flat = values.reshape(-1)
        for at in random.choice(flat.size, min(6, flat.size), replace=False):
            was, step = flat[at], 1e-6
            flat[at] = was + step
            above = model.loss(x, y)
            flat[at] = was - step
            below = model.loss(x, y)
            flat[at] = was
            assert gradients[parameter].reshape(-1)[at] == pytest.approx((above - below) / (2 * step), abs=2e-8)


def test_a_shared_layer_is_one_pass_over_both_branches() -> None:
    """One pass over both branches' samples, of which the gradient is the sum of the branches'."""
    random = np.random.default_rng(4)
    layer = LSTM("lstm", 3, 4)
    parameters = {name: random.standard_normal(shape) for name, shape in layer.shapes.items()}
    a, b, da, db = (random.standard_normal(shape) for shape in ((5, 6, 3), (5, 6, 3), (5, 4), (5, 4)))

    def gradients(x: Any, dy: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        layer.forward(Workspace(np), parameters, x)[1](dy, found.__setitem__)
        return found

    together = gradients(np.concatenate([a, b]), np.concatenate([da, db]))
    alone = gradients(a, da), gradients(b, db)
    for name, gradient in together.items():
        assert np.abs(gradient - (alone[0][name] + alone[1][name])).max() < 1e-13 * np.abs(gradient).max()


def plain_lstm(x: Any, weight: Any, recurrent: Any, bias: Any) -> Any:
    def sigmoid(z: Any) -> Any:
        return 1 / (1 + np.exp(-z))

    units = recurrent.shape[1]
    outputs = []
    for sample in x:
        h, c = np.zeros(units), np.zeros(units)
        for each in sample:
            i, f, g, o = (weight @ each + recurrent @ h + bias).reshape(4, units)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.array(outputs)


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_lstm_is_the_plain_loop(samples: int) -> None:
    random = np.random.default_rng(5)
    layer = LSTM("lstm", 3, 4)
    parameters = {name: random.standard_normal(shape) for name, shape in layer.shapes.items()}
    x = random.standard_normal((samples, 6, 3)) * 50  # saturated gates too
    y, _ = layer.forward(Workspace(np), parameters, x)
    np.testing.assert_allclose(y, plain_lstm(x, *parameters.values()).reshape(samples, 4), rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_shared_lstm_equals_torch() -> None:
    torch: Any = importlib.import_module("torch")
    model = two_branches((2, 14, 8), 6, dtype=np.float64)
    random = np.random.default_rng(6)
    x, y = random.standard_normal((5, 2, 14, 8)), random.integers(0, 2, 5)
    loss, gradients = model.loss_and_gradients(x, y)
    lstm = torch.nn.LSTM(8, 6, batch_first=True, dtype=torch.float64)
    dense = torch.nn.Linear(12, 2, dtype=torch.float64)
    theirs = {
        "lstm.weight": lstm.weight_ih_l0,
        "lstm.recurrent": lstm.weight_hh_l0,
        "lstm.bias": lstm.bias_ih_l0,
        "dense1.weight": dense.weight,
        "dense1.bias": dense.bias,
    }
    with torch.no_grad():
        lstm.bias_hh_l0.zero_()
        for name, parameter in theirs.items():
            parameter.copy_(torch.from_numpy(model.parameters[name]))
    given = torch.from_numpy(x)
    codes = [lstm(given[:, branch])[0][:, -1] for branch in (0, 1)]
    their_loss = torch.nn.functional.cross_entropy(dense(torch.cat(codes, 1)), torch.from_numpy(y))
    their_loss.backward()
    assert loss == pytest.approx(their_loss.item(), rel=1e-13)
    largest = max(float(abs(parameter.grad).max()) for parameter in theirs.values())
    for name, parameter in theirs.items():
        assert np.abs(gradients[name] - parameter.grad.numpy()).max() < 1e-13 * largest


def test_the_two_branches_learn() -> None:
    """Whether two sequences are of one kind: no branch alone can tell."""
    random = np.random.default_rng(7)
    kinds = random.integers(0, 2, (256, 2))
    x = random.standard_normal((256, 2, 8, 3)) * 0.3 + np.where(kinds, 1.0, -1.0)[:, :, None, None]
    y = (kinds[:, 0] == kinds[:, 1]).astype(int)
    lstm = bitring.LSTM("lstm", 8)
    model = bitring.Graph(
        {
            "a": (bitring.Select(0), "input"),
            "b": (bitring.Select(1), "input"),
            "code_a": (lstm, "a"),
            "code_b": (lstm, "b"),
            "both": (bitring.Concatenate(), ("code_a", "code_b")),
            "dense1": (bitring.Dense("dense1", 16), "both"),
            "relu": (bitring.ReLU(), "dense1"),
            "dense2": (bitring.Dense("dense2", 2), "relu"),
        },
        (2, 8, 3),
        2,
        seed=1,
    )
    optimizer = bitring.SGD(lr=0.1, momentum=0.9)
    state = optimizer.init(model.parameters)
    for _ in range(120):
        optimizer.update(model.parameters, model.loss_and_gradients(x, y)[1], state)
    assert model.accuracy(x, y) > 0.97


def test_a_sequence_is_the_network_of_the_card() -> None:
    """The same parameters, in name, order and bits, and the same bits of loss and gradients."""
    same = bitring.Sequence(
        [
            bitring.Convolution("conv1", 32, kernel=5),
            bitring.MaxPool(),
            bitring.ReLU(),
            bitring.Convolution("conv2", 64, kernel=5),
            bitring.MaxPool(),
            bitring.ReLU(),
            bitring.Flatten(),
            bitring.Dense("dense1", 1024),
            bitring.ReLU(),
            bitring.Dense("dense2", 10),
        ],
        (28, 28),
        10,
        seed=3,
    )
    card = bitring.CNN((28, 28), 10, seed=3)
    random = np.random.default_rng(8)
    x, y = random.random((4, 28, 28)).astype(np.float32), random.integers(0, 10, 4)
    (loss, gradients), (of_card, theirs) = same.loss_and_gradients(x, y), card.loss_and_gradients(x, y)
    assert loss == of_card and list(gradients) == list(theirs) == list(same.parameters)
    for name in theirs:
        np.testing.assert_array_equal(gradients[name], theirs[name])
        np.testing.assert_array_equal(same.parameters[name], card.parameters[name])


def test_what_comes_first_leaves_the_given_array_alone() -> None:
    model = bitring.Sequence([bitring.ReLU(), bitring.Dense("dense1", 2)], (3, 2), 2)
    x = -np.ones((2, 3, 2), np.float32)
    model.loss_and_gradients(x, np.zeros(2, int))
    np.testing.assert_array_equal(x, -np.ones((2, 3, 2)))
    assert [node.name for node in model.nodes] == ["relu1", "dense1_flat", "dense1"]
    assert kept_values(model.nodes) == {INPUT}


def test_factors_of_a_shared_layer_are_multiplied_out() -> None:
    model = residual(dtype=np.float64)
    random = np.random.default_rng(9)
    x, y = random.standard_normal((4, 7)), random.integers(0, 3, 4)
    _, plain = model.loss_and_gradients(x, y)
    _, given = model.loss_and_gradients(x, y, product=bitring.Factors)
    assert isinstance(given["dense1.weight"], bitring.Factors) and isinstance(given["dense2.weight"], np.ndarray)
    np.testing.assert_array_equal(given["dense2.weight"], plain["dense2.weight"])


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({}, ValueError, "Graph: layers must be one or more"),
        ({"a": ("dense", "input")}, TypeError, "layer 'a' must be a layer such as bitring.Dense('dense1', 10)"),
        ({"input": (bitring.ReLU(), "input")}, ValueError, "'input' is what the model is given"),
        ({"a": (bitring.ReLU(), "b")}, ValueError, "layer 'a' takes 'b'; before it there are input"),
        ({"a": (bitring.Dense("d", 4), "input")}, ValueError, "must give 3 values, one a class; it gives (4,)"),
        ({"a": (bitring.LSTM("l", 4), "input")}, ValueError, "layer 'a': LSTM(name='l', units=4) takes one value"),
        ({"a": (bitring.Add(), ("input",))}, ValueError, "two values or more of one shape; got (6,)"),
        ({"a": (bitring.Select(0), "input")}, ValueError, "at least two dimensions, the first above 0; got (6,)"),
        (
            {"a": (bitring.Dense("d", 4), "input"), "b": (bitring.Dense("e", 3), "input")},
            ValueError,
            "no layer takes 'a', which is not the last one",
        ),
        (
            {"a": (bitring.Dense("d", 4), "input"), "b": (bitring.Dense("d", 3), "a")},
            ValueError,
            "another layer has the name 'd', and they are not the same",
        ),
    ],
)
def test_errors(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        bitring.Graph(layers, (6,), 3)


def test_errors_of_a_sequence_and_of_descriptions() -> None:
    with pytest.raises(ValueError, match="two layers have the name 'd'"):
        bitring.Sequence([bitring.Dense("d", 4), bitring.Dense("d", 4)], (4,), 4)
    with pytest.raises(ValueError, match="Dense: outputs must be at least 1; got 0"):
        bitring.Dense("d", 0)
    with pytest.raises(ValueError, match="Dense: name must be without dots"):
        bitring.Dense("a.b", 1)
    with pytest.raises(ValueError, match="with H and W of at least 5"):
        bitring.Sequence([bitring.Convolution("c", 3, kernel=5)], (4, 8), 3)
