"""The layers against plain loops, the compiled loops against their references, and nothing outside the array module."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import pytest

from bitring.models.layers import Conv, Dense, Flatten, Layer, MaxPool, ReLU, Workspace, fold, pool, unpool
from bitring.models.model import models

pytestmark = pytest.mark.single


class DeviceArray(np.ndarray):
    """An array that refuses what CuPy's refuses: mixing with NumPy arrays, becoming one, NumPy's own functions."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **kwargs: Any) -> Any:
        for value in (*inputs, *out):
            if isinstance(value, np.ndarray) and not isinstance(value, DeviceArray):
                raise TypeError(f"{ufunc.__name__}: a host array among device arrays")
        plain = [value.view(np.ndarray) if isinstance(value, DeviceArray) else value for value in inputs]
        if out:
            getattr(ufunc, method)(*plain, out=tuple(value.view(np.ndarray) for value in out), **kwargs)
            return out[0]
        return on_device(getattr(ufunc, method)(*plain, **kwargs))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} called on a device array")


def on_device(x: Any) -> Any:
    return np.asarray(x).view(DeviceArray) if isinstance(x, (np.ndarray, np.generic)) else x


def on_host(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, DeviceArray) else x


class ArrayModule:
    """NumPy under another name, for device arrays, with only such functions as CuPy has too."""

    ndarray = DeviceArray
    __name__ = "device"
    FUNCTIONS = (
        *("arange", "asarray", "ascontiguousarray", "copyto", "empty", "exp", "log", "matmul", "maximum", "where"),
        *("zeros", "zeros_like"),
    )

    def __getattr__(self, name: str) -> Any:
        if name == "lib":
            return self
        if name == "stride_tricks":
            return self
        if name == "as_strided":
            return lambda x, shape, strides: on_device(np.lib.stride_tricks.as_strided(on_host(x), shape, strides))
        if name not in self.FUNCTIONS:
            raise AttributeError(f"the array module's {name} is not in CuPy, or not in the list")
        function = getattr(np, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*map(on_host, args), **{key: on_host(value) for key, value in kwargs.items()})
            return kwargs["out"] if kwargs.get("out") is not None else on_device(result)

        return call


DEVICE: Any = ArrayModule()


def run(layer: Layer, parameters: dict[str, Any], x: Any, dy: Any, xp: Any = np) -> tuple[Any, Any, dict[str, Any]]:
    """Output, gradient by the input, gradients by the parameters; x and dy are not touched."""
    workspace, gradients = Workspace(xp), dict[str, Any]()
    y, backward = layer.forward(workspace, parameters, x.copy())
    y = y.copy()
    dx = backward(dy.copy(), gradients.__setitem__)
    return y, dx, gradients


def random_parameters(layer: Layer, random: np.random.Generator, dtype: Any = np.float64) -> dict[str, Any]:
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in layer.shapes.items()}


