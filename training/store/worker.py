"""A trainer's rank in a mode of the parameter server: what it pushes and fetches, and when."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitring.collectives.runtime.interrupts import HeldBack
from bitring.compression.factors import Factors
from bitring.training.mode import Running
from bitring.training.optimizer import Optimizer
from bitring.training.optimizers.sgd import SGD
from bitring.training.step.replica import Replica
from bitring.training.store.farewell import at_the_end
from bitring.training.store.table import Table, Update

CHANGES = SGD(lr=1.0)
"""The optimizer of shards that get changes: adds them."""

AHEAD_NBYTES = 256 << 10
"""Of so many bytes of gradients the transfer is worth messages of its own."""


@dataclass(frozen=True)
class Pace:
    """When a worker pushes and fetches: after so many steps each. ``changes``: it pushes what its own optimizer did.

    The first ``lone_steps`` steps are rank 0's alone. ``rounds``: the late is dropped.
    """

    push: int
    fetch: int
    changes: bool
    lone_steps: int
    rounds: bool


class Worker(Running):
    """This rank's. The replica's parameters are changed in place; its optimizer's state is where the shards are."""

    claims = True

    def __init__(self, table: Table, replica: Replica, pace: Pace, rank: int) -> None:
        self._table = table
        self._replica = replica
        self._parameters = parameters = replica.parameters
        self._optimizer = optimizer = replica.optimizer
        self._pace = pace
        self._late = pace.lone_steps > 0 and rank > 0  # until its first step, which waits for the lone ones
        self._steps = 0
        self._accrued: dict[str, Any] = {}
        self._weight = 0.0
        self._alone = pace.changes or max(pace.fetch, pace.push) > 1  # it goes on from its own updates
        self._coming: dict[str, Any] = {}  # of the next step's gradients, what is to be pushed ahead
        self._went: set[str] = set()  # what was
        self.outlives = table.outlives
        self.factors = frozenset[str]() if self._alone else table.factors
        self._slots = optimizer.init(parameters) if self._alone else {}
        self._fetched = {name: np.array(w) for name, w in parameters.items()} if pace.changes else {}
        self._counted: dict[str, Any] = {}
        self._made = 0  # steps, in all
        self._settled: dict[str, Any] | None = None  # what synchronize is to take
        self._forget_slots()
        residuals = table.residuals
        replica.mode_state = {"residual": residuals} if residuals else {}
        if self._slots and not pace.changes:
            replica.mode_state["slots"] = self._slots
        at_the_end(table, self)

    def ahead(self, gradients: Mapping[str, Any]) -> None:
        """See Running. They travel once there are 256 KiB of them."""
        if self._alone or self._late:
            return
        self._coming |= gradients
        if sum(_nbytes(g) for g in self._coming.values()) < AHEAD_NBYTES:
            return
        self._table.wait_for_room()
        with HeldBack():
            if self._table.push_ahead(_contiguous(self._coming)):
                self._went |= self._coming.keys()
            self._coming = {}

    def forget(self) -> None:
        """See Running."""
        with HeldBack():
            self._coming = {}
            self._went = set()
            self._table.forget_ahead()

    def step(self, gradients: Mapping[str, Any], weight: float) -> None:
        """See Running."""
        if self._replica.optimizer is not self._optimizer:
            self._use(self._replica.optimizer)
        self._made += 1
        self._settled = None
        self._forget_slots()
        if self._late:
            self._take(self._table.pull(least=self._pace.lone_steps))
            self._late = False
            return
        pushes = (self._steps + 1) % self._pace.push == 0
        if pushes:  # whoever is interrupted in these waits has not made the step
            if self._pace.fetch > 1:  # else the last fetch has waited for them
                self._table.wait_for_slowest()
            self._table.wait_for_room()
        with HeldBack():
            self._steps += 1
            self.stands = True
            if weight:
                self._accrue(gradients, weight)
        if pushes:
            self._push()
            self._table.tick()
        if self._steps % self._pace.fetch == 0:
            self._fetch()

    def _accrue(self, gradients: Mapping[str, Any], weight: float) -> None:
        """Add a step's gradients to those that wait for the next push; go on from them where no fetch comes."""
        pace = self._pace
        self._weight += weight
        if self._alone:
            with np.errstate(all="ignore"):  # numbers that overflow are found in the next gradients
                self._optimizer.update(dict(self._parameters), gradients, self._slots)
        if pace.changes:
            return
        if pace.push == 1:
            self._accrued = dict(gradients)
        elif self._accrued:
            for name, g in gradients.items():
                self._accrued[name] += g
        else:
            self._accrued = {name: np.array(g) for name, g in gradients.items()}

    def _push(self) -> None:
        self._table.wait_for_room()
        gradients, weight = self._accrued, self._weight
        if self._went:
            gradients = {name: g for name, g in gradients.items() if name not in self._went}
        # An interrupt leaves nothing that would be pushed again.
        self._accrued, self._weight, self._coming, self._went = {}, 0.0, {}, set()
        if weight:
            if self._pace.changes:
                gradients = {name: self._fetched[name] - w for name, w in self._parameters.items()}
                for name, w in self._parameters.items():
                    self._fetched[name][...] = w
            self._table.push(Update(_contiguous(gradients), {}, weight))
        elif self._pace.rounds:
            self._table.push(Update({}, {}, 0.0))

    def _fetch(self) -> None:
        if not self._pace.changes or not self._weight:
            self._take(self._table.pull())
            return
        # What this rank has changed since its last push stays.
        values = self._table.pull()
        with HeldBack():
            for name, w in self._parameters.items():
                own = w - self._fetched[name]
                self._fetched[name][...] = values[name]
                np.add(values[name], own, out=w, casting="same_kind")

    def _take(self, values: Mapping[str, Any]) -> None:
        with HeldBack():
            for name, w in self._parameters.items():
                w[...] = values[name]
                if self._pace.changes:
                    self._fetched[name][...] = values[name]

    def _use(self, optimizer: Optimizer) -> None:
        """Other settings hold from now on."""
        self._optimizer = optimizer
        if not self._pace.changes:
            self._table.use(optimizer)

    def _forget_slots(self) -> None:
        self._replica.optimizer_state = {part: {} for part in self._optimizer.kept}

    def miss(self, text: str) -> None:
        """See Running."""
        self._table.trouble(text, self._made)
        self.step({}, 0.0)

    def told(self) -> str | None:
        """See Running: of this rank's earlier steps, so that ranks with equally many raise at the same one.

        After ``synchronize`` of all.
        """
        return self._table.told(math.inf if self._settled is not None else self._made)

    def claim(self, row: tuple[int, ...]) -> int:
        """See Running."""
        return self._table.claim(row)

    def leave(self) -> None:
        """See Running. What has accrued is pushed."""
        self._late = False
        if self._weight:
            self._push()
        self._table.leave()

    def rest(self) -> None:
        """See Running. What has accrued is pushed, and steps are counted from here on."""
        if self._weight:
            self._push()
        self._steps, self._late = 0, False
        self._settled = self._table.settle()

    def synchronize(self) -> None:
        """See Running."""
        assert self._settled is not None
        self._take(self._settled)

    def gather(self) -> None:
        """See Running. Where changes are pushed the slots are each rank's own."""
        self._replica.optimizer_state = self._slots if self._pace.changes else self._table.slots()

    def reload(self) -> None:
        """See Running."""
        self._accrued, self._weight = {}, 0.0
        self._steps, self._late = 0, False
        self._table.load(self._parameters, {} if self._pace.changes else self._replica.optimizer_state)
        self._take({name: np.array(w) for name, w in self._parameters.items()})
        self._forget_slots()

    def free(self) -> None:
        """See Running."""
        self._table.free()

    @property
    def clocks(self) -> list[float]:
        """See Running."""
        return self._table.clocks

    @property
    def bytes_sent(self) -> int:
        """See Running."""
        return self._table.nbytes_sent

    def telemetry(self) -> dict[str, Any]:
        """See Running: as ``Table.counts``, since the last call."""
        now, before = self._table.counts(), self._counted
        self._counted = now
        result: dict[str, Any] = {}
        for name, x in now.items():
            if isinstance(x, Mapping):
                result[name] = dict(Counter(x) - Counter(before.get(name, {})))
            else:
                result[name] = x - before.get(name, 0)
        return result


def _contiguous(gradients: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: g if isinstance(g, Factors) else np.require(g, requirements=("C", "ALIGNED"))
        for name, g in gradients.items()
    }


def _nbytes(g: Any) -> int:
    nbytes: int = g.u.nbytes + g.v.nbytes if isinstance(g, Factors) else g.nbytes
    return nbytes
