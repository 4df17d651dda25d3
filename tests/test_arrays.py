"""What counts as an array, and where it lives."""

from __future__ import annotations

import importlib.util

import ml_dtypes
import numpy as np
import pytest
from other_libraries import Immutable, Tensor

from bitring import arrays
from bitring.arrays import (
    all_finite,
    as_array,
    bytes_of,
    device_of,
    flat_view,
    is_dense,
    is_device,
    memory_order,
    require_numeric,
    xp_of,
)

pytestmark = pytest.mark.single


class Dlpack:
    """A producer as libraries before DLPack 1 are: no version, so no word on whether it may be written to."""

    def __init__(self, x, device=(1, 0)):
        self._x, self._device = x, device

    def __dlpack_device__(self):
        return self._device

    def __dlpack__(self):
        return self._x.__dlpack__()


class Dlpack1(Dlpack):
    def __dlpack__(self, **options):
        return self._x.__dlpack__(**options)


class RequiresGrad(Dlpack):
    def __dlpack__(self, **_):
        raise RuntimeError("Can't export tensors that require gradient")


def test_arrays_share_memory():
    x = np.arange(6.0)
    for given in (x, x.reshape(2, 3), memoryview(x.data), Dlpack(x), Dlpack1(x)):
        got = as_array(given, "f", "x")
        assert type(got) is np.ndarray
        assert np.shares_memory(got, x)
        flat = flat_view(got, "f", "x", writable=True)
        flat[0] = 42
        assert x[0] == 42
        x[0] = 0
    assert as_array(np.ones((1, 2)).view(np.matrix), "f", "x").reshape(-1).shape == (2,)


def test_dlpack_keeps_its_producer_alive():
    import gc

    got = as_array(Dlpack(np.arange(100_000.0)), "f", "x")
    gc.collect()
    np.testing.assert_array_equal(got, np.arange(100_000.0))


def test_dlpack_that_says_read_only():
    x = np.zeros(3)
    x.flags.writeable = False
    got = as_array(Dlpack1(x), "f", "x")
    with pytest.raises(ValueError, match="f: x must be writable; got a read-only array"):
        flat_view(got, "f", "x", writable=True)


def test_dlpack_that_would_copy():
    class Copies(Dlpack):
        def __dlpack__(self, *, copy=None, **options):
            if copy is False:
                raise BufferError("the memory cannot be shared")
            return self._x.copy().__dlpack__(**options)

    with pytest.raises(TypeError, match="f: x offers DLPack, but the memory cannot be shared"):
        as_array(Copies(np.zeros(3)), "f", "x")


def test_what_is_no_array():
    for given, got in ((5, "int"), ([1.0], "list"), ("abc", "str"), (None, "NoneType")):
        with pytest.raises(TypeError) as caught:
            as_array(given, "f", "x")
        assert str(caught.value) == (
            "f: x must be a NumPy or CuPy array, or offer DLPack, __cuda_array_interface__ or the buffer protocol; "
            f"got {got}"
        )
    with pytest.raises(TypeError, match="f: x offers DLPack, but Can't export tensors that require gradient"):
        as_array(RequiresGrad(np.zeros(3)), "f", "x")


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_device_memory_without_cupy():
    class Cuda:
        __cuda_array_interface__ = {}  # noqa: RUF012

    for given in (Cuda(), Dlpack(np.zeros(3), device=(2, 0))):
        with pytest.raises(
            TypeError, match=r"f: x is in device memory, which needs CuPy \(pip install 'bitring\[gpu\]'"
        ):
            as_array(given, "f", "x")


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_bfloat16_by_dlpack(shape):
    """Without a copy, in both directions, and for views."""
    x = np.zeros(shape, ml_dtypes.bfloat16)
    got = as_array(Tensor(x), "f", "x")
    assert got.dtype == ml_dtypes.bfloat16
    got[...] = 1.5
    assert (x == 1.5).all()
    if x.ndim == 2:
        assert as_array(Tensor(x.T[::2]), "f", "x").strides == x.T[::2].strides


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_dlpack_of_what_is_immutable(dtype):
    got = as_array(Immutable(np.ones(3, dtype)), "f", "x")
    assert got.dtype == dtype
    assert not got.flags.writeable
    with pytest.raises(ValueError, match="f: x must be writable; got a read-only array"):
        flat_view(got, "f", "x", writable=True)


def test_jax():
    jax = pytest.importorskip("jax")
    for dtype in (jax.numpy.float32, jax.numpy.bfloat16, jax.numpy.int8):
        x = jax.numpy.ones(3, dtype)
        got = as_array(x, "f", "x")
        assert got.ctypes.data == x.unsafe_buffer_pointer()
        assert not got.flags.writeable


def test_what_has_no_values():
    class Meta:
        def __dlpack__(self):
            raise AssertionError

        def __dlpack_device__(self):
            raise ValueError("Unknown device type meta for Dlpack")

    class Tracer:
        pass

    Tracer.__module__ = "jax._src.core"
    with pytest.raises(TypeError, match="f: x offers DLPack, but Unknown device type meta for Dlpack"):
        as_array(Meta(), "f", "x")
    with pytest.raises(
        TypeError, match=r"f: x is a JAX tracer, which has no values yet: call this outside of jax\.jit"
    ):
        as_array(type("DynamicJaxprTracer", (Tracer,), {})(), "f", "x")


