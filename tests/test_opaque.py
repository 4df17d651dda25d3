"""Buffers that only the MPI library reads: what can be told of them is compared with what the other ranks ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.interop.opaque import Opaque, opaque
from bitring.errors import MismatchError


@pytest.fixture
def types() -> Iterator[dict[str, MPI.Datatype]]:
    made = {
        "pair": MPI.DOUBLE.Create_contiguous(2),
        "pairs": MPI.DOUBLE.Create_contiguous(2).Create_vector(2, 1, 3),
        "struct": MPI.Datatype.Create_struct([1, 1], [0, 8], [MPI.DOUBLE, MPI.INT]),
    }
    for datatype in made.values():
        datatype.Commit()
    yield made
    for datatype in made.values():
        datatype.Free()


@pytest.mark.single
def test_what_can_be_told(types):
    x, double = np.zeros(12), np.dtype(float)
    assert opaque([x, 3, types["pair"]], "f", "x") == Opaque(double, 6, 48)
    assert opaque([x, 1, types["pair"]], "f", "x", blocks=4) == Opaque(double, 8, 64)
    assert opaque([x, types["pair"]], "f", "x") == Opaque(double, 12, 96)
    assert opaque([x, (1, 2), types["pairs"]], "f", "x") == Opaque(double, 4, 32)
    assert opaque([x, 2, types["struct"]], "f", "x") == Opaque(None, None, 24)
    pairs = np.zeros(4, [("value", "f4"), ("index", "i4")])
    assert opaque([pairs, MPI.FLOAT_INT], "f", "x") == Opaque("MPI_FLOAT_INT", 4, 32)
    assert opaque(pairs, "f", "x") == Opaque(None, None, 32)
    assert opaque([MPI.BOTTOM, 2, types["pair"]], "f", "x") == Opaque(double, 4, 32)


@pytest.fixture(params=["given", "apart"])
def world(request: pytest.FixtureRequest, comm: Any) -> Communicator:
    return request.getfixturevalue("apart") if request.param == "apart" else Communicator(comm)


def differing(comm: Communicator, types: dict[str, MPI.Datatype]) -> dict[str, tuple[Callable[[], None], str]]:
    """Calls in which the last rank asks for something else, and the term in which it does."""
    size, odd, pair = comm.Get_size(), comm.Get_rank() == comm.Get_size() - 1, types["pair"]
    x, y, all_of = np.ones(4), np.zeros(4), np.zeros((size, 4))
    pairs = np.zeros(4, [("value", "f4"), ("index", "i4")])
    located = [pairs, MPI.FLOAT_INT], [pairs.copy(), MPI.FLOAT_INT]
    return {
        "a derived datatype under another operation": (
            lambda: comm.Allreduce([x, 2, pair], [y, 2, pair], MPI.SUM) if odd else comm.Allreduce(x, y, MPI.MAX),
            "op",
        ),
        "pairs, of which all only the library reads": (
            lambda: comm.Allreduce(*located, MPI.MINLOC if odd else MPI.MAXLOC),
            "op",
        ),
        "fewer bytes": (lambda: comm.Bcast([y, 1, pair]) if odd else comm.Bcast(y), "nbytes"),
        "fewer blocks of bytes": (
            lambda: comm.Allgather(*([x, 1, pair], [all_of, 1, pair]) if odd else (x, all_of)),
            "nbytes",
        ),
        "another count": (
            lambda: comm.Reduce([x, 1, pair], [y, 1, pair]) if odd else comm.Reduce(x, y),
            "count",
        ),
        "another dtype": (
            lambda: (
                comm.Reduce_scatter_block([np.ones((size, 4)), 2, pair], [y, 2, pair])
                if odd
                else comm.Reduce_scatter_block(np.ones((size, 4), np.float32), y.astype(np.float32))
            ),
            "dtype",
        ),
        "another root": (lambda: comm.Bcast([y, 2, pair], 1) if odd else comm.Bcast(y, 0), "root"),
    }


def test_ranks_that_differ(world, agree, types):
    """Before, the library was called with what each had, which made wrong numbers, or broke the communicator."""
    if world.size == 1:
        return
    for name, (call, term) in differing(world, types).items():
        said = "no error"
        try:
            call()
        except MismatchError as error:
            said = str(error)
        agree(world, f"ranks disagree on {term}" in said, f"{name}: {said}")
    total = np.empty(4)
    world.Allreduce(np.ones(4), total)
    agree(world, bool((total == world.size).all()), f"afterwards: {total}")


def test_other_words_for_the_same(world, agree, types):
    """One rank gives derived datatypes for what the others give as arrays, in another memory order too."""
    odd, size = world.rank == world.size - 1, world.size
    for order in ("C", "F"):
        y = np.array(np.full((2, 2), float(world.rank)), order=order)
        flat = y.reshape(-1, order="A")
        world.Bcast([flat, 2, types["pair"]] if odd else y, 0)
        agree(world, bool((y == 0).all()), f"Bcast: {y}")
        mine = np.array([[0, 1], [2, 3]], np.float64, order=order) + world.rank
        gathered = np.empty((size, 4))
        world.Allgather([mine.reshape(-1, order="A"), 2, types["pair"]] if odd else mine.reshape(-1), gathered)
        sums = gathered.sum(axis=1)
        agree(world, bool((sums == 6 + 4 * np.arange(size)).all()), f"Allgather: {gathered}")
    packed = np.zeros(24, np.uint8)
    world.Bcast([np.zeros(32, np.uint8), 2, types["struct"]] if odd else packed, 0)
    agree(world, True)
