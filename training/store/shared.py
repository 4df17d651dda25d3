"""A store's values once in the memory of a node: every rank applies its updates itself, and reads; nothing travels.

For stores whose updates are applied as they come (``gather`` 1), by an optimizer with a native kernel, on the ranks of
one node. All is as by ``messages``; only the order of updates, and so their rounding, may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitring.collectives.interop.steps import Progress, StepsTo
from bitring.collectives.node.shared_shards import DTYPES, SharedShards, new_shards
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import agreed_job, allgather
from bitring.collectives.runtime.watch import timeout
from bitring.native import native
from bitring.training.optimizer import Optimizer
from bitring.training.store.members import Members
from bitring.training.store.table import Setup, Table, Update


def serves(setup: Setup) -> bool:
    """Whether a store can live in shared memory; the same on all ranks, when the context is prepared."""
    context = context_of(setup.comm)
    return (
        native() is not None
        and (context.size == 1 or context.common is not None)
        and setup.terms.gather == 1
        and setup.terms.late == "keep"
        and setup.servers is None
        and not setup.copies
        and not any(setup.encoders.values())
        and not any(setup.journal)
        and setup.optimizer.native_update() is not None
        and all(w.dtype in DTYPES for w in setup.values.values())
    )


class SharedTable(Table):
    """A table where ``serves`` says so. Collective to make. Raises MemoryError on all ranks without enough memory."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        what, slots, size = setup.what, setup.optimizer.slots, self._size
        self._optimizer = setup.optimizer
        context = context_of(setup.comm)
        group, limit = context.common, timeout()
        layout = {name: (w.shape, w.dtype) for name, w in setup.values.items()}

        def steps(progress: Progress) -> StepsTo[SharedShards | None]:
            words = Members.count(size)
            return new_shards(group, context.node.comm, layout, slots, words, None, limit, what, progress)

        shards = agreed_job(context, steps, what)
        if shards is None:
            raise MemoryError(f"{what}: there is no shared memory for its values; the log says why")
        self._shards = shards
        self._members = Members(shards.words, self._rank, size, group, limit, what)
        self._members.begin(0 if setup.clocks is None else setup.clocks[self._rank])
        self._left = self._ended = self._over = False
        self._seen = 0  # the version last read
        if self._rank == 0:
            self._fill(setup.values)
        allgather(setup.comm, None, what)

    def _fill(self, values: Mapping[str, Any]) -> None:
        for name, w in self._shards.arrays.items():
            w[...] = values[name]

    def wait_for_room(self) -> None:
        """See Table: there is."""

    def push(self, update: Update) -> None:
        """See Table. It is applied at once."""
        self._raise_if_ended()
        rule = self._optimizer.native_update()
        assert rule is not None
        if not update.gradients:
            return
        staleness = self._members.count_update(self._seen)
        gradients, starts = dict(update.gradients), dict[str, Any]()
        for name, rows in update.rows.items():
            w = self._shards.arrays[name]
            starts[name] = rows * (w.size // len(w) if len(w) else 0)
        if self._terms.scale == "inverse" and staleness > 1:
            gradients = {name: g * g.dtype.type(1 / staleness) for name, g in gradients.items()}
        self._shards.update(gradients, rule, starts)

    def tick(self) -> None:
        """See Table."""
        self._raise_if_ended()
        self._members.tick()

    def pull(self, wanted: Mapping[str, Any] | None = None, least: int | None = None) -> dict[str, Any]:
        """See Table."""
        self._raise_if_ended()
        bound = least
        if bound is None and self._terms.staleness is not None and not self._left:
            bound = int(self._members.clocks[self._rank]) - self._terms.staleness
        if bound is not None:
            self._members.wait_for_clocks(bound, "get")
        return self._read(dict.fromkeys(self._shards.arrays) if wanted is None else wanted)

    def _raise_if_ended(self) -> None:
        if self._ended:
            raise RuntimeError(f"{self._what}: it has been freed")

    def _read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        self._seen = self._members.version
        result: dict[str, Any] = {}
        starts: dict[str, Any] = {}
        for name, rows in wanted.items():
            w = self._shards.arrays[name]
            if rows is None:
                result[name] = np.empty(w.shape, w.dtype)
            else:
                result[name] = np.empty((len(rows), *w.shape[1:]), w.dtype)
                starts[name] = rows * (w.size // len(w) if len(w) else 0)
        self._shards.read(result, starts)
        return result

    def wait_for_clocks(self, least: int) -> None:
        """See Table."""
        self._raise_if_ended()
        self._members.wait_for_clocks(least, "clock")

    def leave(self) -> None:
        """See Table."""
        self._left = True
        self._members.leave()

    def settle(self) -> dict[str, Any]:
        """See Table."""
        self._raise_if_ended()
        values: dict[str, Any] = {}
        self._members.meet("synchronize", lambda: values.update(self._read(dict.fromkeys(self._shards.arrays))))
        return values

    def slots(self) -> dict[str, dict[str, Any]]:
        """See Table."""
        found: dict[str, dict[str, Any]] = {}

        def copied() -> None:
            for slot, arrays in self._shards.slots.items():
                found[slot] = {name: x.copy() for name, x in arrays.items()}

        self._members.meet("synchronize", copied)
        return found

    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> None:
        """See Table."""

        def filled() -> None:
            if self._rank == 0:
                self._fill(values)
                for slot, arrays in self._shards.slots.items():
                    for name, x in arrays.items():
                        x[...] = slots[slot][name]

        self._members.meet("load", filled)

    def use(self, optimizer: Optimizer) -> None:
        """See Table."""
        self._optimizer = optimizer

    def claim(self, row: tuple[int, ...]) -> int:
        """See Table."""
        self._raise_if_ended()
        return self._members.claim(row)

    def trouble(self, text: str, step: int) -> None:
        """See Table."""
        self._members.trouble(text, step)

    def told(self, step: float) -> str | None:
        """See Table."""
        return self._members.told(step)

    def end(self) -> bool:
        """See Table: nobody needs more than the memory."""
        self._ended = True
        self._members.end()
        return False

    def free(self, waits: bool = True) -> None:
        """See Table."""
        self.end()
        if waits and not self._over:
            self._members.wait_for_ends("free")
        self._over = True

    @property
    def over(self) -> bool:
        """See Table."""
        return self._over

    @property
    def clocks(self) -> list[float]:
        """See Table."""
        return self._members.clocks

    @property
    def ended(self) -> list[int]:
        """See Table."""
        return self._members.ended

    @property
    def residuals(self) -> dict[str, Any]:
        """See Table: nothing is encoded."""
        return {}

    @property
    def nbytes_sent(self) -> int:
        """See Table: nothing travels."""
        return 0

    def counts(self) -> dict[str, Any]:
        """See Table: of the one shard that there is, and that every rank has."""
        return {
            "wait_seconds": self._members.waited,
            "waited_for": dict(self._members.waited_for),
            "staleness": self._members.staleness,
            "applied": self._members.version,
            "dropped": 0,
        }
