"""``bitring.allreduce``: shapes, dtypes, byte orders, immutable arrays, means; and what is said of the others."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from other_libraries import Immutable, Tensor

from bitring.collectives.allreduce import allreduce
from bitring.collectives.communicator import Communicator
from bitring.compression.plans.plan import plan_allreduce
from bitring.errors import MismatchError, PeerError

ALGORITHMS = ["auto", "mpi", "ring"]
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.longdouble, np.complex64, np.complex128]


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def raised(call, *arguments, **named) -> Exception | None:
    try:
        call(*arguments, **named)
    except Exception as error:
        return error
    return None


def says(error: Exception | None, kind: type[Exception], *texts: str) -> bool:
    return type(error) is kind and all(text in str(error) for text in texts)


def usable(world) -> bool:
    return bool((allreduce(np.ones(3), comm=world) == world.size).all())


# Byte order, and dtypes that nobody reduces

SWAPPED = [">f4", ">f8", ">i4", ">u2", ">c16", ">f2", ">g"]


@pytest.mark.parametrize("code", SWAPPED)
def test_swapped_bytes_are_put_right(world, agree, code: str):
    """In what is returned they have the machine's order; ranks may differ in theirs."""
    dtype = np.dtype(code)
    native = dtype.newbyteorder("=")
    x = np.arange(1, 8).astype(dtype if world.rank % 2 == 0 else native).reshape(7, 1)
    kept = x.copy()
    for out in (None, np.empty((7, 1), native)):
        got = allreduce(x, out, comm=world)
        good = got.dtype == native and np.array_equal(got, world.size * np.arange(1, 8).reshape(7, 1).astype(native))
        agree(world, bool(good) and np.array_equal(x, kept), f"{got}")


def in_place_calls(world) -> dict[str, Any]:
    """What works on memory that is the caller's, which it therefore cannot put right."""
    from mpi4py import MPI

    n, size = 6, world.size

    def persistent(x) -> None:
        world.Allreduce_init(MPI.IN_PLACE, x).Free()

    return {
        "Allreduce": lambda x: world.Allreduce(MPI.IN_PLACE, x),
        "Iallreduce": lambda x: world.Iallreduce(MPI.IN_PLACE, x).Wait(),
        "Allreduce_init": persistent,
        "Reduce": lambda x: world.Reduce(x, np.empty(n)),
        "Reduce_scatter_block": lambda x: world.Reduce_scatter_block(np.repeat(x, size), x),
        "Allgather": lambda x: world.Allgather(x, np.empty(size * n)),
        "Bcast": lambda x: world.Bcast(x),
        "allreduce": lambda x: allreduce(x, x, comm=world),
        "plan_allreduce": lambda x: plan_allreduce(x, comm=world),
        "plan_allreduce ": lambda x: plan_allreduce(x, comm=world, compression="onebit"),
        "plan_allreduce  ": lambda x: plan_allreduce(x, comm=world, compression="powersgd"),
    }


def test_swapped_bytes_in_place(world, agree):
    """One error that names the byte order, on all ranks, though only one has such an array; and none is harmed."""
    from mpi4py import MPI

    odd = world.rank == world.size - 1
    for function, call in in_place_calls(world).items():
        error = raised(call, np.ones(6, ">f8" if odd else "=f8"))
        texts = function.strip(), "must have this machine's byte order; got >f8, whose bytes are swapped"
        agree(world, says(error, TypeError if odd else PeerError, *texts), f"{function}: {error!r}")
    for spec in ([np.ones(6, ">f8"), MPI.DOUBLE], np.ones(6, ">f8").data):
        error = raised(world.Allreduce, MPI.IN_PLACE, spec)
        agree(world, says(error, TypeError, "must have this machine's byte order"), repr(error))
    x = np.full(6, world.rank, ">f8")
    world.Bcast([x, MPI.BYTE])
    agree(world, bool((x == 0).all()) and usable(world), str(x))
    error = raised(world.empty, 3, ">f4")
    agree(world, says(error, TypeError, "empty: dtype must have this machine's byte order; got >f4"), repr(error))


STRANGE = ["M8[s]", "m8[s]", "i4,f8", "V0", "V4", "S3", "U2", "O", ml_dtypes.float8_e5m2, ml_dtypes.int4]


@pytest.mark.parametrize("code", STRANGE, ids=str)
def test_dtypes_that_nobody_reduces(world, agree, code):
    x = np.zeros(6, code)
    for function, call in in_place_calls(world).items():
        error = raised(call, x)
        good = isinstance(error, (TypeError, ValueError)) and str(error).startswith(function.strip())
        agree(world, good, f"{function}: {error!r}")
    for out in (None, np.zeros(6)):
        error = raised(allreduce, x, out, comm=world)
        agree(world, says(error, TypeError, "allreduce: x must have a numeric dtype; got"), repr(error))
    agree(world, usable(world))


