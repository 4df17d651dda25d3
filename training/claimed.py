"""Batches handed out one by one: fast ranks take more of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from bitring.settings import Range, checked
from bitring.training.batches import Batches, checked_samples
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import FreeMode, modes
from bitring.training.store.parameter_store import ParameterStore

_passes: WeakKeyDictionary[Any, dict[tuple[int, int], int]] = WeakKeyDictionary()
"""Of each trainer or store: how often this rank has begun a pass of that seed and epoch."""


def claimed(
    batches: Batches | Iterable[tuple[Any, ...]], of: DataParallel | ParameterStore, *, seed: int = 0, epoch: int = 0
) -> Iterator[tuple[Any, ...]]:
    """The next batch that no rank has taken, as long as there are some: whole batches, each on one rank.

    Ranks take them from a counter in the store of ``of``, a trainer in a mode of the parameter server or a
    ``ParameterStore``; not collective. The samples of a ``Batches`` are first permuted by (seed, epoch), equally on
    every rank, as ``shard`` does it; any other iterable of tuples of equally long arrays must give the same on every
    rank, and what others have taken is skipped. A second pass of the same seed and epoch hands out all batches again.

    Raises ValueError for a trainer in a mode in which all ranks make equally many steps, or that has no store, and
    what ``shard`` raises.
    """
    seed, epoch = (checked("claimed", *each, int, Range(least=0)) for each in (("seed", seed), ("epoch", epoch)))
    if not hasattr(batches, "__iter__"):
        raise TypeError(
            f"claimed: batches must be Batches or an iterable of tuples of arrays, got {type(batches).__name__}"
        )
    if isinstance(of, DataParallel):
        name = modes.name_of(type(of.mode))
        if not isinstance(of.mode, FreeMode):
            raise ValueError(
                f"claimed: in mode {name} all ranks make equally many steps; bitring.shard gives each its part"
            )
        if not of.claims:
            raise ValueError(f"claimed: mode {name} has no store to count in; bitring.shard gives each rank its part")
    elif not isinstance(of, ParameterStore):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"claimed: expected a DataParallel or a ParameterStore, got {type(of).__name__}")
    passes = _passes.setdefault(of, {})
    passes[seed, epoch] = passes.get((seed, epoch), -1) + 1
    row = seed, epoch, passes[seed, epoch]
    numbers = (of.claim(row) for _ in itertools.count())
    return _permuted(batches, numbers, seed, epoch) if isinstance(batches, Batches) else _picked(batches, numbers)


def _permuted(batches: Batches, numbers: Iterator[int], seed: int, epoch: int) -> Iterator[tuple[Any, ...]]:
    order = np.random.default_rng([seed, epoch]).permutation(len(batches.x))
    for number in numbers:
        mine = order[number * batches.size : (number + 1) * batches.size]
        if not mine.size:
            return
        yield batches.x[mine], batches.y[mine]


def _picked(batches: Iterable[tuple[Any, ...]], numbers: Iterator[int]) -> Iterator[tuple[Any, ...]]:
    wanted = next(numbers)
    for number, batch in enumerate(batches):
        if number == wanted:
            checked_samples(f"claimed: batch {number}", batch)
            yield tuple(batch)
            wanted = next(numbers)
