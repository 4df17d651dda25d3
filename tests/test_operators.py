"""Which operations bitring makes itself, on which dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from bitring.collectives.operators import op_name, ufunc_name

FLOATS = ["e", "f", "d", "g", ml_dtypes.bfloat16]
INTEGERS = ["b", "B", "h", "H", "i", "I", "l", "L"]


def test_names():
    assert [op_name(op) for op in (MPI.SUM, MPI.BXOR, MPI.MAXLOC, MPI.NO_OP)] == ["SUM", "BXOR", "MAXLOC", "NO_OP"]
    own = MPI.Op.Create(lambda a, b, _: None)
    assert op_name(own) == "user"
    assert ufunc_name(own, np.dtype("f")) is None
    own.Free()


@pytest.mark.parametrize(
    ("operations", "codes", "own"),
    [
        ("SUM PROD MAX MIN", [*FLOATS, *INTEGERS], True),
        ("LAND LOR LXOR BAND BOR BXOR", INTEGERS, True),
        ("LAND LOR LXOR BAND BOR BXOR", FLOATS, False),
        ("SUM PROD", ["F", "D", "G"], True),
        ("MAX MIN LAND BAND", ["F", "D", "G"], False),
        ("LAND LOR LXOR", ["?"], True),
        ("SUM PROD MAX MIN BAND", ["?"], False),
        ("MAXLOC MINLOC REPLACE NO_OP", [*FLOATS, *INTEGERS, "?"], False),
        ("SUM", ["U3", "O", "M8[s]", "V4", "i4,f8"], False),
    ],
)
def test_what_bitring_reduces(operations: str, codes: list, own: bool):
    for operation in operations.split():
        for code in codes:
            name = ufunc_name(getattr(MPI, operation), np.dtype(code))
            assert (name is not None) == own, f"{operation} of {np.dtype(code)}"
            if name:
                x = np.ones(3).astype(code)
                getattr(np, name)(x, x, out=x)  # as the transports call it
                assert x.dtype == np.dtype(code)


@pytest.mark.parametrize("code", ["e", ml_dtypes.bfloat16])
def test_sixteen_bit_sums_round_once(code):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=1000).astype(code) for _ in range(2))
    np.testing.assert_array_equal(np.add(a, b), (a.astype("f") + b.astype("f")).astype(code))
