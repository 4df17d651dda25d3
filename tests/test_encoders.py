"""What every registered encoder must do; a new file in compression/ is covered the moment it exists."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitring.compression.encoder import VALUE_DTYPES, Encoder, compressors, residual_dtype
from bitring.compression.encoders.fixed import Fixed
from bitring.compression.encoders.linear import Linear
from bitring.compression.encoders.sign import Sign
from bitring.compression.encoders.threshold import Threshold
from bitring.compression.encoders.topk import TopK
from bitring.compression.kernels.functions import DECODE, ENCODE, kernel_file
from bitring.compression.kernels.jit import _parts

pytestmark = pytest.mark.single

ENCODERS = [cls for name in compressors.names() if issubclass(cls := compressors.get(name), Encoder)]

LARGEST = {dtype: min(float(ml_dtypes.finfo(dtype).max), float(np.finfo(np.float32).max)) for dtype in VALUE_DTYPES}
"""The largest value of a type that a payload can hold."""

each_encoder = pytest.mark.parametrize("make", ENCODERS, ids=lambda cls: cls.__name__)
FLOAT16, _, _, FLOAT64 = VALUE_DTYPES


def _case(make: Any, dtype: Any) -> Any:
    """The kernels of encoders whose payloads vary take longest to compile: two types of values show most."""
    rare = not make.fixed_size and dtype in (FLOAT16, FLOAT64)
    marks = [pytest.mark.slow] if rare else []
    return pytest.param(make, dtype, marks=marks, id=f"{make.__name__}-{dtype.name}")


CASES = [_case(make, dtype) for make in ENCODERS for dtype in VALUE_DTYPES]
each_encoder_and_dtype = pytest.mark.parametrize(("make", "dtype"), CASES)


def small(make: Any, block: int = 1024) -> Encoder:
    """With blocks that tests can afford, where its block can be set."""
    settable = "block" in {field.name for field in dataclasses.fields(make)}
    encoder: Encoder = make(block=block) if settable else make()
    return encoder


@each_encoder_and_dtype
@pytest.mark.timeout(300)
def test_warm_up_takes_each_dtype_and_no_other(make: Any, dtype: Any) -> None:
    # Comes first: under Hypothesis, which traces, compiling takes long.
    make().warm_up(dtype)
    with pytest.raises(TypeError, match="compression is for float16, bfloat16, float32, float64; got int32"):
        make().warm_up(np.int32)


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


@each_encoder_and_dtype
@hypothesis.settings(max_examples=30)
@given(data=st.data())
def test_decoded_and_residual_make_the_value(make: Any, dtype: Any, data: Any) -> None:
    encoder: Encoder = small(make)
    n, seed = data.draw(lengths(encoder)), data.draw(st.integers(0, 99))
    values, wide = gradient(n, dtype, seed), residual_dtype(dtype)
    before, residual = values.copy(), gradient(n, wide, seed + 1)
    v = values.astype(wide) + residual
    payload = encoded(encoder, values, residual)
    assert payload.size <= encoder.nbytes(n)
    assert values.tobytes() == before.tobytes()
    out = decoded(encoder, payload, n, wide)
    np.testing.assert_allclose(out + residual, v, rtol=0, atol=4 * epsilon(wide) * float(np.abs(v).max(initial=0)))


@each_encoder_and_dtype
@hypothesis.settings(max_examples=30)
@given(data=st.data())
def test_accumulate_adds_and_rounds_once(make: Any, dtype: Any, data: Any) -> None:
    encoder: Encoder = small(make)
    n = data.draw(lengths(encoder))
    payload = encoded(encoder, gradient(n, np.float32), np.zeros(n, np.float32))
    wide, out = residual_dtype(dtype), gradient(n, dtype, 5)
    expected = (out.astype(wide) + decoded(encoder, payload, n, wide)).astype(dtype)
    encoder.decode(payload, out, accumulate=True)
    assert out.tobytes() == expected.tobytes()
    assert decoded(encoder, payload, n, dtype).tobytes() == decoded(encoder, payload, n, wide).astype(dtype).tobytes()


@each_encoder_and_dtype
def test_zeros_stay_exactly_zero(make: Any, dtype: Any) -> None:
    encoder: Encoder = small(make)
    for n in (1, encoder.block, encoder.block + 3):
        for values in (np.zeros(n, dtype), -np.zeros(n, dtype)):
            residual = np.zeros(n, residual_dtype(dtype))
            payload = encoded(encoder, values, residual)
            assert not decoded(encoder, payload, n, dtype).any()
            assert not residual.any()


@each_encoder_and_dtype
def test_nothing_is_lost_over_many_steps(make: Any, dtype: Any) -> None:
    encoder: Encoder = small(make)
    n, steps = 2 * encoder.block + 13, 50
    wide = residual_dtype(dtype)
    residual, applied, total = np.zeros(n, wide), np.zeros(n), np.zeros(n)
    for step in range(steps):
        values = gradient(n, dtype, step)
        total += values.astype(np.float64)
        applied += decoded(encoder, encoded(encoder, values, residual), n, wide)
    size = float(np.abs(residual).max() + np.abs(total).max())
    np.testing.assert_allclose(applied + residual, total, rtol=0, atol=4 * steps * epsilon(wide) * size)


@each_encoder_and_dtype
@pytest.mark.parametrize("share", [1, 0.9, 0.3, 0.05])
def test_finite_values_stay_finite(make: Any, dtype: Any, share: float) -> None:
    """However large they are: a sum of a block's values may overflow, what is sent and what is left do not."""
    encoder: Encoder = small(make)
    n, wide = 2 * encoder.block + 13, residual_dtype(dtype)
    for rng_signs in (np.ones(n), np.random.default_rng(0).choice([1, -1], n)):
        values = (rng_signs * share * LARGEST[dtype]).astype(dtype)
        residual = np.zeros(n, wide)
        out = decoded(encoder, encoded(encoder, values, residual), n, wide)
        assert np.isfinite(out).all()
        assert np.isfinite(residual).all()
        np.testing.assert_allclose(out + residual, values.astype(wide), rtol=8 * epsilon(wide))


