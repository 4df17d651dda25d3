"""What a rank has of a model under a placement, and what its steps are made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.collectives.runtime.objects import allgather
from bitring.errors import NonFiniteError, PeerError
from bitring.models.model import Model
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import FreeMode
from bitring.training.placement.assignment import IN_TURNS, Placed, Shapes, assign
from bitring.training.placement.messages import Messages, Way
from bitring.training.placement.native_messages import NativeMessages, serves
from bitring.training.placement.parts import Part, local_parameters, parts_of
from bitring.training.placement.placement import Placement
from bitring.training.placement.predicted import Traffic, predicted
from bitring.training.placement.schedules import SCHEDULES, StageTask, Task, in_turns
from bitring.training.placement.shared_sums import SharedSums
from bitring.training.placement.split_pass import SplitPass
from bitring.training.placement.step_hops import StepHops
from bitring.training.placement.whole_state import WholeState
from bitring.training.placement.wiring import Wiring
from bitring.training.tree import host_copy, leaves

_SIZES = 4
"""Of so many batch sizes what carries out the conversions is kept."""


class Replica(NamedTuple):
    """Where a rank is: ``number`` of ``replicas``, and ``rank`` in it; its ranks are ``ranks`` of ``comm``."""

    comm: MPI.Intracomm
    number: int
    replicas: int
    ranks: tuple[int, ...]
    rank: int


class Split:
    """``model``, as ``placement`` splits it in a replica, whose values travel by ``way``. Making it is collective.

    ``settings`` are DataParallel's, for the exchange between replicas.
    """

    def __init__(self, replica: Replica, model: Model, way: Way, placement: Any, settings: Any) -> None:
        self.placement = placement
        rank, shapes = replica.rank, way.shapes
        self.placed: list[Placed] = assign(placement, model.nodes, shapes, len(replica.ranks))
        self.wiring = wiring_of(placement, self.placed, shapes)
        self.parts: dict[str, Part] = parts_of(self.placed)
        mine = {
            name: np.ascontiguousarray(each.of(model.parameters[name], rank)).copy()
            for name, each in self.parts.items()
            if rank in each.ranks
        }
        local = local_parameters(self.placed, mine, model.parameters, rank)
        self.mine = {name: w for name, w in mine.items() if w.size}
        self.passes = SplitPass(self.wiring, model, local, rank, _tasks(placement, self.wiring, rank))
        self.sums = SharedSums(replica.comm, replica.number, rank, self.parts, mine)
        self._way, self._comm = way, replica.comm
        self._exchanges: dict[int, tuple[StepHops, Messages | NativeMessages]] = {}
        self._across = Communicator(replica.comm).Split(rank, replica.number)
        self.trainer: DataParallel | None = None
        self._free_mode = isinstance(settings["mode"], FreeMode)
        trained = self.mine
        if self._free_mode:  # one rank of a replica talks to the store of a parameter, and tells the others
            trained = {name: w for name, w in self.mine.items() if rank in self.parts[name].keepers}
        if trained:
            self.trainer = DataParallel(trained, comm=self._across, **settings)
        self._trained = trained
        self.whole = WholeState(replica.comm, replica.number, rank, self.parts, model.parameters, self.trainer)

    def exchange(self, samples: int) -> tuple[StepHops, Messages | NativeMessages]:
        """What carries out the conversions of a step of so many samples; made once for each of a few batch sizes."""
        if samples not in self._exchanges:
            if len(self._exchanges) == _SIZES:
                del self._exchanges[next(iter(self._exchanges))]
            hops = StepHops(self.wiring, samples)
            made = NativeMessages if serves(self._way, hops) else Messages
            self._exchanges[samples] = hops, made(self._way, hops)
        return self._exchanges[samples]

    def by(self, samples: int) -> str:
        """How values travel, in words."""
        encoder = self._way.encoder
        words = f"messages by {self.exchange(samples)[1].runs_in}"
        return words if encoder is None else f"{words}, as {encoder}"

    def gradients(self) -> dict[str, Any]:
        """Of this rank's parts, after a step's passes, summed over the replica's ranks that have them. Collective."""
        found = self.passes.gradients
        gradients = {name: found[name] if name in found else np.zeros_like(w) for name, w in self.mine.items()}
        self.sums.add(gradients)
        return gradients

    def update(self, gradients: dict[str, Any], weight: float, where: str, may_raise: bool) -> None:
        """The exchange between replicas, and the update. Collective, in free modes on the replica's ranks alone.

        ``may_raise``: an update may end in the middle of it, on some of the ranks: then all are as they were before.
        """
        if may_raise and not self._free_mode:
            self._update_jointly(gradients, weight, where)
        else:
            self._step(gradients, weight)
        if self._free_mode:
            self.sums.tell(self.mine)

    def _step(self, gradients: dict[str, Any], weight: float) -> None:
        if self.trainer is not None:
            self.trainer.step({name: gradients[name] for name in self._trained}, weight=weight)

    def _update_jointly(self, gradients: dict[str, Any], weight: float, where: str) -> None:
        """Those that exchange one part do not hear of what fails in another; so all meet once more."""
        trainer, problem = self.trainer, None
        before = {} if trainer is None else {path: host_copy(x) for path, x in leaves(trainer.live())}
        steps = 0 if trainer is None else trainer.steps
        try:
            self._step(gradients, weight)
        except Exception as error:
            problem = error
        if not any(allgather(self._comm, problem is not None, where)):
            return
        if trainer is not None and problem is None:
            trainer.restore(before, steps)
            for plan in trainer.plans:
                plan.undo()
        first = None if isinstance(problem, PeerError) else problem  # an error is best told by the rank that had it
        for told in (first, problem):
            raise_everywhere(self._comm, where, told, alike=(NonFiniteError,))

    def synchronize(self) -> None:
        """Make the replicas equal. Collective, but for mode ``sync``."""
        if self.trainer is not None:
            self.trainer.synchronize()
        if self._free_mode:
            self.sums.tell(self.mine)

    def take(self, state: Mapping[str, Any], steps: int) -> None:
        """Go on from a whole state, see ``WholeState``. Collective."""
        self.whole.take(state, steps)
        if self._free_mode:
            self.sums.tell(self.mine)

    def free(self) -> None:
        """Free plans and communicators. Collective."""
        if self.trainer is not None:
            self.trainer.free()
        self.sums.free()
        self._across.Free()


