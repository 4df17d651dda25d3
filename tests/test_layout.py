import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitring.compression.encoder import Encoder
from bitring.compression.exchange.layout import Layout, Piece, lay_out

pytestmark = pytest.mark.single


@dataclass(frozen=True)
class Flat(Encoder):
    """Knows of no shapes."""

    block: int = 64

    def nbytes(self, n: int) -> int:
        return n

    def encode(self, values: Any, residual: Any, payload: Any, seed: int = 0) -> int:
        raise NotImplementedError

    def decode(self, payload: Any, out: Any, accumulate: bool = False) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Shaped(Flat):
    """Encodes panels of two rows."""

    def grain(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[1:]) if len(shape) > 1 else self.block

    def for_parts(self, shapes: Sequence[tuple[int, ...]]) -> list[Encoder]:
        return [Flat(2 * self.grain(shape)) if len(shape) > 1 else self for shape in shapes]


sizes = st.integers(1, 9)
lengths = st.integers(0, 700)


def pieces_of(layout: Layout) -> list[Piece]:
    return [piece for chunk in layout.segments for segment in chunk for piece in segment]


def flat_shapes(n: int, boundaries: list[int]) -> list[tuple[int, ...]]:
    return [(b - a,) for a, b in itertools.pairwise(sorted({0, *boundaries, n}))]


@given(n=lengths, cuts=st.lists(st.integers(0, 700), max_size=6), block=st.sampled_from([1, 7, 64]), size=sizes)
def test_every_value_is_in_one_piece_of_whole_blocks(n: int, cuts: list[int], block: int, size: int) -> None:
    boundaries = sorted(c for c in cuts if c <= n)
    layout = lay_out(Flat(block), flat_shapes(n, boundaries), size)
    pieces = pieces_of(layout)
    assert [v for a, b, _ in pieces for v in range(a, b)] == list(range(n))
    starts = sorted({0, *boundaries})
    for a, b, _ in pieces:
        start = max(s for s in starts if s <= a)
        following = min([s for s in starts if s > a], default=n)
        assert a < b <= following, "a piece spans two parameters"
        assert (a - start) % block == 0
        assert b == following or (b - start) % block == 0


@given(n=lengths, block=st.sampled_from([1, 7, 64]), size=sizes)
def test_owned_chunks_are_contiguous_and_even(n: int, block: int, size: int) -> None:
    layout = lay_out(Flat(block), [(n,)], size)
    assert layout.owned[0][0] == 0
    assert layout.owned[-1][1] == n
    assert all(a[1] == b[0] for a, b in itertools.pairwise(layout.owned))
    blocks = [-(-(b - a) // block) for a, b in layout.owned]
    assert max(blocks) - min(blocks) <= 1


def test_fewer_blocks_than_ranks_leave_some_with_nothing() -> None:
    layout = lay_out(Flat(64), [(100,)], 5)
    assert sorted(layout.segments, key=len)[:3] == [(), (), ()]


shapes_of_parameters = st.lists(
    st.tuples(st.integers(0, 9)) | st.tuples(st.integers(0, 9), st.integers(0, 90)) | st.just((3, 2, 5)), max_size=5
)


@given(shapes=shapes_of_parameters, size=sizes, extent=st.tuples(st.integers(0, 900), st.integers(0, 900)) | st.none())
def test_panels_are_whole_rows_of_one_parameter(
    shapes: list[tuple[int, ...]], size: int, extent: tuple[int, int] | None
) -> None:
    n = sum(map(math.prod, shapes))
    first, last = (0, n) if extent is None else sorted(min(each, n) for each in extent)
    encoder = Shaped()
    layout = lay_out(encoder, shapes, size, first, last)
    pieces = pieces_of(layout)
    assert [v for a, b, _ in pieces for v in range(a, b)] == list(range(last - first))
    assert all(a[1] == b[0] for a, b in itertools.pairwise([(0, 0), *layout.owned, (last - first, 0)]))
    starts = [0, *itertools.accumulate(map(math.prod, shapes))]
    for a, b, each in pieces:
        a, b = a + first, b + first
        i = max(i for i, start in enumerate(starts[:-1]) if start <= a and math.prod(shapes[i]))
        start, stop, columns = starts[i], starts[i + 1], math.prod(shapes[i][1:])
        assert b <= stop, "a piece spans two parameters"
        if len(shapes[i]) == 1:
            assert each == encoder
        elif each == encoder:  # what the extent left of rows
            assert b - a < 2 * columns - 1 or columns == 1
            assert (first > start) or (last < stop)
        else:
            assert (a - start) % columns == 0
            assert (b - a) % columns == 0
            end = min(stop, last, first + next(end for begin, end in layout.owned if begin <= a - first < end))
            assert (b - a) % each.block == 0 or b + columns > end


def test_each_rank_owns_a_panel_of_a_matrix_where_there_are_enough() -> None:
    layout = lay_out(Shaped(), [(5,), (8, 100), (7,)], 4)
    assert [[(a, b) for segment in chunk for a, b, _ in segment] for chunk in layout.segments] == [
        [(0, 5), (5, 205)],
        [(205, 405)],
        [(405, 605)],
        [(605, 805), (805, 812)],
    ]
