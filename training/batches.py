"""Batches, and cutting each of them into one part for every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bitring.settings import Range, checked

Array = Any  # numpy.ndarray, cupy.ndarray, or anything with len() and slices


class HasRank(Protocol):
    """A communicator, as far as ``shard`` knows one."""

    @property
    def rank(self) -> int:
        """This process's rank."""
        ...

    @property
    def size(self) -> int:
        """The world size."""
        ...


@dataclass(frozen=True, eq=False)
class Batches:
    """The samples (x, y), ``size`` at a time; the last batch may be short. Iterating starts anew each time.

    ``size`` counts the samples of all ranks together. Raises TypeError or ValueError when x and y are not arrays of
    equal length or the size is not positive.
    """

    x: Array
    y: Array
    size: int = 64

    def __post_init__(self) -> None:
        checked_samples("Batches", (self.x, self.y))
        object.__setattr__(self, "size", checked("Batches", "size", self.size, int, Range(least=1)))

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for first in range(0, len(self.x), self.size):
            yield self.x[first : first + self.size], self.y[first : first + self.size]


def shard(
    batches: Batches | Iterable[tuple[Array, ...]], comm: HasRank, seed: int = 0, epoch: int = 0, start: int = 0
) -> Iterator[tuple[Array, ...]]:
    """This rank's part of every batch, so that all ranks make equally many steps; no communication.

    The part of rank r in a batch of b samples is b·r // p to b·(r + 1) // p, and may be empty. The samples of a
    ``Batches`` are first permuted by (seed, epoch), equally on every rank and for every world size, so the same global
    batches come on any number of ranks. Any other iterable of tuples of equally long arrays is cut in the order in
    which it comes, which must be the same on every rank; its parts are views. The first ``start`` batches are left out,
    so that a run can go on in the middle of an epoch. Raises TypeError or ValueError when a batch is something else, or
    the seed, epoch or start is negative.
    """
    seed, epoch, start = (
        checked("shard", name, number, int, Range(least=0))
        for name, number in (("seed", seed), ("epoch", epoch), ("start", start))
    )
    if not hasattr(batches, "__iter__"):
        raise TypeError(
            f"shard: batches must be Batches or an iterable of tuples of arrays, got {type(batches).__name__}"
        )
    try:
        rank, size = comm.rank, comm.size
    except Exception:  # MPI's own for MPI.COMM_NULL
        raise TypeError(
            f"shard: comm must be a communicator such as MPI.COMM_WORLD, got {type(comm).__name__}"
        ) from None
    if isinstance(batches, Batches):
        return _permuted(batches, rank, size, seed, epoch, start)
    return _cut(batches, rank, size, start)


def _part(samples: int, rank: int, size: int) -> slice:
    return slice(samples * rank // size, samples * (rank + 1) // size)


def _permuted(batches: Batches, rank: int, size: int, seed: int, epoch: int, start: int) -> Iterator[tuple[Array, ...]]:
    order = np.random.default_rng([seed, epoch]).permutation(len(batches.x))
    for first in range(start * batches.size, len(order), batches.size):
        chosen = order[first : first + batches.size]
        mine = chosen[_part(len(chosen), rank, size)]
        yield batches.x[mine], batches.y[mine]


def _cut(batches: Iterable[tuple[Array, ...]], rank: int, size: int, start: int) -> Iterator[tuple[Array, ...]]:
    for number, batch in enumerate(itertools.islice(batches, start, None), start):
        part = _part(checked_samples(f"shard: batch {number}", batch), rank, size)
        yield tuple(array[part] for array in batch)


def checked_samples(what: str, arrays: Any) -> int:
    """The common length of ``arrays``. Raises TypeError or ValueError, beginning with ``what``, when there is none."""
    if not isinstance(arrays, (tuple, list)) or not arrays:
        raise TypeError(f"{what}: expected a tuple of arrays, such as (x, y), got {type(arrays).__name__}")
    for array in arrays:
        if not getattr(array, "shape", None):
            raise TypeError(f"{what}: expected arrays with a first axis of samples, got {type(array).__name__}")
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(f"{what}: arrays must have equal lengths, got {', '.join(str(length) for length in lengths)}")
    return lengths[0]
