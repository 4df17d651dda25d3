"""OneBit's levels of parameters whose shape is known: which there are, what they lose, and the kernels of rank one."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitring
from bitring.compression.encoder import VALUE_DTYPES, residual_dtype
from bitring.compression.encoders.onebit import OneBit
from bitring.compression.exchange.layout import lay_out
from bitring.compression.kernels.rank_one_numba import LARGE
from bitring.compression.rank_one import COLUMN_NBITS, RankOne, _coded, _decoded

pytestmark = pytest.mark.single

each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        # Kernels take long to compile: two types of values show most.
        pytest.param(dtype, marks=[pytest.mark.slow] if dtype.name in ("float16", "float64") else [], id=dtype.name)
        for dtype in VALUE_DTYPES
    ],
)


def matrix(rows: int, columns: int, seed: int = 0, spread: float = 1.0) -> Any:
    """Magnitudes are nearly a number of the row times one of the column."""
    rng = np.random.default_rng([seed, rows, columns])
    scales = rng.lognormal(sigma=spread, size=(rows, 1)) * rng.lognormal(sigma=spread, size=columns)
    return rng.normal(size=(rows, columns)) * scales


def encoded(encoder: Any, v: Any) -> tuple[Any, Any]:
    """The payload, and what is left."""
    flat = v.reshape(-1)
    residual, payload = np.zeros(flat.size, residual_dtype(v.dtype)), np.empty(encoder.nbytes(flat.size), np.uint8)
    assert encoder.encode(flat, residual, payload) == payload.size
    return payload, residual.reshape(v.shape)


def decoded(encoder: Any, payload: Any, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    out = np.full(math.prod(shape), 7, dtype)
    encoder.decode(payload, out)
    return out.reshape(shape)


@each_dtype
@pytest.mark.timeout(300)
def test_kernels_compile(dtype: Any) -> None:
    RankOne().warm_up(dtype)  # under Hypothesis, which traces, compiling takes long


@each_dtype
@settings(max_examples=40)
@given(
    columns=st.sampled_from([1, 7, 8, 31, 32, 33, 64, 100, 256, 300]) | st.integers(1, 200),
    rows=st.integers(1, 80),
    most=st.integers(1, 70),
    group=st.sampled_from([1, 1, 2, 16, 512]),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    zeros=st.booleans(),
)
def test_kernels_equal_the_numpy_code(
    dtype: Any, columns: int, rows: int, most: int, group: int, seed: int, spread: float, zeros: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = matrix(rows, columns, seed, spread)
    residual = 0.1 * matrix(rows, columns, seed + 1, spread)
    if zeros:
        for x in (values, residual):
            x[::3] = 0
            x[:, ::4] = -0.0
    values = np.clip(values, -6e4, 6e4).astype(dtype).reshape(-1)
    residual = residual.astype(residual_dtype(dtype)).reshape(-1)
    expected_residual, panels, in_numpy = residual.copy(), RankOne(columns, most, group), cast(Any, RankOne)
    payload = np.full(panels.nbytes(values.size) + 3, 0xAA, np.uint8)
    expected = payload.copy()
    used = panels.encode(values, residual, payload[1:-1])  # at an odd address
    assert used == in_numpy.encode.__wrapped__(panels, values, expected_residual, expected[1:-1]) == payload.size - 3
    assert payload.tobytes() == expected.tobytes()
    assert residual.tobytes() == expected_residual.tobytes()
    for out_dtype in VALUE_DTYPES:
        for accumulate in (False, True):
            start = np.append(rng.normal(size=values.size), 7.0).astype(out_dtype)
            out, expected_out = start.copy(), start.copy()
            panels.decode(payload[1 : used + 1], out[:-1], accumulate)
            in_numpy.decode.__wrapped__(panels, payload[1 : used + 1], expected_out[:-1], accumulate)
            assert out.tobytes() == expected_out.tobytes()


@each_dtype
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("columns", [4099, 4096 + 24])
def test_large_panels_decode_wherever_they_lie(dtype: Any, first: int, columns: int) -> None:
    """Rows go past the cache, but for those that begin anywhere."""
    panels, n = RankOne(columns, 64), 64 * columns
    assert n * dtype.itemsize >= LARGE
    payload, _ = encoded(panels, matrix(64, columns).astype(np.float32))
    expected = np.empty(n, dtype)
    cast(Any, RankOne).decode.__wrapped__(panels, payload, expected)
    out = np.full(n + 2, 7, dtype)
    panels.decode(payload, out[first : first + n])
    assert out[first : first + n].tobytes() == expected.tobytes()
    assert float(out[first - 1]) == float(out[first + n]) == 7


@each_dtype
@pytest.mark.parametrize("shape", [(64, 256), (70, 301), (3, 1000), (5, 4, 8)])
def test_decoded_and_residual_make_the_value(dtype: Any, shape: tuple[int, ...]) -> None:
    v = matrix(shape[0], math.prod(shape[1:])).astype(dtype)
    panels = OneBit(levels="rank_one").for_shape(shape)
    assert isinstance(panels, RankOne)
    payload, left = encoded(panels, v)
    wide = residual_dtype(dtype)
    np.testing.assert_allclose(
        decoded(panels, payload, v.shape, wide) + left, v.astype(wide), rtol=0, atol=1e-6 * float(np.abs(v).max())
    )


def test_levels_of_a_small_panel_by_hand() -> None:
    """Columns' sums are 12, 6, 0 and 3, so their numbers 1, 1/2, 0, 1/4, and those of all others 0."""
    panels = RankOne(576, 64)
    wide = np.zeros((64, 576), np.float32)
    wide[:2, :4] = [[8, -4, 0, 2], [4, 2, 0, -1]]
    payload, left = encoded(panels, wide)
    assert (panels.row_group, panels.column_group) == (1, 1)
    low, high = payload[:8].view(np.float32)
    mean = (1 + 0.5 + 0 + 0.25) / 576
    # Means of rows: (8 + 2)/575 and (4 + 2)/575 of the others, -4 and -1 of the negative ones.
    assert low == np.float32(-4 / mean)
    assert high == np.float32(np.float32(10 / 575) / mean)
    assert payload[8:11].tolist() == [0b00_101_111, 0b0000_011_0, 0]
    rows = payload[8 + 216 : 8 + 216 + 64]
    assert rows.tolist() == [0xFF, 14 - 1 << 4 | 11] + [0] * 62
    out = decoded(panels, payload, wide.shape)
    assert out[0, 0] == np.float32(high)
    assert out[0, 1] == np.float32(low * np.float32(0.5))
    assert out[1, 1] == np.float32(high * np.float32(0.5) * np.float32(0.5))
    assert not out[:, 2].any()
    assert not out[2:].any()
    np.testing.assert_array_equal(out + left, wide)