@pytest.mark.parametrize("code", ["O", "V0", "S0", "(2,)f4"])
def test_arrays_that_cannot_be_shared(world, agree, code: str):
    error = raised(world.empty, 3, code)
    agree(world, says(error, TypeError, "empty: dtype must be of plain values; got"), repr(error))


# What kinds of arrays there are


def test_subclasses_are_their_plain_data(world, agree):
    data = np.arange(6.0).reshape(2, 3)
    masked = np.ma.masked_array(data.copy(), mask=np.ones((2, 3), bool))
    for given in (masked, data.copy().view(np.matrix), data.copy().view(np.recarray)):
        got = allreduce(given, comm=world)
        agree(world, type(got) is np.ndarray and np.array_equal(got, world.size * data), repr(got))
    plan = plan_allreduce(masked, comm=world)
    plan()
    agree(world, np.array_equal(masked.data, world.size * data), repr(masked.data))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_immutable_arrays_are_only_read(world, agree, dtype):
    from mpi4py import MPI

    x = Immutable(np.arange(6).astype(dtype))
    agree(world, np.array_equal(allreduce(x, comm=world), world.size * np.arange(6).astype(dtype)))
    out = np.zeros(6, dtype)
    world.Allreduce(x, out)
    agree(world, np.array_equal(out, world.size * np.arange(6).astype(dtype)), str(out))
    if world.rank == 0:
        world.Bcast(x)
    else:
        world.Bcast(out)
    agree(world, np.array_equal(np.arange(6).astype(dtype), x.array if world.rank == 0 else out), str(out))
    in_place = {
        "plan_allreduce: x": lambda: plan_allreduce(x, comm=world),
        "plan_allreduce:  x": lambda: plan_allreduce(x, comm=world, compression="onebit"),
        "allreduce: out": lambda: allreduce(x, out=x, comm=world),
        "Allreduce: recvbuf": lambda: world.Allreduce(MPI.IN_PLACE, x),
        "Iallreduce: recvbuf": lambda: world.Iallreduce(MPI.IN_PLACE, x).Wait(),
        "Allgather: recvbuf": lambda: world.Allgather(np.zeros(1, dtype), x),
    }
    for what, call in in_place.items():
        error = raised(call)
        text = f"{what.replace('  ', ' ')} must be writable; got a read-only array"
        agree(world, says(error, ValueError, text), f"{what}: {error!r}")
    agree(world, np.array_equal(x.array, np.arange(6).astype(dtype)), str(x.array))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tensors_are_reduced_in_their_memory(world, agree, dtype):
    x = Tensor(np.arange(6).astype(dtype).reshape(2, 3))
    want = world.size * np.arange(6).reshape(2, 3).astype(dtype)
    got = allreduce(x, comm=world)
    agree(world, got.dtype == dtype and np.array_equal(got, want), repr(got))
    plan = plan_allreduce(x, comm=world)
    plan()
    agree(world, np.array_equal(x.array, want), repr(x.array))


def test_jax(world, agree):
    jax = pytest.importorskip("jax")
    for dtype in (jax.numpy.float32, jax.numpy.bfloat16):
        x = jax.numpy.arange(4).astype(dtype)
        agree(world, np.array_equal(allreduce(x, comm=world), world.size * np.arange(4)))
        for call in (lambda x=x: plan_allreduce(x, comm=world), lambda x=x: allreduce(x, x, comm=world)):
            error = raised(call)
            agree(world, says(error, ValueError, "must be writable; got a read-only array"), repr(error))
        agree(world, bool((x == jax.numpy.arange(4)).all()), str(x))
    error = raised(jax.jit(lambda x: allreduce(x, comm=world)), jax.numpy.zeros(3))
    agree(world, says(error, TypeError, "allreduce: x is a JAX tracer, which has no values yet"), repr(error))


# Shapes and memory orders


