import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitring.compression.exchange.layout import cut

pytestmark = pytest.mark.single

sizes = st.integers(1, 9)
lengths = st.integers(0, 700)


@given(n=lengths, cuts=st.lists(st.integers(0, 700), max_size=6), block=st.sampled_from([1, 7, 64]), size=sizes)
def test_every_value_is_in_one_piece_of_whole_blocks(n: int, cuts: list[int], block: int, size: int) -> None:
    boundaries = sorted(c for c in cuts if c <= n)
    layout = cut(n, boundaries, block, size)
    pieces = [piece for chunk in layout.pieces for piece in chunk]
    assert [v for a, b in pieces for v in range(a, b)] == list(range(n))
    starts = sorted({0, *boundaries})
    for a, b in pieces:
        start = max(s for s in starts if s <= a)
        following = min([s for s in starts if s > a], default=n)
        assert a < b <= following, "a piece spans two parameters"
        assert (a - start) % block == 0
        assert b == following or (b - start) % block == 0


@given(n=lengths, block=st.sampled_from([1, 7, 64]), size=sizes)
def test_owned_chunks_are_contiguous_and_even(n: int, block: int, size: int) -> None:
    layout = cut(n, (), block, size)
    assert layout.owned[0][0] == 0
    assert layout.owned[-1][1] == n
    assert all(a[1] == b[0] for a, b in zip(layout.owned, layout.owned[1:], strict=False))
    blocks = [-(-(b - a) // block) for a, b in layout.owned]
    assert max(blocks) - min(blocks) <= 1


def test_fewer_blocks_than_ranks_leave_some_with_nothing() -> None:
    layout = cut(100, (), 64, 5)
    assert sorted(layout.pieces, key=len)[:3] == [(), (), ()]