def wiring_of(placement: object, placed: list[Placed], shapes: Shapes) -> Wiring:
    """The wiring of nodes that were placed so."""
    microbatches = [1] * (1 + max(each.stage for each in placed))
    if isinstance(placement, Placement):
        microbatches = [placement.microbatches] * len(microbatches)
    elif placement == IN_TURNS:
        microbatches[1:] = [len(placed[0].takes.ranks)] * (len(microbatches) - 1)
    return Wiring(placed, shapes, microbatches)


def refuse_mixing(wiring: Wiring, replicas: int) -> None:
    """Raise ValueError where a layer that looks at all samples of a batch together would get a part of them."""
    for node, stage, _, takes, _ in wiring.placed:
        parts = len(takes.ranks) if takes.kind == "samples" else 1
        for words, count in (("replicas", replicas), ("micro-batches", wiring.microbatches[stage]), ("ranks", parts)):
            if node.layer.mixes_samples and count > 1:
                raise ValueError(
                    f"ModelParallel: {node.name} ({type(node.layer).__name__}) computes over all samples of a batch, "
                    f"and would get those of {count} {words} one by one: results would depend on the placement. Put it "
                    "on one rank, without replicas or micro-batches"
                )


def _tasks(placement: object, wiring: Wiring, rank: int) -> list[StageTask]:
    """A rank's, in order."""
    if isinstance(placement, Placement):
        tasks = SCHEDULES[placement.schedule](rank, len(wiring.microbatches), placement.microbatches)
        return [StageTask(rank, task) for task in tasks]
    if len(wiring.microbatches) > 1:
        return in_turns(wiring.microbatches[1])
    return [StageTask(0, Task(backward, 0)) for backward in (False, True)]


def predicted_of(model: Model, way: Way, placement: Any, replicas: int, samples: int) -> Traffic:
    """What a step sends under ``placement`` in a replica that gets so many samples."""
    ranks, shapes = len(way.ranks), way.shapes
    placed = assign(placement, model.nodes, shapes, ranks)
    whole = {name: w.shape for name, w in model.parameters.items()}
    wiring = wiring_of(placement, placed, shapes)
    return predicted(wiring, parts_of(placed), whole, ranks, replicas, samples, model.dtype.itemsize, way.encoder)
