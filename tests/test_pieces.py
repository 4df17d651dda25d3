"""Large arrays in pieces, and work that ends well on all ranks or on none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.pieces import nbytes_of, split, transfer
from bitring.errors import PeerError


@pytest.mark.single
@given(sizes=st.lists(st.integers(0, 200), max_size=12), limit=st.integers(16, 90))
def test_pieces_are_all_bytes_in_order(sizes: list[int], limit: int):
    pieces = list(split(sizes, limit))
    assert all(len(piece) > 0 and nbytes_of(piece) <= limit for piece in pieces)
    reached = dict.fromkeys(range(len(sizes)), 0)
    order = [segment.array for piece in pieces for segment in piece]
    assert order == sorted(order)
    for number, begin, end in (segment for piece in pieces for segment in piece):
        assert begin == reached[number]
        assert end == sizes[number] or end % 16 == 0  # no value of any type is cut in two
        reached[number] = end
    assert list(reached.values()) == sizes
    assert set(order) == set(range(len(sizes)))  # empty ones, too
    assert len(pieces) <= sum(sizes) // (limit - 15) + 1 + len(sizes)


@pytest.mark.single
def test_beyond_what_fits_into_an_int():
    last = list(split([1 << 40], 1 << 30))[-1]
    assert last == [(0, (1 << 40) - (1 << 30), 1 << 40)]


@pytest.mark.parametrize("n", [0, 1, 1001, 1 << 20])
def test_transfer(comm, agree, n):
    expected = np.random.default_rng(1).integers(0, 256, n, np.uint8)
    for source in range(comm.size):
        for target in (None, *range(comm.size)):
            mine = expected.copy() if comm.rank == source else np.zeros(n, np.uint8)
            takes_part = target is None or comm.rank in (source, target)
            transfer(comm, mine if takes_part else None, "test", source, target)
            reached = comm.rank == source or target in (None, comm.rank)
            agree(comm, np.array_equal(mine, expected if reached else 0 * expected), f"{source} -> {target}")


@pytest.mark.parametrize("kind", [RuntimeError, FileNotFoundError, KeyboardInterrupt, UnicodeError])
def test_what_one_rank_raises_all_raise(comm, agree, kind):
    last = comm.size - 1

    def work() -> int:
        if comm.rank == last:
            raise kind("no\udc80") if kind is not UnicodeError else UnicodeError("no")
        return comm.rank

    error: BaseException | None = None
    try:
        jointly(comm, "test", work, alike=(OSError,))
    except BaseException as problem:
        error = problem
    expected = kind if comm.rank == last or kind is FileNotFoundError else PeerError
    agree(comm, type(error) is expected, repr(error))
    if expected is PeerError:
        agree(comm, str(error).startswith(f"test: rank {last} raised {kind.__name__}: no"), str(error))
    else:
        agree(comm, str(error).startswith("no"), str(error))
    agree(comm, jointly(comm, "test", lambda: comm.rank) == comm.rank)