@pytest.mark.parametrize("nbits", [3, 4])
def test_codes_are_the_nearest_numbers(nbits: int) -> None:
    numbers = _decoded(np.arange(1 << nbits, dtype=np.uint8), nbits)
    steps = [(1, 0.75)[k % 2] / 2.0 ** (k // 2) for k in range((1 << nbits) - 1)]
    assert numbers.tolist() == [0.0, *reversed(steps)]
    assert _coded(numbers, nbits).tolist() == list(range(1 << nbits))
    x = np.append(np.float32(1), np.random.default_rng(0).uniform(0, 1, 999).astype(np.float32) ** 3)
    codes = _coded(x, nbits)
    near = np.abs(numbers[:, None] - x).min(axis=0)
    assert (np.abs(_decoded(codes, nbits) - x) <= near * (1 + 1e-6)).all()


@each_dtype
def test_rows_and_columns_of_zeros_decode_to_zeros(dtype: Any) -> None:
    v = matrix(64, 300)
    v[[0, 7, 63]] = 0
    v[:, [0, 5, 298, 299]] = -0.0
    panels = RankOne(300, 64)
    for x in (v, np.zeros_like(v), -np.zeros_like(v)):
        payload, left = encoded(panels, x.astype(dtype))
        out = decoded(panels, payload, v.shape, dtype)
        assert np.isfinite(out.astype(float)).all()
        assert np.isfinite(left).all()
        assert not out[~x.any(axis=1)].any()
        assert not out[:, ~x.any(axis=0)].any()
        assert not left[~x.any(axis=1)].any()


def test_a_single_value_is_sent() -> None:
    for n in (300, 512):
        v = np.zeros((64, n), np.float32)
        v[5, 17] = 3
        payload, left = encoded(RankOne(n, 64), v)
        out = decoded(RankOne(n, 64), payload, v.shape)
        assert out[5, 17] > 0
        assert float((left**2).sum()) < 9
        assert not out[:5].any()
        assert not out[6:].any()


@each_dtype
def test_finite_values_stay_finite(dtype: Any) -> None:
    largest = min(float(np.finfo(np.float32).max), float(np.finfo(np.float32).max if dtype.itemsize > 2 else 6e4))
    for seed, share in ((0, 1.0), (1, 0.9), (2, 0.3)):
        for magnitudes in (np.ones((64, 300)), np.random.default_rng(seed).uniform(size=(64, 300)) ** 4):
            signs = np.random.default_rng(seed).choice([-1, 1], magnitudes.shape)
            v = (signs * share * largest * magnitudes).astype(dtype)
            payload, left = encoded(RankOne(300, 64), v)
            assert np.isfinite(left).all()
            assert np.isfinite(decoded(RankOne(300, 64), payload, v.shape, residual_dtype(dtype))).all()


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_shows_in_its_panel_alone(dtype: Any, bad: float) -> None:
    v = np.ones((6, 256)).astype(dtype)
    v[3, 100] = bad
    payload, left = encoded(RankOne(256, 2), v)
    finite = np.isfinite(decoded(RankOne(256, 2), payload, v.shape))
    assert not np.isfinite(left[3, 100])
    assert not finite[3, 100]
    assert finite[[0, 1, 4, 5]].all()


def test_nearly_rank_one_magnitudes_leave_less_than_blocks() -> None:
    """A sign and a level that is right leave nothing of abs(v); what is left of normal values is 1 - 2/pi."""
    v = matrix(256, 784).astype(np.float32)

    def left(levels: str) -> float:
        codec = OneBit(levels=levels)
        residual, payload = np.zeros(v.size, np.float32), np.empty(codec.nbytes(v.size, v.shape), np.uint8)
        codec.encode(v.reshape(-1), residual, payload, shape=v.shape)
        return float((residual**2).sum() / (v**2).sum())

    assert left("rank_one") == left("auto") < 0.5
    assert left("row") > 0.55
    assert left("block") > 0.6


ALL_SHAPES = [
    *[(256, 784), (10, 256), (4096, 4096), (64, 27), (50, 500), (500, 800), (1000, 100), (1, 100_000), (64, 64)],
    *[(512, 4608), (100_000, 8), (2, 3000), (3, 5, 7, 11), (20, 1, 5, 5), (2000, 2000), (129, 1025), (7, 40_000)],
]


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16, 64])
def test_levels_take_no_more_than_those_of_blocks(shape: tuple[int, ...], ranks: int) -> None:
    """6% of a payload, whatever the shape and the number of ranks; parts of a byte and last, short blocks aside."""
    n = math.prod(shape)
    layout = lay_out(OneBit(), [shape], ranks)
    assert layout.expected_nbytes <= OneBit().nbytes(n) + 8 * ranks
    assert 1 - n / 8 / layout.expected_nbytes < 0.06 or OneBit() in layout.encoders
    if n >= 4096 * ranks and shape[0] >= 4 * ranks:
        most = max(b - a for a, b in layout.owned)
        assert most <= 1.1 * n / ranks + max(1024, n // shape[0]), "a rank owns more than others"


NETWORKS: dict[str, list[tuple[int, ...]]] = {
    "mlp": [(10, 256), (256, 784)],
    "cnn": [(10, 1024), (1024,), (1024, 1024), (64, 5, 5, 32)],
}


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_small_matrices_have_a_number_for_each_column(name: str, ranks: int) -> None:
    """An MLP's last layer with numbers of 64 columns lost up to 10 points: what they leave is 0.8, not 0.35."""
    shapes = NETWORKS[name]
    layout = lay_out(OneBit(), shapes, ranks)
    first = layout.segments[0][0][0]
    assert (first.stop - first.start, first.encoder) == (math.prod(shapes[0]), RankOne(shapes[0][-1], 10))
    n = sum(map(math.prod, shapes))
    assert 128 * layout.expected_nbytes <= 17 * n + 128 * 8


@pytest.mark.parametrize(("ranks", "most"), [(4, 29), (16, 28.5)])
def test_what_the_cnn_sends(ranks: int, most: float) -> None:
    """So many times less than exact, by the rank that sends most; small parameters travel exactly."""
    shapes = NETWORKS["cnn"]
    layout = lay_out(OneBit(), shapes, ranks)
    small, n = 32 * 25 + 32 + 64 + 10, sum(map(math.prod, shapes))
    sent = [layout.expected_nbytes_sent(rank) for rank in range(ranks)]
    exact = 2 * (ranks - 1) / ranks * 4
    assert max(sent) + exact * small < exact * (n + small) / most


def test_which_levels_a_shape_has() -> None:
    def kind(levels: str, *shape: int) -> str:
        return type(OneBit(levels=levels).for_shape(shape)).__name__

    assert [kind(levels, 256, 784) for levels in ("auto", "rank_one", "row", "block")] == [
        *("RankOne", "RankOne", "_Rows", "OneBit")
    ]
    for levels in ("auto", "rank_one", "row", "block"):
        assert kind(levels, 5000) == "OneBit"
    assert kind("auto", 64, 27) == "OneBit"
    assert kind("rank_one", 64, 27) == "RankOne"
    assert OneBit().for_shape((64, 3, 3, 32)) == OneBit().for_shape((64, 288))


@pytest.mark.parametrize("columns", [1, 20, 64, 301])
def test_rows_are_blocks_of_any_length(columns: int) -> None:
    v = matrix(7, columns).astype(np.float32)
    rows: Any = OneBit(levels="row").for_shape(v.shape)
    payload, left = encoded(rows, v)
    assert payload.size == 7 * (8 + -(-columns // 8))
    for k in range(7):
        each, rest = encoded(OneBit(block=1024), v[k])
        assert payload[k * each.size : (k + 1) * each.size].tobytes() == each.tobytes()
        assert left[k].tobytes() == rest.tobytes()
    np.testing.assert_allclose(decoded(rows, payload, v.shape) + left, v, atol=1e-5, rtol=1e-5)


def test_levels_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"OneBit: levels must be one of 'auto', 'rank_one', 'row', 'block'; got 'x'"):
        OneBit(levels="x")
    with pytest.raises(TypeError, match="OneBit: levels must be a str; got int"):
        OneBit(levels=cast(Any, 1))
    made: Any = bitring.plan_allreduce(np.zeros((2, 3), np.float32), compression="onebit:levels=row,block=128")
    made.free()
    with pytest.raises(ValueError, match="OneBit: levels must be one of"):
        bitring.plan_allreduce(np.zeros(3, np.float32), compression="onebit:levels=rows")


def test_a_shape_must_fit_the_values() -> None:
    codec, v = OneBit(), np.zeros(100, np.float32)
    with pytest.raises(ValueError, match=r"OneBit.encode: shape must be of 100 values, as many as there are; got \(3,"):
        codec.encode(v, v.copy(), np.empty(999, np.uint8), shape=(3, 33))
    with pytest.raises(ValueError, match=r"RankOne.nbytes: n must be whole rows of 7 values; got 100"):
        RankOne(7).encode(v, v.copy(), np.empty(999, np.uint8))


def test_payloads_that_were_not_encoded_are_refused() -> None:
    panels, v = RankOne(300, 64), matrix(64, 300).astype(np.float32)
    payload, _ = encoded(panels, v)
    out = np.zeros(v.size, np.float32)
    for wrong in (payload[:-1], np.append(payload, np.uint8(0))):
        with pytest.raises(ValueError, match=r"RankOne.decode: payload must have"):
            panels.decode(wrong, out)
    codes = (COLUMN_NBITS * 300 + 7) // 8
    in_numpy: Any = RankOne
    for at in (payload.size - 1, 8 + codes + 64 + 37, 8 + codes - 1):  # behind the bits of rows, and of columns' codes
        spoilt = payload.copy()
        spoilt[at] |= 0x80
        with pytest.raises(ValueError, match="have not"):
            panels.decode(spoilt, out)
        with pytest.raises(ValueError, match="bits behind"):
            in_numpy.decode.__wrapped__(panels, spoilt, out)
