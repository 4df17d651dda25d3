"""What every registered encoder must do; a new file in compression/ is covered the moment it exists."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitring.compression.encoder import VALUE_DTYPES, Encoder, compressors, residual_dtype

pytestmark = pytest.mark.single

ENCODERS = [cls for name in compressors.names() if issubclass(cls := compressors.get(name), Encoder)]

each_encoder = pytest.mark.parametrize("make", ENCODERS, ids=lambda cls: cls.__name__)
each_dtype = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: dtype.name)


def gradient(n: int, dtype: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng([seed, n])
    return (rng.normal(size=n) * rng.choice([1e-3, 1.0], size=n)).astype(dtype)


def encoded(encoder: Encoder, values: Any, residual: Any) -> Any:
    payload = np.empty(encoder.nbytes(values.size), np.uint8)
    return payload[: encoder.encode(values, residual, payload)]


def decoded(encoder: Encoder, payload: Any, n: int, dtype: Any) -> Any:
    out = np.full(n, 7, dtype)
    encoder.decode(payload, out)
    return out


def epsilon(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


def lengths(encoder: Encoder) -> Any:
    block = encoder.block
    special = st.sampled_from(
        [0, 1, 2, 31, 33, 61, 251, 1021, block - 1, block, block + 1, 2 * block - 1, 2 * block + 1]
    )
    return special | st.integers(0, 3 * block)


@each_encoder
@each_dtype
@given(data=st.data())
def test_decoded_and_residual_make_the_value(make: Any, dtype: Any, data: Any) -> None:
    encoder: Encoder = make()
    n, seed = data.draw(lengths(encoder)), data.draw(st.integers(0, 99))
    values, wide = gradient(n, dtype, seed), residual_dtype(dtype)
    before, residual = values.copy(), gradient(n, wide, seed + 1)
    v = values.astype(wide) + residual
    payload = encoded(encoder, values, residual)
    assert payload.size <= encoder.nbytes(n)
    assert values.tobytes() == before.tobytes()
    out = decoded(encoder, payload, n, wide)
    np.testing.assert_allclose(out + residual, v, rtol=0, atol=4 * epsilon(wide) * float(np.abs(v).max(initial=0)))


@each_encoder
@each_dtype
@given(data=st.data())
def test_accumulate_adds_and_rounds_once(make: Any, dtype: Any, data: Any) -> None:
    encoder: Encoder = make()
    n = data.draw(lengths(encoder))
    payload = encoded(encoder, gradient(n, np.float32), np.zeros(n, np.float32))
    wide, out = residual_dtype(dtype), gradient(n, dtype, 5)
    expected = (out.astype(wide) + decoded(encoder, payload, n, wide)).astype(dtype)
    encoder.decode(payload, out, accumulate=True)
    assert out.tobytes() == expected.tobytes()
    assert decoded(encoder, payload, n, dtype).tobytes() == decoded(encoder, payload, n, wide).astype(dtype).tobytes()


@each_encoder
@each_dtype
def test_zeros_stay_exactly_zero(make: Any, dtype: Any) -> None:
    encoder: Encoder = make()
    for n in (1, encoder.block, encoder.block + 3):
        for values in (np.zeros(n, dtype), -np.zeros(n, dtype)):
            residual = np.zeros(n, residual_dtype(dtype))
            payload = encoded(encoder, values, residual)
            assert not decoded(encoder, payload, n, dtype).any()
            assert not residual.any()


@each_encoder
@each_dtype
def test_nothing_is_lost_over_many_steps(make: Any, dtype: Any) -> None:
    encoder: Encoder = make()
    n, steps = 2 * encoder.block + 13, 50
    wide = residual_dtype(dtype)
    residual, applied, total = np.zeros(n, wide), np.zeros(n), np.zeros(n)
    for step in range(steps):
        values = gradient(n, dtype, step)
        total += values.astype(np.float64)
        applied += decoded(encoder, encoded(encoder, values, residual), n, wide)
    size = float(np.abs(residual).max() + np.abs(total).max())
    np.testing.assert_allclose(applied + residual, total, rtol=0, atol=4 * steps * epsilon(wide) * size)


@each_encoder
@each_dtype
def test_two_runs_give_the_same_bits(make: Any, dtype: Any) -> None:
    encoder: Encoder = make()
    n = 3 * encoder.block + 5
    runs: list[bytes] = []
    for _ in range(2):
        residual = gradient(n, residual_dtype(dtype), 3)
        payload = encoded(encoder, gradient(n, dtype), residual)
        runs.append(payload.tobytes() + residual.tobytes())
    assert runs[0] == runs[1]


@each_encoder
def test_pieces_of_whole_blocks_encode_to_what_the_whole_does(make: Any) -> None:
    encoder: Encoder = make()
    cut, n = 2 * encoder.block, 5 * encoder.block + 3
    values, residual = gradient(n, np.float32), np.zeros(n, np.float32)
    whole = decoded(encoder, encoded(encoder, values, residual.copy()), n, np.float32)
    for piece in (slice(0, cut), slice(cut, n)):
        payload = encoded(encoder, values[piece], residual[piece])
        assert decoded(encoder, payload, values[piece].size, np.float32).tobytes() == whole[piece].tobytes()


@each_encoder
def test_settings_are_frozen_and_equal_by_value(make: Any) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    with pytest.raises(AttributeError):
        make().block = 128


@each_encoder
def test_warm_up_takes_each_dtype_and_no_other(make: Any) -> None:
    for dtype in VALUE_DTYPES:
        make().warm_up(dtype)
    with pytest.raises(TypeError, match="compression is for float16, bfloat16, float32, float64; got int32"):
        make().warm_up(np.int32)


@each_encoder
def test_a_payload_of_the_wrong_length_is_refused(make: Any) -> None:
    encoder: Encoder = make()
    n = encoder.block + 1
    payload = encoded(encoder, gradient(n, np.float32), np.zeros(n, np.float32))
    for wrong in (payload[:-1], payload[:0], np.append(payload, np.uint8(0))):
        with pytest.raises(ValueError, match=rf"decode: payload must have .* for {n} values; got {wrong.size}"):
            encoder.decode(wrong, np.zeros(n, np.float32))


def read_only(x: Any) -> Any:
    x.flags.writeable = False
    return x


@each_encoder
@pytest.mark.parametrize(
    ("argument", "wrong", "error", "text"),
    [
        ("values", [1.0], TypeError, "values must be a NumPy or CuPy array; got list"),
        (
            "values",
            np.zeros(4, np.int32),
            TypeError,
            "values must be of float16 or bfloat16 or float32 or float64; got int32",
        ),
        ("values", np.zeros(4, ">f4"), TypeError, "values must be of .*; got float32, '>f4'"),
        ("values", np.zeros((2, 2), np.float32), ValueError, r"values must be 1-D; got shape \(2, 2\)"),
        ("values", np.zeros(8, np.float32)[::2], ValueError, r"values must be contiguous; got strides \(8,\)"),
        ("residual", np.zeros(4, np.float64), TypeError, "residual must be of float32; got float64"),
        ("residual", np.zeros(5, np.float32), ValueError, "residual must have as many values as values, 4; got 5"),
        (
            "residual",
            read_only(np.zeros(4, np.float32)),
            ValueError,
            "residual must be writable; got a read-only array",
        ),
        ("payload", np.zeros(64, np.int8), TypeError, "payload must be of uint8; got int8"),
        ("payload", np.zeros(0, np.uint8), ValueError, "payload must have at least .* bytes for 4 values; got 0"),
        ("payload", read_only(np.zeros(4096, np.uint8)), ValueError, "payload must be writable; got a read-only array"),
    ],
)
def test_encode_names_what_is_wrong(make: Any, argument: str, wrong: Any, error: Any, text: str) -> None:
    arguments: dict[str, Any] = {
        "values": np.ones(4, np.float32),
        "residual": np.zeros(4, np.float32),
        "payload": np.zeros(4096, np.uint8),
    }
    with pytest.raises(error, match=f"{make.__name__}.encode: {text}"):
        make().encode(**(arguments | {argument: wrong}))


@each_encoder
@pytest.mark.parametrize(
    ("argument", "wrong", "error", "text"),
    [
        ("payload", b"1234", TypeError, "payload must be a NumPy or CuPy array; got bytes"),
        ("payload", np.zeros(9, np.float32), TypeError, "payload must be of uint8; got float32"),
        ("out", np.zeros(4, np.complex64), TypeError, "out must be of .*; got complex64"),
        ("out", np.zeros((4, 1), np.float32), ValueError, r"out must be 1-D; got shape \(4, 1\)"),
        ("out", read_only(np.zeros(4, np.float32)), ValueError, "out must be writable; got a read-only array"),
    ],
)
def test_decode_names_what_is_wrong(make: Any, argument: str, wrong: Any, error: Any, text: str) -> None:
    payload = encoded(make(), np.ones(4, np.float32), np.zeros(4, np.float32))
    with pytest.raises(error, match=f"{make.__name__}.decode: {text}"):
        make().decode(**({"payload": payload, "out": np.zeros(4, np.float32)} | {argument: wrong}))


@each_encoder
def test_host_and_device_arrays_do_not_mix(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(np.ndarray[Any, Any]):
        pass

    monkeypatch.setattr("bitring.compression.encoder.is_device", lambda x: isinstance(x, Elsewhere))
    residual = np.zeros(4, np.float32).view(Elsewhere)
    with pytest.raises(
        TypeError, match=r"residual must be in host memory, as the other arrays are; got .* in device memory"
    ):
        make().encode(np.zeros(4, np.float32), residual, np.zeros(4096, np.uint8))
    with pytest.raises(TypeError, match="out must be in host memory"):
        make().decode(np.zeros(9, np.uint8), residual)


def test_an_unknown_compressor_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown compressor 'twobit'; known: .*onebit"):
        compressors.get("twobit")