def plain_conv(x: Any, weight: Any, bias: Any, padding: int) -> Any:
    """By its definition; the weight is (filter, column, row, channel)."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    k = weight.shape[1]
    y = np.zeros((len(x), x.shape[1] - k + 1, x.shape[2] - k + 1, len(weight)), x.dtype)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            y[:, i, j] = np.einsum("nhwc,fwhc->nf", x[:, i : i + k, j : j + k], weight) + bias
    return y


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "f"), [(3, 8, 8, 1, 2), (2, 7, 11, 3, 5), (1, 5, 5, 4, 1), (5, 5, 6, 2, 3)]
)
def test_conv_is_the_plain_loop(n: int, h: int, w: int, c: int, f: int, padding: int) -> None:
    random = np.random.default_rng(1)
    layer = Conv("conv", c, f, padding=padding)
    parameters = random_parameters(layer, random)
    x = random.standard_normal((n, h, w, c))
    expected = plain_conv(x, parameters["conv.weight"], parameters["conv.bias"], padding)
    dy = random.standard_normal(expected.shape)
    y, dx, gradients = run(layer, parameters, x, dy)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    # The convolution is linear in x and in the weight: <dy, conv(z)> must be <dx, z> for every z, as for the weight.
    z = random.standard_normal(x.shape)
    along = plain_conv(z, parameters["conv.weight"], 0 * parameters["conv.bias"], padding)
    assert np.vdot(dx, z) == pytest.approx(np.vdot(dy, along), rel=1e-10)
    v = random.standard_normal(parameters["conv.weight"].shape)
    along = plain_conv(x, v, 0 * parameters["conv.bias"], padding)
    assert np.vdot(gradients["conv.weight"], v) == pytest.approx(np.vdot(dy, along), rel=1e-10)
    np.testing.assert_allclose(gradients["conv.bias"], dy.sum(axis=(0, 1, 2)), rtol=1e-12)


def test_max_pool_is_the_plain_maximum_with_odd_sides_cut() -> None:
    x = np.random.default_rng(2).standard_normal((3, 5, 7, 2))
    dy = np.arange(1.0, 1 + 3 * 2 * 3 * 2).reshape(3, 2, 3, 2)
    y, dx, _ = run(MaxPool(), {}, x, dy)
    squares = x[:, :4, :6].reshape(3, 2, 2, 3, 2, 2)
    np.testing.assert_array_equal(y, squares.max(axis=(2, 4)))
    np.testing.assert_array_equal(dx[:, :4, :6].reshape(3, 2, 2, 3, 2, 2).sum(axis=(2, 4)), dy)
    assert not dx[:, 4:].any() and not dx[:, :, 6:].any()
    had = dx[:, :4, :6] != 0
    np.testing.assert_array_equal(x[:, :4, :6][had], y.repeat(2, axis=1).repeat(2, axis=2)[had])


@pytest.mark.parametrize("xp", [np, DEVICE], ids=["compiled", "reference"])
def test_the_first_of_equals_has_the_gradient_and_nan_is_passed_on(xp: Any) -> None:
    x = np.zeros((1, 2, 6, 1))
    x[0, :, 2:4, 0] = [[1, 5], [5, 5]]
    x[0, :, 4:6, 0] = [[1, 2], [np.nan, 3]]
    device = on_device if xp is DEVICE else np.asarray
    y, dx, _ = run(MaxPool(), {}, device(x), device(np.ones((1, 1, 3, 1))), xp)
    np.testing.assert_array_equal(on_host(y).ravel(), [0, 5, np.nan])
    np.testing.assert_array_equal(on_host(dx)[0, :, :, 0], [[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]])


def test_relu() -> None:
    x = np.array([[-1.0, 0.0, 2.0, np.nan]])
    y, dx, _ = run(ReLU(), {}, x, np.full((1, 4), 3.0))
    np.testing.assert_array_equal(y, [[0, 0, 2, np.nan]])
    np.testing.assert_array_equal(dx[:, :3], [[0, 0, 3]])


def test_flatten() -> None:
    x = np.arange(24.0).reshape(2, 3, 2, 2)
    y, dx, _ = run(Flatten(), {}, x, np.ones((2, 12)))
    np.testing.assert_array_equal(y, x.reshape(2, 12))
    assert dx.shape == x.shape


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("h", "w"), [(2, 2), (5, 4), (7, 9)])
def test_compiled_loops_equal_their_references(h: int, w: int, dtype: Any) -> None:
    random = np.random.default_rng(3)
    x = random.integers(-2, 3, (3, h, w, 5)).astype(dtype)  # few values: many equals
    results: list[list[Any]] = []
    for xp, device in ((np, np.asarray), (DEVICE, on_device)):
        y, where = device(np.empty((3, h // 2, w // 2, 5), dtype)), device(np.empty((3, h // 2, w // 2, 5), np.int8))
        pool(xp, device(x), y, where)
        dx = device(np.zeros_like(x))
        unpool(xp, y, where, dx)
        results.append([on_host(value) for value in (y, where, dx)])
    for compiled, reference in zip(*results, strict=True):
        np.testing.assert_array_equal(compiled, reference)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("k", "padding"), [(5, 0), (5, 2), (3, 1), (1, 0)])
def test_compiled_fold_equals_its_reference(k: int, padding: int, dtype: Any) -> None:
    shape = (2, 6, 7, 3)
    neighbours = (
        np.random.default_rng(4).standard_normal((2, 6 + 2 * padding - k + 1, 7 + 2 * padding, k, 3)).astype(dtype)
    )
    compiled = fold(Workspace(np), neighbours, shape, padding)
    reference = fold(Workspace(DEVICE), on_device(neighbours), shape, padding)
    np.testing.assert_allclose(compiled, on_host(reference), rtol=4 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Dense("dense", 6, 4), (3, 6)),
        (Conv("conv", 2, 3), (2, 8, 9, 2)),
        (Conv("conv", 2, 3, padding=2), (2, 4, 5, 2)),
        (MaxPool(), (2, 5, 4, 3)),
        (ReLU(), (3, 4)),
        (Flatten(), (2, 3, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Layer) else "x".join(map(str, value)),
)
def test_layers_use_only_the_array_module_and_agree(layer: Layer, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(5)
    parameters = random_parameters(layer, random)
    x = random.standard_normal(shape)
    dy = random.standard_normal(layer.forward(Workspace(np), parameters, x.copy())[0].shape)
    host = run(layer, parameters, x, dy)
    device = run(layer, {k: on_device(v) for k, v in parameters.items()}, on_device(x), on_device(dy), DEVICE)
    assert isinstance(device[0], DeviceArray) and isinstance(device[1], DeviceArray)
    np.testing.assert_allclose(on_host(device[0]), host[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(on_host(device[1]), host[1], rtol=1e-12, atol=1e-12)
    for name, gradient in host[2].items():
        assert isinstance(device[2][name], DeviceArray)
        np.testing.assert_allclose(on_host(device[2][name]), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (6, 5, 3), (28, 28)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", models.names())
def test_models_use_only_the_array_module(name: str, shape: tuple[int, ...]) -> None:
    host = models.get(name)(shape, 5, dtype=np.float64, seed=3)
    device = models.get(name)(shape, 5, dtype=np.float64, seed=3, xp=DEVICE)
    random = np.random.default_rng(6)
    x, y = random.random((4, *shape)), random.integers(0, 5, 4)
    host_loss, host_gradients = host.loss_and_gradients(x, y)
    loss, gradients = device.loss_and_gradients(on_device(x), on_device(y))
    assert loss == pytest.approx(host_loss, rel=1e-12)
    for parameter, gradient in gradients.items():
        assert isinstance(gradient, DeviceArray) and isinstance(device.parameters[parameter], DeviceArray)
        np.testing.assert_allclose(on_host(gradient), host_gradients[parameter], rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(on_host(device.logits(on_device(x))), host.logits(x), rtol=1e-9)
    assert device.accuracy(on_device(x), on_device(y)) == host.accuracy(x, y)
    assert device.loss_and_gradients(on_device(x[:0]), on_device(y[:0]))[0] == 0.0
    with pytest.raises(TypeError, match=re.escape("loss_and_gradients: x must be a device array, got numpy.ndarray")):
        device.loss_and_gradients(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 8), (6, 5, 3), (28, 28)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", models.names())
def test_models_on_cupy_equal_those_on_numpy(name: str, shape: tuple[int, ...]) -> None:
    cupy: Any = importlib.import_module("cupy")
    host = models.get(name)(shape, 5, dtype=np.float64, seed=3)
    device = models.get(name)(shape, 5, dtype=np.float64, seed=3, xp=cupy)
    random = np.random.default_rng(6)
    x, y = random.random((4, *shape)), random.integers(0, 5, 4)
    host_loss, host_gradients = host.loss_and_gradients(x, y)
    loss, gradients = device.loss_and_gradients(cupy.asarray(x), cupy.asarray(y))
    assert loss == pytest.approx(host_loss, rel=1e-12)
    for parameter, gradient in gradients.items():
        np.testing.assert_allclose(gradient.get(), host_gradients[parameter], rtol=1e-9, atol=1e-13)
    assert device.accuracy(cupy.asarray(x), cupy.asarray(y)) == host.accuracy(x, y)


def test_the_stand_in_refuses_what_cupy_refuses() -> None:
    x = on_device(np.ones(3))
    with pytest.raises(TypeError, match="host array"):
        np.add(x, np.ones(3))
    with pytest.raises(TypeError, match="concatenate"):
        np.concatenate([x, x])
    with pytest.raises(AttributeError, match="einsum"):
        DEVICE.einsum("i,i", x, x)


def test_workspace_hands_the_same_memory_out_again_and_grows() -> None:
    workspace = Workspace(np)
    first = workspace.empty((2, 3), np.float64)
    other = workspace.empty((4,), np.float32)
    assert not np.shares_memory(first, other)
    workspace.restart()
    again = workspace.empty((3,), np.float32)
    assert np.shares_memory(first, again) and again.flags.c_contiguous
    workspace.restart()
    assert workspace.empty((100,), np.float64).shape == (100,)
    assert workspace.empty((0, 3), np.float32).shape == (0, 3)