@each_encoder
def test_something_is_sent_of_equal_values(make: Any) -> None:
    """Also where float32 cannot hold them exactly."""
    encoder: Encoder = small(make)
    for value in (0.1, 0.3, 0.7, 1e-3, 1e30):
        values = np.full(1000, value)
        payload = encoded(encoder, values, np.zeros(1000))
        assert decoded(encoder, payload, 1000, np.float64).any(), value


@each_encoder_and_dtype
def test_two_runs_give_the_same_bits(make: Any, dtype: Any) -> None:
    encoder: Encoder = small(make)
    n = 3 * encoder.block + 5
    runs: list[bytes] = []
    for _ in range(2):
        residual = gradient(n, residual_dtype(dtype), 3)
        payload = encoded(encoder, gradient(n, dtype), residual)
        runs.append(payload.tobytes() + residual.tobytes())
    assert runs[0] == runs[1]


@each_encoder
def test_payloads_of_pieces_are_pieces_of_the_payload(make: Any) -> None:
    encoder: Encoder = small(make)
    cut, n = 2 * encoder.block, 5 * encoder.block + 3
    values, residual = gradient(n, np.float32), np.zeros(n, np.float32)
    whole = encoded(encoder, values, residual.copy())
    pieces = [encoded(encoder, values[piece], residual[piece]) for piece in (slice(0, cut), slice(cut, n))]
    assert whole.tobytes() == np.concatenate(pieces).tobytes()
    if encoder.fixed_size:
        assert [piece.size for piece in pieces] == [encoder.nbytes(cut), encoder.nbytes(n - cut)]


@pytest.mark.parametrize(
    "encoder",
    [make() for make in ENCODERS]
    + [Threshold(density=density, block=block) for density, block in ((0.01, 1024), (0.1, 1 << 16), (0.6, 4096))]
    + [TopK(0.1), TopK(0.01, block=1024), TopK(0.03, sampled=True), TopK(1.0)],
    ids=str,
)
def test_payloads_are_as_long_as_expected(encoder: Encoder) -> None:
    """On average over the steps, with error feedback; predictions go by it."""
    rng, n, steps = np.random.default_rng(0), (3 << 16) + 1001, 10
    residual, used = np.zeros(n, np.float32), 0
    for _ in range(steps):
        used += encoded(encoder, rng.normal(size=n).astype(np.float32), residual).size
    assert abs(used / steps / encoder.expected_nbytes(n) - 1) < (0 if encoder.fixed_size else 0.05) + 1e-9
    assert encoder.expected_nbytes(n) <= encoder.nbytes(n)
    assert encoder.expected_nbytes(0) == 0


