"""Arrays that the ranks of a node update and read where they are, in memory that all of them map: there is no server.

Whoever has a gradient runs the optimizer's kernel itself, block by block under locks of 64 KiB of values; so nothing is
lost, and ranks that are at different blocks do not wait for each other. Without locks it is HOGWILD! (Recht et al.,
2011).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.steps import Progress, StepsTo
from bitring.collectives.node.held import Holders
from bitring.collectives.node.node_group import NodeGroup, Part
from bitring.collectives.node.shared_words import SharedWords
from bitring.native import address_of, extension, type_of

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
"""Of values that there are kernels for."""

_ALIGN = 128

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and dtype of each array."""

_ALL = np.zeros(1, np.int64)


class SharedShards:
    """``arrays``: name -> the one array of all ranks. ``slots``: slot -> name -> the optimizer's array beside it.

    To look at them is racy; ``read`` is not. ``words``: numbers that go with them.
    """

    def __init__(
        self,
        memory: Any,
        layout: Layout,
        slots: tuple[str, ...],
        words: int,
        own: Mapping[str, Any] | None,
        rank: int,
        size: int,
        holders: Holders,
        what: str,
    ) -> None:
        """``memory``: bytes that all ranks map, ``nbytes_of`` the rest; ``own``: arrays that are shared already."""
        self._holders = holders
        self._what = what
        self.words = SharedWords(memory, words, rank, size, holders, what)
        self.arrays: dict[str, Any] = dict(own or {})
        self.slots: dict[str, dict[str, Any]] = {slot: {} for slot in slots}
        self._shards: dict[str, Any] = {}
        self._updaters: dict[tuple[Any, ...], Any] = {}
        at = _aligned(SharedWords.nbytes(words))
        for name, (shape, dtype) in layout.items():
            n = math.prod(shape)
            nbytes = n * dtype.itemsize
            locks = memory[at : at + extension.Shard.locks_nbytes(nbytes)]
            at = _aligned(at + locks.nbytes)
            if own is None:
                self.arrays[name] = memory[at : at + nbytes].view(dtype).reshape(shape)
                at = _aligned(at + nbytes)
            for arrays in self.slots.values():
                arrays[name] = memory[at : at + nbytes].view(dtype).reshape(shape)
                at = _aligned(at + nbytes)
            slot = address_of(self.slots[slots[0]][name]) if slots else 0
            values = self.arrays[name]
            self._shards[name] = extension.Shard(
                rank, size, address_of(values), slot, n, dtype.itemsize, address_of(locks), (memory, values)
            )
        # Ranks begin with different arrays, since small ones have one lock.
        names = list(layout)
        first = rank * len(names) // size
        self._order = names[first:] + names[:first]

    def update(
        self,
        gradients: Mapping[str, Any],
        rule: tuple[str, float, float, float, float],
        starts: Mapping[str, Any] | None = None,
        locked: bool = True,
    ) -> None:
        """Update arrays, and their slot, in place from ``gradients``: name -> C-contiguous array of the array's dtype.

        ``rule``: the kernel's name, learning rate, momentum, weight decay and eps. ``starts``: name -> int64 places in
        the flat array, ascending, of equally long runs of values: the gradient has these and no others. What is not in
        it is whole. Without ``locked`` it is racy.
        """
        for name in self._order:
            if name in gradients:
                g = gradients[name]
                updater = self._updater(rule, g.dtype)
                places, width = _runs(g, None if starts is None else starts.get(name))
                shard = self._shards[name]
                step = extension.ShardPass.update(shard, places, width, address_of(g), locked, updater)
                self._holders.until_over(step.run, shard.bury, self._what)

    def read(self, into: Mapping[str, Any], starts: Mapping[str, Any] | None = None, locked: bool = True) -> None:
        """Copy arrays into those of ``into``, block by block: name -> C-contiguous array.

        ``starts`` and ``locked`` as in ``update``.
        """
        for name in self._order:
            if name in into:
                out = into[name]
                places, width = _runs(out, None if starts is None else starts.get(name))
                shard = self._shards[name]
                step = extension.ShardPass.read(shard, places, width, address_of(out), locked)
                self._holders.until_over(step.run, shard.bury, self._what)

    def _updater(self, rule: tuple[str, float, float, float, float], dtype: Any) -> Any:
        key = (*rule, dtype)
        found = self._updaters.get(key)
        if found is None:
            if len(self._updaters) > 64:  # a learning rate that falls with every step
                self._updaters.clear()
            kind = type_of(dtype)
            assert kind is not None
            found = self._updaters[key] = extension.Updater(extension.Rule[rule[0]], kind, *rule[1:])
        return found


def _runs(values: Any, starts: Any) -> tuple[Any, int]:
    """Where the runs begin, and how many values each has."""
    if starts is None:
        return _ALL, values.size
    return starts, values.size // starts.size if starts.size else 0


def _aligned(nbytes: int) -> int:
    return (nbytes + _ALIGN - 1) // _ALIGN * _ALIGN


def nbytes_of(layout: Layout, slots: tuple[str, ...], words: int, with_arrays: bool) -> int:
    """Bytes of the memory of shards."""
    total = _aligned(SharedWords.nbytes(words))
    for shape, dtype in layout.values():
        nbytes = math.prod(shape) * dtype.itemsize
        total += _aligned(extension.Shard.locks_nbytes(nbytes)) + (len(slots) + with_arrays) * _aligned(nbytes)
    return total


def new_shards(
    group: NodeGroup | None,
    comm: MPI.Intracomm,
    layout: Layout,
    slots: tuple[str, ...],
    words: int,
    own: Mapping[str, Any] | None,
    limit: float,
    what: str,
    progress: Progress,
) -> StepsTo[SharedShards | None]:
    """Shards of the ranks of ``comm``, a node's, zeroed; None where there is no memory. A job's steps.

    ``group``: theirs; None for a rank alone. ``own``: arrays that are one on all ranks already (``NodeGroup.unite``),
    else they are made. ``slots``: the optimizer's, one at most. ``words``: so many numbers beside them. ``limit``:
    seconds after which a wait for a lock is an error. ``what``: who waits, for messages.
    """
    nbytes = nbytes_of(layout, slots, words, own is None)
    rank = comm.Get_rank()
    if group is None:
        memory = np.zeros(nbytes + _ALIGN, np.uint8)
        memory = memory[-address_of(memory) % _ALIGN :][:nbytes]
    else:
        region = yield from group.new_region(comm, nbytes if rank == 0 else 0, progress)
        if region is None:
            return None
        memory = np.asarray(Part(region, 0, nbytes))
    holders = Holders(group, rank, limit)
    return SharedShards(memory, layout, slots, words, own, rank, comm.Get_size(), holders, what)
