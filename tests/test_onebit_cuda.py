"""The kernels of onebit.cu against its NumPy code, bit for bit: on the host, thread by thread, and on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitring.compression.encoder import VALUE_DTYPES, residual_dtype
from bitring.compression.encoders.onebit import OneBit
from bitring.compression.kernels import rank_one_cuda
from bitring.compression.rank_one import RankOne

pytestmark = pytest.mark.single

each_dtype = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: dtype.name)

LENGTHS = [0, 1, 31, 32, 33, 64, 65, 1009, 1024, 1025, 2047, 5003]


def example(n: int, dtype: Any) -> tuple[Any, Any]:
    """Values and a residual, with zeros of both signs and a zero block."""
    rng = np.random.default_rng(n)
    values = (rng.normal(size=n) * 10 ** rng.uniform(-4, 4, n)).astype(dtype)
    residual = rng.normal(size=n).astype(residual_dtype(dtype))
    for zeros, sign in ((slice(5, 9), 1), (slice(9, 12), -1), (slice(128, 192), 1)):
        values[zeros] = residual[zeros] = sign * 0.0
    return values, residual


Encode = Callable[[Any, Any, Any, int], None]
Decode = Callable[[Any, Any, int, bool], None]


def check_against_reference(encode: Encode, decode: Decode, dtype: Any, n: int, block: int) -> None:
    """Each function works in place on NumPy arrays."""
    for huge in (False, True):
        check_example_against_reference(encode, decode, dtype, n, block, huge)


def check_example_against_reference(encode: Encode, decode: Decode, dtype: Any, n: int, block: int, huge: bool) -> None:
    """``huge``: values whose sums overflow."""
    values, residual = example(n, dtype)
    if huge:
        largest = min(float(ml_dtypes.finfo(dtype).max), float(np.finfo(np.float32).max))
        values = (np.sign(values.astype(np.float64)) * 0.9 * largest).astype(dtype)
    expected_residual = residual.copy()
    nbytes = OneBit(block).nbytes(n)
    payload, expected = np.full(nbytes + 5, 0xAA, np.uint8), np.full(nbytes + 5, 0xAA, np.uint8)
    # The payload begins at an odd address.
    encode(values, residual, payload[1 : nbytes + 1], block)
    in_numpy: Any = OneBit
    in_numpy.encode.__wrapped__(OneBit(block), values, expected_residual, expected[1:])
    assert payload.tobytes() == expected.tobytes()
    assert residual.tobytes() == expected_residual.tobytes()
    for accumulate in (False, True):
        out, expected_out = values.copy(), values.copy()
        decode(payload[1 : nbytes + 1], out, block, accumulate)
        in_numpy.decode.__wrapped__(OneBit(block), payload[1 : nbytes + 1], expected_out, accumulate)
        assert out.tobytes() == expected_out.tobytes()


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any, None, None]:
    """onebit.cu as a host library."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("onebit") / "onebit_on_host.so"
    source = Path(__file__).with_name("onebit_on_host.cpp")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True, timeout=150)
    loaded = ctypes.CDLL(str(library))
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    (ctypes.c_float * (1 << 16)).in_dll(loaded, "float16_values")[:] = every.tolist()

    @ctypes.CFUNCTYPE(ctypes.c_uint16, ctypes.c_float)
    def round_to_float16(x: float) -> int:
        with np.errstate(over="ignore"):
            return int(np.float32(x).astype(np.float16).view(np.uint16))

    ctypes.c_void_p.in_dll(loaded, "round_to_float16").value = ctypes.cast(round_to_float16, ctypes.c_void_p).value
    yield loaded
    del round_to_float16  # lived until here, for the library to call


@each_dtype
@pytest.mark.parametrize(("block", "blocks", "warps"), [(64, 1, 1), (64, 3, 2), (1024, 2, 2), (4096, 1, 2)])
def test_source_run_on_the_host(on_host: Any, dtype: Any, block: int, blocks: int, warps: int) -> None:
    def launch(name: str, arrays: list[Any], n: int) -> None:
        kernel = ctypes.cast(on_host[f"{name}_{dtype.name}"], ctypes.c_void_p)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        pointers += [ctypes.c_void_p(None)] * (4 - len(pointers))
        sizes = [*map(ctypes.c_longlong, (n, block, 0, 0)), blocks, warps]
        assert on_host.run(kernel, *pointers, *sizes) == 0, "the lanes of a warp went different ways"

    def encode(values: Any, residual: Any, payload: Any, block: int) -> None:
        launch("encode", [values, residual, payload], values.size)

    def decode(payload: Any, out: Any, block: int, accumulate: bool) -> None:
        launch("accumulate" if accumulate else "decode", [payload, out], out.size)

    for n in LENGTHS:
        check_against_reference(encode, decode, dtype, n, block)


SHAPES = [
    *[(1, 1, 1, 1), (5, 7, 2, 4), (64, 300, 64, 1), (33, 64, 16, 2), (70, 100, 25, 1), (3, 2000, 64, 32)],
    (130, 33, 64, 64),
]
"""Rows, columns, rows of a panel, columns of a group."""