@each_encoder
def test_settings_are_frozen_and_equal_by_value(make: Any) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    with pytest.raises(AttributeError):
        make().block = 128


@each_encoder
def test_a_payload_of_the_wrong_length_is_refused(make: Any) -> None:
    encoder: Encoder = small(make)
    n = encoder.block + 1
    payload = encoded(encoder, gradient(n, np.float32), np.zeros(n, np.float32))
    for wrong in (*(payload[:k] for k in range(payload.size)), np.append(payload, np.uint8(0))):
        with pytest.raises(ValueError, match=rf"decode: payload must have .* for {n} values; got {wrong.size}"):
            encoder.decode(wrong, np.zeros(n, np.float32))


@each_encoder
def test_no_flipped_bit_goes_unnoticed(make: Any) -> None:
    """It is refused, or decodes to other values: no two payloads are the same values'."""
    encoder: Encoder = small(make)
    n = encoder.block + 61
    payload = encoded(encoder, gradient(n, np.float32), np.zeros(n, np.float32))
    values = decoded(encoder, payload, n, np.float32).tobytes()
    refused = 0
    for bit in range(8 * payload.size):
        payload[bit // 8] ^= np.uint8(1 << bit % 8)
        try:
            assert decoded(encoder, payload, n, np.float32).tobytes() != values, bit
        except ValueError:
            refused += 1
        payload[bit // 8] ^= np.uint8(1 << bit % 8)
    if make in (Sign, Linear, Threshold, TopK):  # which have bits to spare behind a block's last, or indexes
        assert refused > 0


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
        small(make).encode(**(arguments | {argument: wrong}))


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
    payload = encoded(small(make), np.ones(4, np.float32), np.zeros(4, np.float32))
    arguments: dict[str, Any] = {"payload": payload, "out": np.zeros(4, np.float32)}
    with pytest.raises(error, match=f"{make.__name__}.decode: {text}"):
        small(make).decode(**(arguments | {argument: wrong}))


@each_encoder
def test_host_and_device_arrays_do_not_mix(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(np.ndarray[Any, Any]):
        pass

    monkeypatch.setattr("bitring.compression.encoder.is_device", lambda x: isinstance(x, Elsewhere))
    residual = np.zeros(4, np.float32).view(Elsewhere)
    with pytest.raises(
        TypeError, match=r"residual must be in host memory, as the other arrays are; got .* in device memory"
    ):
        small(make).encode(np.zeros(4, np.float32), residual, np.zeros(4096, np.uint8))
    with pytest.raises(TypeError, match="out must be in host memory"):
        small(make).decode(np.zeros(9, np.uint8), residual)


def test_an_unknown_compressor_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown compressor 'twobit'; known: .*onebit"):
        compressors.get("twobit")


@each_encoder_and_dtype
def test_an_encoding_leaves_less_than_there_was(make: Any, dtype: Any) -> None:
    encoder = small(make)
    n = 2 * encoder.block + 77
    residual = np.zeros(n, residual_dtype(dtype))
    norms = [float(np.linalg.norm(gradient(n, dtype).astype(np.float64)))]
    values = gradient(n, dtype)
    for _ in range(300):  # a gradient, then none
        encoded(encoder, values, residual)
        values = np.zeros(n, dtype)
        norms.append(float(np.linalg.norm(residual.astype(np.float64))))
    if make.draws:  # whose noise is no more than a step, wherever it is; test_fixed.py bounds it
        assert norms[-1] < norms[0]
    else:
        assert norms[1] < norms[0]
        assert all(after <= before for before, after in itertools.pairwise(norms))
        assert norms[-1] < 0.2 * norms[0]


@each_encoder
def test_device_arrays_need_a_kernel(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small(make)
    if kernel_file(make.__module__, "cuda") is not None:
        return
    monkeypatch.setattr("bitring.compression.encoder.is_device", lambda _: True)
    values, residual, payload = np.ones(4, np.float32), np.zeros(4, np.float32), np.zeros(encoder.nbytes(4), np.uint8)
    text = f"{make.__name__}: arrays must be in host memory, it has no kernels for a device; got device arrays"
    with pytest.raises(TypeError, match=text):
        encoder.encode(values, residual, payload)
    with pytest.raises(TypeError, match=text):
        encoder.decode(payload, values)


def compiled() -> list[Any]:
    """Encoders with kernels, in the settings that are compared with their NumPy code; test_onebit.py has more."""
    encoders: list[Encoder] = [Linear(bits, 128) for bits in range(2, 9)]
    encoders += [Fixed(bits, 128) for bits in (3, 8, 13)]
    encoders += [Threshold(tau, 0.01, 4160) for tau in (0.5, 1e-4, None)] + [Threshold(None, 0.4, 4160)]
    encoders += [TopK(density, sampled, 4160) for density in (0.01, 0.2) for sampled in (False, True)]
    encoders += [Fixed(9, 128), Fixed(16, 128), Sign(192)]
    known = {type(encoder) for encoder in encoders}
    encoders += [make() for make in ENCODERS if make not in known and make().has_functions]
    return [_case_of(encoder, dtype) for encoder in encoders for dtype in VALUE_DTYPES]


def _case_of(encoder: Encoder, dtype: Any) -> Any:
    return pytest.param(encoder, dtype, marks=_case(type(encoder), dtype).marks, id=f"{encoder}-{dtype.name}")


@pytest.mark.parametrize(("encoder", "dtype"), compiled())
def test_kernels_equal_the_numpy_code(encoder: Encoder, dtype: Any) -> None:
    encode, decode = (getattr(type(encoder), name).__wrapped__ for name in ("encode", "decode"))
    wide = residual_dtype(dtype)
    for n in (0, 1, 7, 8, 65, 4161):
        for kind in ("normal", "wide", "sparse", "ties", "huge"):
            rng = np.random.default_rng([n, len(kind)])
            x = rng.normal(size=n)
            if kind == "wide":
                x *= 10 ** rng.uniform(-4, 4, n)
            if kind == "sparse":
                x = np.where(rng.random(n) < 0.002, x, 0)
            if kind == "ties":
                x = np.round(2 * x) / 2
            values = x.astype(dtype)
            if kind == "huge":  # what sums to Inf
                values = (np.sign(x) * LARGEST[dtype] * rng.choice([1, 0.3], size=n)).astype(dtype)
            residual = (rng.normal(size=n) * (kind in ("normal", "wide")) / 10).astype(wide)
            expected_residual = residual.copy()
            payload = np.full(encoder.nbytes(n) + 9, 0xAA, np.uint8)
            expected = payload.copy()
            used = encoder.encode(values, residual, payload, 5)
            assert used == encode(encoder, values, expected_residual, expected[: encoder.nbytes(n)], 5)
            assert payload.tobytes() == expected.tobytes()  # what lies behind the payload is left alone
            assert residual.tobytes() == expected_residual.tobytes()
            for out_dtype in VALUE_DTYPES:
                out = rng.normal(size=n).astype(out_dtype)
                expected_out = out.copy()
                accumulate = kind in ("normal", "sparse")
                encoder.decode(payload[:used], out, accumulate)
                decode(encoder, payload[:used], expected_out, accumulate)
                assert out.tobytes() == expected_out.tobytes()


def at(array: Any) -> int:
    address: int = array.ctypes.data
    return address


@each_encoder_and_dtype
def test_functions_give_the_same_bits_and_refuse_what_does_not_fit(make: Any, dtype: Any) -> None:
    encoder, n = small(make), 2500
    wide = residual_dtype(dtype)
    if not encoder.has_functions:
        with pytest.raises(TypeError, match=f"{make.__name__}.functions: it has no kernels that are C functions"):
            encoder.functions(dtype)
        return
    functions = encoder.functions(dtype)
    encode, decode = ENCODE(functions.encode), DECODE(functions.decode)
    values, residual, expected_residual = gradient(n, dtype), gradient(n, wide, 1), gradient(n, wide, 1)
    expected = np.empty(encoder.nbytes(n), np.uint8)
    expected = expected[: encoder.encode(values, expected_residual, expected, seed=5)]

    payload = np.full(encoder.nbytes(n) + 2, 0xAA, np.uint8)[1:]  # at an odd address
    used = encode(at(values), at(residual), n, at(payload), payload.size, 5, functions.settings)
    assert payload[:used].tobytes() == expected.tobytes()
    assert residual.tobytes() == expected_residual.tobytes()

    for accumulate in (0, 1):
        out, expected_out = gradient(n, dtype, 2), gradient(n, dtype, 2)
        encoder.decode(expected, expected_out, accumulate=bool(accumulate))
        assert decode(at(payload), used, at(out), n, accumulate, functions.settings) == 0
        assert out.tobytes() == expected_out.tobytes()

    for capacity in (0, 1, used // 2, used - 1):
        payload[:] = 0xAA
        assert encode(at(values), at(gradient(n, wide, 1)), n, at(payload), capacity, 5, functions.settings) == -1
        assert (payload[capacity:] == 0xAA).all()
    out = np.zeros(n, dtype)
    for nbytes in (0, 1, used - 1, used + 1):
        assert decode(at(payload), nbytes, at(out), n, 0, functions.settings) == -1
    assert encode(at(values), at(residual), 0, at(payload), 0, 0, functions.settings) == 0
    assert decode(at(payload), 0, at(out), 0, 0, functions.settings) == 0


class Guarded:
    """Memory that ends where a page begins that can be neither read nor written: going beyond it ends the process."""

    def __init__(self, nbytes: int) -> None:
        begin = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, begin + mmap.PAGESIZE)
        pages = np.frombuffer(self._map, np.uint8)
        guard = ctypes.c_void_p(at(pages) + begin)
        assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        self._all = pages[:begin]

    def last(self, nbytes: int) -> Any:
        """The last bytes; those before them are set to 0xAA."""
        self._all[:] = 0xAA
        return self._all[self._all.size - nbytes :]

    def untouched(self, nbytes: int) -> bool:
        """Whether the others are as they were set."""
        return bool((self._all[: self._all.size - nbytes] == 0xAA).all())


def decode_nonsense(make: Any, cases: int) -> int:
    """Decode damaged payloads and noise; how many were refused."""
    encoder = small(make, 64)
    rng = np.random.default_rng(cases)
    payloads, outs = Guarded(4096), Guarded(4096)
    refused = 0
    originals = {n: encoded(encoder, gradient(n, np.float32), np.zeros(n, np.float32)) for n in (1, 64, 150, 300)}
    for case in range(cases):
        n = list(originals)[case % 4]
        damaged = originals[n].copy()
        kind = rng.integers(5)
        if kind == 0:
            damaged = damaged[: rng.integers(damaged.size)]
        elif kind == 1:
            damaged = rng.integers(0, 256, rng.integers(2 * damaged.size), np.uint8)
        elif kind == 2:
            damaged = np.append(damaged, rng.integers(0, 256, 5, np.uint8))
        for _ in range(rng.integers(1, 4)):
            if damaged.size:
                damaged[rng.integers(damaged.size)] ^= np.uint8(1 << rng.integers(8))
        payload = payloads.last(damaged.size)
        payload[:] = damaged
        dtype = VALUE_DTYPES[case // 4 % 4]
        out = outs.last(n * dtype.itemsize).view(dtype)
        try:
            encoder.decode(payload, out, accumulate=bool(case & 16))
        except ValueError:
            refused += 1
        assert outs.untouched(out.nbytes)
        assert payload.tobytes() == damaged.tobytes()
    return refused


@each_encoder
def test_nonsense_is_refused_or_decoded_within_bounds(make: Any) -> None:
    assert decode_nonsense(make, 2000) > 500


@each_encoder
@pytest.mark.slow
def test_much_nonsense_is_refused_or_decoded_within_bounds(make: Any) -> None:
    assert decode_nonsense(make, 100_000) > 25_000


@each_encoder
@hypothesis.settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_numbers_that_are_not_finite_do_no_harm(make: Any, seed: int) -> None:
    encoder = small(make, 64)
    rng = np.random.default_rng(seed)
    special = rng.choice([np.nan, np.inf, -np.inf, 3e38, -1e-45], 200)
    values = np.where(rng.random(200) < 0.1, special, 1).astype(np.float32)
    payload = encoded(encoder, values, np.zeros(200, np.float32))
    assert decoded(encoder, payload, 200, np.float32).size == 200


def test_the_cache_knows_kernels_by_their_parts_too() -> None:
    parts = _parts("bitring.compression.kernels.topk_numba", set())
    names = {name.rpartition(".")[2] for name in parts}
    assert names == {"topk_numba", "gaps_numba", "quantile_numba", "lanes_numba", "vectors_numba"}
