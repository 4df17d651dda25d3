"""OneBit on host arrays: levels by hand, and its Numba kernels against its NumPy code, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitring.compression.encoder import VALUE_DTYPES, residual_dtype
from bitring.compression.encoders.onebit import OneBit

pytestmark = pytest.mark.single

each_dtype = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: dtype.name)


def encode(codec: OneBit, values: Any, residual: Any) -> Any:
    payload = np.empty(codec.nbytes(values.size), np.uint8)
    assert codec.encode(values, residual, payload) == payload.size
    return payload


def unaligned(x: Any) -> Any:
    """A copy of ``x`` that begins at an odd address."""
    memory = np.empty(x.nbytes + 17, np.uint8)
    begin = 1 + (-memory.ctypes.data) % 16
    copy = memory[begin : begin + x.nbytes].view(x.dtype)
    copy[:] = x
    return copy


def test_levels_are_the_means_of_the_two_classes() -> None:
    residual = np.array([0.5, 0, 0, 0, -1], np.float32)
    payload = encode(OneBit(), np.array([0.5, -1, -2, 4, 0], np.float32), residual)  # v = 1, -1, -2, 4, -1
    assert payload[:8].view(np.float32).tolist() == [np.float32(-4 / 3), 2.5]
    assert payload[8:].tolist() == [0b01001]
    low = np.float32(-4 / 3)
    assert residual.tolist() == [-1.5, -1 - low, -2 - low, 1.5, -1 - low]


@pytest.mark.parametrize(("sign", "levels"), [(1.0, [0.0, 3.0]), (-1.0, [-3.0, 0.0])])
def test_the_level_of_an_empty_class_is_zero(sign: float, levels: list[float]) -> None:
    payload = encode(OneBit(), np.array([2, 4], np.float32) * np.float32(sign), np.zeros(2, np.float32))
    assert payload[:8].view(np.float32).tolist() == levels


def test_negative_zero_is_not_negative() -> None:
    payload = encode(OneBit(), np.array([-0.0, -2, 4], np.float32), np.array([-0.0, 0, 0], np.float32))
    assert payload[:8].view(np.float32).tolist() == [-2, 2]
    assert payload[8] == 0b101


def test_padding_stays_out_of_the_levels_of_a_short_block() -> None:
    values = np.full(1025, 3, np.float32)
    residual = np.zeros(1025, np.float32)
    payload = encode(OneBit(), values, residual)
    assert payload[-9:-1].view(np.float32).tolist() == [0, 3]
    assert payload[-1] == 1
    assert not residual.any()


def test_a_large_class_does_not_drown_the_mean_of_a_small_one() -> None:
    values = np.full(1024, 1e6, np.float32)
    values[77] = -1e-6
    residual = np.zeros(1024, np.float32)
    assert encode(OneBit(), values, residual)[:8].view(np.float32).tolist() == [np.float32(-1e-6), 1e6]
    assert not residual.any()


def test_bytes_of_a_payload() -> None:
    assert [OneBit().nbytes(n) for n in (0, 1, 8, 9, 1024, 1025, 2048)] == [0, 9, 9, 10, 136, 145, 272]
    assert OneBit(64).nbytes(3 << 31) == (3 << 31) // 4


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_shows_in_the_levels_of_its_block_alone(dtype: Any, bad: float) -> None:
    for at in (0, 1030, 2047):
        values = np.ones(2048 + 5).astype(dtype)
        values[at] = bad
        payload = encode(OneBit(), values, np.zeros(values.size, residual_dtype(dtype)))
        levels = np.concatenate([payload[begin : begin + 8] for begin in (0, 136, 272)]).view(np.float32)
        assert np.isfinite(levels.reshape(3, 2)).all(axis=1).tolist() == [at >= 1024, at < 1024, True]


@each_dtype
@given(
    n=st.sampled_from([0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 127, 1009, 1023, 1024, 1025, 2053]) | st.integers(0, 2500),
    block=st.sampled_from([64, 192, 1024]),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    odd_address=st.booleans(),
)
def test_kernels_equal_the_numpy_code(
    dtype: Any, n: int, block: int, seed: int, spread: float, odd_address: bool
) -> None:
    rng = np.random.default_rng(seed)
    place: Callable[[Any], Any] = unaligned if odd_address else np.array
    values = place((rng.normal(size=n) * 10 ** rng.uniform(-spread, spread, n)).astype(dtype))
    before = (rng.normal(size=n) * 1e-2).astype(residual_dtype(dtype))
    residual, expected_residual = place(before), before.copy()
    codec, in_numpy = OneBit(block), cast(Any, OneBit)

    payload = place(np.full(codec.nbytes(n) + 5, 0xAA, np.uint8))
    expected = np.full_like(payload, 0xAA)  # what lies behind the payload is left alone
    used = codec.encode(values, residual, payload)
    assert used == in_numpy.encode.__wrapped__(codec, values, expected_residual, expected)
    assert payload.tobytes() == expected.tobytes()
    assert residual.tobytes() == expected_residual.tobytes()

    for out_dtype in VALUE_DTYPES:
        for accumulate in (False, True):
            start = np.append(rng.normal(size=n), [7.0, 8.0]).astype(out_dtype)
            out, expected_out = place(start), start.copy()
            codec.decode(payload[:used], out[:n], accumulate)
            in_numpy.decode.__wrapped__(codec, expected[:used], expected_out[:n], accumulate)
            assert out.tobytes() == expected_out.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bits_convert_and_round_as_numpy_does(dtype: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    wide = every.astype(np.float32)
    grid = np.sort(wide[np.isfinite(wide)]).astype(np.float64)
    ties = ((grid[:-1] + grid[1:]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32).view(np.float32)
    levels = np.concatenate([wide, ties, np.nextafter(ties, np.float32(0)), anything])
    nan = np.isnan(levels)
    with np.errstate(all="ignore"):
        expected = levels.astype(dtype)

    # One payload block a level; its 64 values decode to it.
    payload = np.full((levels.size, 16), 0xFF, np.uint8)
    payload[:, 4:8] = levels.view(np.uint8).reshape(-1, 4)
    out = np.empty(levels.size * 64, dtype)
    OneBit(64).decode(payload.reshape(-1), out)
    assert out[::64][~nan].tobytes() == expected[~nan].tobytes()
    assert np.isnan(out[::64][nan].astype(np.float32)).all()

    # Widening is exact, so adding zero gives each number back (-0 becomes 0).
    out = every.copy()
    OneBit(64).decode(np.zeros(OneBit(64).nbytes(out.size), np.uint8), out, accumulate=True)
    nan = np.isnan(wide)
    assert (out[~nan] == every[~nan]).all()
    assert np.isnan(out[nan].astype(np.float32)).all()


def test_read_only_values_are_taken() -> None:
    values = np.ones(100, np.float32)
    values.flags.writeable = False
    payload = encode(OneBit(), values, np.zeros(100, np.float32))
    payload.flags.writeable = False
    out = np.zeros(100, np.float32)
    OneBit().decode(payload, out)
    assert out.tolist() == [1.0] * 100


@pytest.mark.parametrize("block", [0, -64, 63, 100])
def test_block_must_be_a_multiple_of_64(block: int) -> None:
    with pytest.raises(ValueError, match=f"OneBit: block must be a positive multiple of 64; got {block}"):
        OneBit(block)


@pytest.mark.parametrize("block", [1024.0, True, "1024"])
def test_block_must_be_an_int(block: Any) -> None:
    with pytest.raises(TypeError, match=f"OneBit: block must be an int; got {type(block).__name__}"):
        OneBit(block)


PROGRAM = """
import numpy as np
from bitring.compression.encoders.onebit import OneBit
{before}
residual, payload = np.zeros(3, np.float32), np.zeros(9, np.uint8)
OneBit().encode(np.array([1, -2, 3], np.float32), residual, payload)
print(*payload[:8].view(np.float32), payload[8], *residual)
"""


def run(program: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(
            "import tempfile\n"
            "def refuse(*_, **__): raise OSError('read-only file system')\n"
            "tempfile.TemporaryFile = refuse",
            id="no folder can be written",
        ),
        pytest.param(
            "from numba.core.caching import IndexDataCacheFile\n"
            "def refuse(*_): raise OSError(28, 'No space left on device')\n"
            "IndexDataCacheFile._save_data = refuse",
            id="the disk is full",
        ),
    ],
)
def test_without_a_cache_kernels_compile_all_the_same(
    before: str, tmp_path: Path, clean_environment: Callable[..., dict[str, str]]
) -> None:
    environment = clean_environment(NUMBA_CACHE_DIR=str(tmp_path))
    assert run(PROGRAM.format(before=before), environment) == "-2.0 2.0 5 -1.0 0.0 1.0\n"
    assert not list(tmp_path.rglob("*.nbc"))


def test_a_second_process_loads_what_the_first_compiled(
    tmp_path: Path, clean_environment: Callable[..., dict[str, str]]
) -> None:
    environment = clean_environment(NUMBA_CACHE_DIR=str(tmp_path))
    run(
        "import bitring\nimport numpy as np\nbitring.OneBit().warm_up(np.float32)",
        environment,
    )
    compiled = sorted(tmp_path.rglob("*.nbc"))
    assert len(compiled) == 2
    # Compiling is made impossible: only loading is left.
    before = (
        "import numba.core.compiler\n"
        "def refuse(*_, **__): raise AssertionError('compiled again')\n"
        "numba.core.compiler.compile_extra = refuse"
    )
    assert run(PROGRAM.format(before=before), environment) == "-2.0 2.0 5 -1.0 0.0 1.0\n"
    assert sorted(tmp_path.rglob("*.nbc")) == compiled


def test_settings_alone_load_neither_numba_nor_mpi() -> None:
    program = (
        "import sys\nfrom bitring.compression.encoders.onebit import OneBit\nOneBit().nbytes(5)\n"
        "print([name for name in ('numba', 'mpi4py.MPI', 'cupy') if name in sys.modules])"
    )
    assert run(program, dict(os.environ)) == "[]\n"
