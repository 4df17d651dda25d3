"""Which operations bitring makes itself, on which dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from bitring.arrays import NUMERIC_DTYPES
from bitring.collectives.allreduce import allreduce
from bitring.collectives.communicator import Communicator
from bitring.collectives.interop.operators import op_name, require_defined, ufunc_name
from bitring.collectives.schedules.schedule import algorithms
from bitring.compression.plans.plan import plan_allreduce

FLOATS = ["e", "f", "d", "g", ml_dtypes.bfloat16]
INTEGERS = ["b", "B", "h", "H", "i", "I", "l", "L"]


@pytest.mark.single
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
        ("SUM", ["U3", "O", "M8[s]", "V4", "i4,f8", ">f4", ">i8", ml_dtypes.float8_e5m2, ml_dtypes.int4], False),
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


def test_what_is_not_defined_is_named():
    with pytest.raises(TypeError) as caught:
        require_defined(MPI.MAX, np.dtype("F"), "f")
    assert str(caught.value) == "f: MAX is not defined for complex64; defined are SUM, PROD"


# What the MPI standard defines, by kind.
_DEFINED = {
    "b": ("LAND", "LOR", "LXOR"),
    "i": ("SUM", "PROD", "MAX", "MIN", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR"),
    "f": ("SUM", "PROD", "MAX", "MIN"),
    "c": ("SUM", "PROD"),
}
_NAMES = (*_DEFINED["i"], "MAXLOC", "MINLOC", "REPLACE", "NO_OP")


def _defined(name: str, dtype: np.dtype) -> bool:
    return name in _DEFINED[{"u": "i", "V": "f"}.get(dtype.kind, dtype.kind)]


def _outcome(call) -> str:
    try:
        call()
    except (TypeError, MPI.Exception) as error:
        return type(error).__name__
    return ""


_SOME = [np.dtype(code) for code in ("?", "i", "e", "d", "F")]


@pytest.mark.parametrize("algorithm", ["auto", "mpi", "ring"], ids="with_{}".format)  # "mpi" is pytest-mpi's mark
@pytest.mark.parametrize(
    "dtypes", [_SOME, pytest.param(NUMERIC_DTYPES, marks=pytest.mark.slow)], ids=["some_dtypes", "all_dtypes"]
)
def test_every_operation_on_every_dtype(comm, agree, dtypes, algorithm: str):
    """What the standard defines runs, and is NumPy's result; the rest is refused on all ranks before anything runs."""
    world, plain, wrong = Communicator(comm.Dup(), algorithm), MPI.Intracomm(comm.Dup()), []
    for dtype in dtypes:
        asked_all, theirs_too = False, dtype not in (np.float16, ml_dtypes.bfloat16)  # not all libraries have these
        every = np.random.default_rng(1).integers(0, 3, (world.size, 5)).astype(dtype)
        for name in _NAMES:
            op, x = getattr(MPI, name), every[world.rank].copy()
            want = "" if _defined(name, dtype) else "TypeError"
            if algorithm == "mpi" and theirs_too:
                theirs = _outcome(lambda x=x, op=op: plain.Allreduce(MPI.IN_PLACE, x.copy(), op))
                if (theirs == "") != (want == ""):
                    wrong.append(f"the library's {name} of {dtype}: {theirs}")
            got = x.copy()
            if _outcome(lambda got=got, op=op: plan_allreduce(got, comm=world, op=op, algorithm=algorithm)()) != want:
                wrong.append(f"a plan's {name} of {dtype} is not {want!r}")
            other = x.copy()
            if _outcome(lambda other=other, op=op: world.Allreduce(MPI.IN_PLACE, other, op)) != want:
                wrong.append(f"Allreduce's {name} of {dtype} is not {want!r}")
            if want == "":
                right = getattr(np, ufunc_name(op, dtype) or "")
                expected = every[0].copy()
                for each in every[1:]:
                    right(expected, each, out=expected)
                if not (np.array_equal(got, expected) and np.array_equal(other, expected)):
                    wrong.append(f"{name} of {dtype}: {got}, {other}, not {expected}")
            if want == "" or asked_all:
                continue
            asked_all = True
            calls = {
                "allreduce": lambda x=x, op=op: allreduce(x, comm=world, op=op, algorithm=algorithm),
                "Iallreduce": lambda x=x, op=op: world.Iallreduce(MPI.IN_PLACE, x, op).Wait(),
                "Allreduce_init": lambda x=x, op=op: world.Allreduce_init(MPI.IN_PLACE, x, op),
                "Reduce": lambda x=x, op=op: world.Reduce(x, x.copy(), op),
                "Reduce_scatter_block": lambda x=x, op=op: world.Reduce_scatter_block(np.repeat(x, world.size), x, op),
            }
            wrong += [f"{what}'s {name} of {dtype}" for what, call in calls.items() if _outcome(call) != want]
    agree(world, not wrong, f"{len(wrong)} wrong: {wrong[:5]}")
    world.Free()
    plain.Free()


SPECIAL = np.array([0.0, -0.0, 1, -1, np.nan, -np.nan, np.inf, -np.inf])


def _bits(x: np.ndarray) -> bytes:
    """Without the bytes that fill a long double up to its size."""
    return x.view(np.uint8).reshape(x.size, -1)[:, : 10 if x.dtype.itemsize == 16 else None].tobytes()


@pytest.mark.parametrize("name", ["auto", *algorithms.names()], ids="with_{}".format)
@pytest.mark.parametrize("operation", ["MAX", "MIN"])
def test_the_largest_and_the_smallest_are_the_same_bits_on_all_ranks(comm, agree, operation: str, name: str):
    """Wherever any rank has NaN there is NaN, and of two zeros all ranks take one."""
    world, op, wrong = Communicator(comm.Dup(), name), getattr(MPI, operation), []
    for code in FLOATS:
        for n in (1, 1000):
            every = [np.random.default_rng(r).choice(SPECIAL, n).astype(code) for r in range(world.size)]
            x, right = every[world.rank], every[0].copy()
            with np.errstate(invalid="ignore"):
                for each in every[1:]:
                    getattr(np, ufunc_name(op, right.dtype) or "")(right, each, out=right)
            results = {"Allreduce": np.empty_like(x), "Iallreduce": np.empty_like(x), "plan": x.copy()}
            world.Allreduce(x, results["Allreduce"], op)
            world.Iallreduce(x, results["Iallreduce"], op).Wait()
            plan = plan_allreduce(results["plan"], comm=world, op=op, algorithm=name)
            plan()
            plan.free()
            results["allreduce"] = allreduce(x, comm=world, op=op, algorithm=name)
            for what, got in results.items():
                if len(set(world.allgather(_bits(got)))) > 1 or not np.array_equal(got, right, equal_nan=True):
                    wrong.append(f"{what} of {n} {x.dtype}")
            root, block = np.empty_like(x), np.empty_like(x)
            world.Reduce(x, root, op)
            if world.rank == 0 and not np.array_equal(root, right, equal_nan=True):
                wrong.append(f"Reduce of {n} {x.dtype}")
            world.Reduce_scatter_block(np.concatenate([x] * world.size), block, op)
            if not np.array_equal(block, right, equal_nan=True):
                wrong.append(f"Reduce_scatter_block of {n} {x.dtype}")
    agree(world, not wrong, str(wrong[:5]))
    world.Free()
