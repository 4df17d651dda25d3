"""mpi4py's buffer specifications, read as it reads them; and what is said of those that nobody can read."""

from __future__ import annotations

import array

import numpy as np
import pytest
from mpi4py import MPI

from bitring.arrays import is_numeric
from bitring.collectives.interop.buffers import is_in_place, parse

X = np.arange(12.0)


def read(spec, writable: bool = True, blocks: int = 1):
    got = parse(spec, "Bcast", "buf", writable=writable, blocks=blocks)
    return None if got is None else got.flat


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        (X, X),
        (X.reshape(3, 4), X),
        (X.reshape(3, 4).T, X),
        ([X, MPI.DOUBLE], X),
        ((X, "d"), X),
        ([X, 5], X[:5]),
        ([X, 5, MPI.DOUBLE], X[:5]),
        ([X, (5, 2)], X[2:7]),
        ([X, (5, 2), "d"], X[2:7]),
        ([X, 5, 2, "d"], X[2:7]),
        ([X, None, 2, "d"], X[2:]),
        ([X, None, "d"], X),
        ([X, 0, "d"], X[:0]),
        (X[:0], X[:0]),
        ([X, MPI.INT], X.view("i")),
        ([X, 3, MPI.INT], X.view("i")[:3]),
        ([X.view("B")[:20], MPI.DOUBLE], X[:2]),
    ],
)
def test_what_is_read_shares_memory(spec, want):
    got = read(spec)
    assert got is not None
    assert got.ndim == 1
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    assert want.size == 0 or np.shares_memory(got, X)


def test_objects_with_a_buffer():
    values = array.array("h", [1, 2, 3])
    got = read(values)
    assert got is not None
    got[1] = 7
    assert list(values) == [1, 7, 3]
    got = read([bytearray(8), MPI.INT64_T])
    assert got is not None
    assert (got.dtype, got.size) == (np.int64, 1)
    got = read(b"abc", writable=False)
    assert got is not None
    assert bytes(got) == b"abc"


def test_a_count_is_of_one_block():
    got = read([X, 3, MPI.DOUBLE], blocks=4)
    assert got is not None
    assert got.size == 12
    got = read(X, blocks=5)  # whether it divides is the call's business
    assert got is not None
    assert got.size == 12


def test_in_place():
    assert is_in_place(MPI.IN_PLACE)
    assert is_in_place(None)
    assert not is_in_place(X)


def test_what_only_the_library_reads():
    vector = MPI.DOUBLE.Create_vector(2, 1, 2).Commit()
    for spec in ([X, 1, vector], [MPI.BOTTOM, 0, MPI.DOUBLE], [np.zeros(2, "i,i"), MPI.INT_INT]):
        assert read(spec) is None
    vector.Free()


def test_numeric():
    assert all(is_numeric(np.dtype(code)) for code in ("?", "b", "L", "e", "g", "G"))
    assert not any(is_numeric(np.dtype(code)) for code in ("O", "U1", "S1", "M8[s]", "V3"))


FROZEN = np.zeros(3)
FROZEN.flags.writeable = False


@pytest.mark.parametrize(
    ("spec", "kind", "text"),
    [
        (X[::2], ValueError, "Bcast: buf must be contiguous; got an array of shape (6,) with strides (16,)"),
        (FROZEN, ValueError, "Bcast: buf must be writable; got a read-only array"),
        (b"abc", ValueError, "Bcast: buf must be writable; got a read-only array"),
        ([X, 13], ValueError, "Bcast: buf must hold 13 values from position 0 on; got 12 values"),
        ([X, 5, 8, "d"], ValueError, "Bcast: buf must hold 5 values from position 8 on; got 12 values"),
        ([X, -1, "d"], ValueError, "Bcast: buf must hold -1 values from position 0 on; got 12 values"),
        ([X, 2, -1, "d"], ValueError, "Bcast: buf must hold 2 values from position -1 on; got 12 values"),
        ([X, 1, 2, "d", 5], ValueError, "Bcast: buf must be an array or a list of 2 to 4 items; got 5 items"),
        ([X], ValueError, "Bcast: buf must be an array or a list of 2 to 4 items; got 1 items"),
        (5, TypeError, "Bcast: buf: message: expecting buffer or list/tuple"),
        ("text", TypeError, "Bcast: buf: message: expecting buffer or list/tuple"),
        (np.array([None]), TypeError, "Bcast: buf: "),
        ([X, "bogus"], ValueError, "cannot map code 'bogus' to MPI datatype"),
    ],
)
def test_mistakes(spec, kind, text):
    with pytest.raises(kind) as caught:
        read(spec)
    assert text in str(caught.value)