def example_of_panels(rows: int, columns: int, dtype: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(rows)
    values = rng.normal(size=(rows, columns)) * rng.lognormal(size=(rows, 1)) * rng.lognormal(size=columns)
    values[rng.random(rows) < 0.1] = 0
    values[:, rng.random(columns) < 0.1] = -0.0
    residual = rng.normal(size=(rows, columns)) * (values != 0)
    return values.astype(dtype).reshape(-1), residual.astype(residual_dtype(dtype)).reshape(-1)


def check_panels(encode: Any, decode: Any, dtype: Any, shape: tuple[int, int, int, int], huge: bool) -> None:
    rows, columns, most, group = shape
    panels: Any = RankOne(columns, most, group)
    values, residual = example_of_panels(rows, columns, dtype)
    if huge:
        largest = min(float(ml_dtypes.finfo(dtype).max), float(np.finfo(np.float32).max))
        values = (np.sign(values.astype(np.float64)) * 0.9 * largest).astype(dtype)
    expected_residual = residual.copy()
    payload = np.full(panels.nbytes(values.size), 0xAA, np.uint8)
    expected = payload.copy()
    encode(panels, values, residual, payload)
    RankOne.encode.__wrapped__(panels, values, expected_residual, expected)  # type: ignore[attr-defined]
    assert payload.tobytes() == expected.tobytes()
    assert residual.tobytes() == expected_residual.tobytes()
    for accumulate in (False, True):
        out, expected_out = values.copy(), values.copy()
        decode(panels, payload, out, accumulate)
        RankOne.decode.__wrapped__(panels, payload, expected_out, accumulate)  # type: ignore[attr-defined]
        assert out.tobytes() == expected_out.tobytes()


@each_dtype
@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (3, 2)])
def test_panels_run_on_the_host(
    on_host: Any, monkeypatch: pytest.MonkeyPatch, dtype: Any, blocks: int, warps: int
) -> None:
    """The launches of rank_one_cuda.py, one after the other."""

    def launch(name: str, values: Any, _: int, arguments: tuple[Any, ...], sizes: tuple[int, ...]) -> None:
        kernel = ctypes.cast(on_host[f"{name}_{values.dtype.name}"], ctypes.c_void_p)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arguments]
        numbers = [ctypes.c_longlong(x) for x in (values.size, *sizes)]
        assert on_host.run(kernel, *pointers, *numbers, blocks, warps) == 0, "the lanes of a warp went different ways"

    monkeypatch.setattr(rank_one_cuda, "launch", launch)

    def encode(panels: Any, values: Any, residual: Any, payload: Any) -> None:
        assert rank_one_cuda.encode(panels, values, residual, payload, 0) == payload.size

    for shape in SHAPES:
        for huge in (False, True):
            check_panels(encode, rank_one_cuda.decode, dtype, shape, huge)


@pytest.mark.gpu
@each_dtype
def test_panels_on_a_gpu(dtype: Any) -> None:
    import cupy  # pyright: ignore[reportMissingImports]

    def to_device(x: Any) -> Any:
        return cupy.asarray(x.view(np.uint8)).view(x.dtype)

    def encode(panels: Any, values: Any, residual: Any, payload: Any) -> None:
        left, code = to_device(residual), cupy.zeros(payload.size + 1, np.uint8)[1:]
        assert panels.encode(to_device(values), left, code) == payload.size
        residual[:] = left.view(np.uint8).get().view(residual.dtype)
        payload[:] = code.get()

    def decode(panels: Any, payload: Any, out: Any, accumulate: bool) -> None:
        on_device, code = to_device(out), cupy.zeros(payload.size + 1, np.uint8)[1:]
        code[:] = cupy.asarray(payload)
        panels.decode(code, on_device, accumulate)
        out[:] = on_device.view(np.uint8).get().view(out.dtype)

    for shape in [*SHAPES, (1000, 1003, 64, 1)]:
        for huge in (False, True):
            check_panels(encode, decode, dtype, shape, huge)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("block", [64, 1024, 4096])
def test_on_a_gpu(dtype: Any, block: int) -> None:
    import cupy  # pyright: ignore[reportMissingImports]

    codec = OneBit(block)

    def to_device(x: Any) -> Any:
        return cupy.asarray(x.view(np.uint8)).view(x.dtype)

    def encode(values: Any, residual: Any, payload: Any, block: int) -> None:
        left, code = to_device(residual), cupy.zeros(payload.size + 1, np.uint8)[1:]
        assert codec.encode(to_device(values), left, code) == payload.size
        residual[:] = left.view(np.uint8).get().view(residual.dtype)
        payload[:] = code.get()

    def decode(payload: Any, out: Any, block: int, accumulate: bool) -> None:
        on_device, code = to_device(out), cupy.zeros(payload.size + 1, np.uint8)[1:]
        code[:] = cupy.asarray(payload)
        codec.decode(code, on_device, accumulate)
        out[:] = on_device.view(np.uint8).get().view(out.dtype)

    for n in [*LENGTHS, 1_000_003]:
        check_against_reference(encode, decode, dtype, n, block)


@pytest.mark.gpu
@each_dtype
def test_a_gpu_sees_numbers_that_are_not_finite(dtype: Any) -> None:
    import cupy  # pyright: ignore[reportMissingImports]

    values = np.ones(2048).astype(dtype)
    values[1030] = np.nan
    device = cupy.asarray(values.view(np.uint8)).view(dtype)
    payload = cupy.zeros(OneBit().nbytes(2048), np.uint8)
    OneBit().encode(device, cupy.zeros(2048, residual_dtype(dtype)), payload)
    levels = payload.get().reshape(2, 136)[:, :8].copy().view(np.float32)
    assert np.isfinite(levels).all(axis=1).tolist() == [True, False]