def test_subclasses_become_plain_arrays():
    data = np.arange(6.0).reshape(2, 3)
    for given in (np.ma.masked_array(data, True), data.view(np.matrix), data.view(np.recarray)):
        got = as_array(given, "f", "x")
        assert type(got) is np.ndarray
        assert np.shares_memory(got, data)


def test_orders_of_memory():
    x = np.zeros((2, 3, 4))
    assert [memory_order(a) for a in (x, np.asfortranarray(x), x[0, 0], x[:1, :1], np.zeros(()))] == [
        "C",
        "Fortran",
        "C",
        "C",
        "C",
    ]
    assert all(map(is_dense, (x, x.T, x.transpose(1, 0, 2), np.zeros(()), x[:0], x[:1])))
    assert not any(map(is_dense, (x[:, ::2], x[::-1], np.broadcast_to(np.zeros(()), (2, 2)))))


def test_dtypes_that_are_reduced():
    require_numeric(np.dtype("G"), "f", "x")
    for code in (">f4", ">c8", "i4,>f8"):
        with pytest.raises(
            TypeError, match=r"f: x must have this machine's byte order; got .*, whose bytes are swapped"
        ):
            require_numeric(np.dtype(code), "f", "x")
    for code in ("O", "U1", "M8[s]", "V0", ml_dtypes.float8_e5m2, ml_dtypes.int4):
        with pytest.raises(TypeError, match="f: x must have a numeric dtype; got"):
            require_numeric(np.dtype(code), "f", "x")


def test_torch():
    torch = pytest.importorskip("torch")
    x = torch.zeros(5)
    flat_view(as_array(x, "f", "x"), "f", "x", writable=True)[:] = 3
    assert float(x.sum()) == 15
    x = torch.zeros(5, dtype=torch.bfloat16)
    flat_view(as_array(x, "f", "x"), "f", "x", writable=True)[:] = 3
    assert float(x.sum()) == 15
    for given, text in [
        (torch.zeros(3, requires_grad=True), "f: x offers DLPack, but .*gradient"),
        (torch.zeros(3, device="meta"), "f: x offers DLPack, but .*meta"),
        (torch.zeros(3, 3).to_sparse(), "f: x offers DLPack, but "),
    ]:
        with pytest.raises(TypeError, match=text):
            as_array(given, "f", "x")


def test_flat_view_is_in_memory_order():
    x = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(flat_view(np.asfortranarray(x), "f", "x", True), [0, 3, 1, 4, 2, 5])
    assert flat_view(np.float64(3).reshape(()), "f", "x", False).shape == (1,)
    assert flat_view(np.zeros((0, 5))[:, ::2], "f", "x", True).size == 0
    with pytest.raises(
        ValueError, match=r"f: x must be contiguous; got an array of shape \(2, 2\) with strides \(24, 16\)"
    ):
        flat_view(x[:, ::2], "f", "x", False)
    read_only = np.broadcast_to(np.zeros(1), (1,))
    flat_view(read_only, "f", "x", writable=False)
    with pytest.raises(ValueError, match="f: x must be writable; got a read-only array"):
        flat_view(read_only, "f", "x", writable=True)


def test_host_and_registered_devices(monkeypatch):
    import fake_device

    x, y = np.zeros(3), fake_device.array(np.zeros(3))
    assert device_of(x) is None
    assert xp_of(x) is np
    assert not is_device(y)
    monkeypatch.setitem(arrays.devices, "fake_device", fake_device.FakeDevice)
    assert is_device(y)
    assert xp_of(y) is fake_device
    assert device_of(y) is device_of(y[:1])
    assert as_array(y, "f", "x") is y
    assert flat_view(y, "f", "x", writable=True).shape == (3,)
    arrays._made.pop("fake_device")


def test_bytes_share_memory():
    x = np.zeros(3, ml_dtypes.bfloat16)
    bytes_of(x)[:] = 1
    assert bytes_of(x).size == 6
    assert (x != 0).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_all_finite(dtype):
    x = np.full(1001, ml_dtypes.finfo(dtype).max, dtype)  # the sum of squares overflows
    assert all_finite(x)
    assert all_finite(x[:0])
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 500, 1000):
            y = x.copy()
            y[place] = bad
            assert not all_finite(y)


@pytest.mark.gpu
def test_cupy():
    import cupy

    x = cupy.arange(6, dtype="f")
    device = device_of(x)
    assert device is not None
    host = device.pinned(24).view("f")
    event = device.copy_out(host, x)
    while not event.done:
        pass
    np.testing.assert_array_equal(host, np.arange(6, dtype="f"))
    host[:] = 5
    event = device.copy_in(x, host)
    while not event.done:
        pass
    assert bool((x == 5).all())
    assert as_array(x, "f", "x") is x