@pytest.mark.parametrize("function", ["allreduce", "plan_allreduce", "onebit", "powersgd"])
def test_ranks_that_differ_in_shape_or_order(world, agree, function: str):
    compression = None if function.endswith("allreduce") else function

    def call(x) -> None:
        if function == "allreduce":
            allreduce(x, x, comm=world)
        else:
            plan_allreduce(x, comm=world, compression=compression)

    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    cases = [(np.asfortranarray(x), "order"), (x.reshape(3, 2).copy(), "shape"), (x.reshape(6).copy(), "shape")]
    if world.size > 1:
        for other, term in cases:
            error = raised(call, other if world.rank == world.size - 1 else x.copy())
            agree(world, says(error, MismatchError, f"ranks disagree on {term}: "), repr(error))
    call(np.asfortranarray(x))  # on all ranks
    call(np.asfortranarray(x[:1]) if world.rank else x[:1].copy())  # with one axis, there is but one order
    agree(world, usable(world))


def test_any_strides_are_summed_by_position(world, agree):
    x = np.arange(24.0).reshape(2, 3, 4)
    views = [x, np.asfortranarray(x), x.transpose(2, 0, 1).copy().transpose(1, 2, 0), np.repeat(x, 2, 0)[::2]]
    got = allreduce(views[world.rank % 4], comm=world)
    agree(world, got.flags.c_contiguous and np.array_equal(got, world.size * x), str(got))


# Means


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids="with_{}".format)  # pytest-mpi takes "mpi" for its mark
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_means(world, agree, dtype, algorithm: str):
    dtype = np.dtype(dtype)
    every = np.random.default_rng(5).normal(size=(world.size, 4, 5)).astype(dtype)
    wide = np.float32 if dtype.itemsize == 2 else dtype
    want = every.astype(wide).sum(axis=0) / wide(world.size) if wide is np.float32 else every.sum(axis=0) / world.size
    mine, tolerance = every[world.rank], 1e-2 if dtype.itemsize == 2 else 1e-5 if dtype.char in "fF" else 1e-12
    x, fortran = mine.copy(), np.asfortranarray(mine)
    results = {
        "new": allreduce(x, comm=world, algorithm=algorithm, mean=True),
        "Fortran order": allreduce(fortran, fortran, comm=world, algorithm=algorithm, mean=True),
        "in place": allreduce(x, x, comm=world, algorithm=algorithm, mean=True),
    }
    agree(world, results["in place"].base is x or results["in place"] is x or np.shares_memory(results["in place"], x))
    for what, got in results.items():
        near = np.allclose(got.astype(complex), want.astype(complex), rtol=tolerance, atol=tolerance)
        agree(world, got.dtype == dtype and near, f"{what}: {got} is not {want}")
        agree(world, len({bytes(b) for b in world.allgather(got.astype(np.complex128).tobytes())}) == 1, what)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_means_of_16_bits_are_rounded_once(world, agree, dtype):
    """Neither the smallest numbers are lost, nor do float16's sums beyond the largest make the mean infinite."""
    info = ml_dtypes.finfo(dtype)
    x = np.array([info.smallest_subnormal, info.tiny, info.max if dtype == np.float16 else info.max / 8, 1], dtype)
    got = allreduce(x, comm=world, mean=True)
    agree(world, np.array_equal(got, x), f"{got} is not {x}")
    rank = np.array([world.rank * float(info.eps) + 1], dtype)
    exact = np.float32(sum(np.float32(r * float(info.eps) + 1) for r in range(world.size))) / np.float32(world.size)
    got = allreduce(rank, comm=world, mean=True)
    agree(world, np.array_equal(got, np.array([exact]).astype(dtype)), f"{got} is not {exact}")


def test_means_pass_nan_and_inf_on(world, agree):
    x = np.array([np.nan, np.inf, 1], np.float16)
    got = allreduce(x, comm=world, mean=True)
    agree(world, np.array_equal(got, x, equal_nan=True), str(got))


def test_what_has_no_mean(world, agree):
    from mpi4py import MPI

    odd = world.rank == world.size - 1
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (np.ones(3, int), {}, TypeError, "mean=True is for float and complex values; got int64; take x.astype(float)"),
        (np.ones(3, bool), {}, TypeError, "mean=True is for float and complex values; got bool"),
        (np.ones(3), {"op": MPI.MAX}, ValueError, "mean=True is for op=MPI.SUM; got MAX"),
        (np.ones(3), {"mean": "yes"}, TypeError, "mean must be a bool; got str"),
    ]
    for x, named, kind, text in cases:
        error = raised(allreduce, x if odd else np.ones(3), comm=world, **({"mean": True, **named} if odd else {}))
        agree(world, says(error, kind if odd else PeerError, f"allreduce: {text}"), repr(error))
    if world.size > 1:
        error = raised(allreduce, np.ones(3), comm=world, mean=odd)
        agree(world, says(error, MismatchError, "allreduce: ranks disagree on mean"), repr(error))
    agree(world, usable(world))
