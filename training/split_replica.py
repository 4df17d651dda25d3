"""A replica of Sandblaster's that several ranks make up: a model split between them, as a placement says.

One of them, the leader, is what the coordinator knows: it is given portions, and has the whole gradients. It calls the
others for each portion, and says when the step is over; meanwhile they wait in ``follow``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.errors import MismatchError, NonFiniteError, PeerError
from bitring.models.model import Model
from bitring.training.model_parallel import ModelParallel
from bitring.training.optimizer import Elementwise, cannot_raise

_CALL = "Sandblaster.step"


@dataclass(frozen=True)
class Kept(Elementwise):
    """An optimizer that changes no parameter, and keeps the gradient."""

    @property
    def slots(self) -> tuple[str, ...]:
        """``gradient``: the last one."""
        return ("gradient",)

    @cannot_raise
    def apply(self, w: Any, g: Any, slots: Mapping[str, Any], t: Any, u: Any) -> None:
        """Keep a run of values."""
        slots["gradient"][...] = g


class SplitReplica:
    """This rank's part of a replica. ``comm``: all ranks', of which it takes equal runs. Making it is collective."""

    def __init__(self, model: Model, placement: Any, replicas: int, comm: MPI.Intracomm) -> None:
        self.model = model
        self.comm = Communicator(comm).Split(comm.Get_rank() * replicas // comm.Get_size())
        self._split = ModelParallel(model, Kept(), comm=self.comm, placement=placement)
        self._state = self._split.state_dict()
        self.leads = self.comm.Get_rank() == 0
        self._fresh = False  # whether all of its ranks have the model's parameters
        self._inside = False  # it computes: what is raised there is raised on all of them

    def require_alike(self, data: tuple[float, ...]) -> None:
        """Raise MismatchError on all ranks of the replica where one gives other ``data``. Collective in it."""
        everyone = allgather(self.comm, data, _CALL)
        others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
        if others:
            raise MismatchError(f"{_CALL}: ranks {others} of a split replica gave other samples than its first rank")

    def renew(self) -> None:
        """The model has other parameters now."""
        self._fresh = False

    def compute(self, portion: int, piece: Any) -> tuple[float, dict[str, Any]]:
        """The leader's: mean loss and gradients of a portion, with the model's parameters, by all ranks together.

        Where a gradient is no number the loss is none, and gradients are zero. Raises what ``ModelParallel.step`` does,
        on all ranks of the replica.
        """
        self._inside = True
        values = None if self._fresh else self.model.parameters
        broadcast(self.comm, (portion, values), _CALL)
        result = self._step(piece, values)
        self._inside = False
        return result

    def end(self, error: BaseException | None) -> None:
        """The leader's: its step is over, by an error or not. Where all have it, they need not be told."""
        inside, self._inside = self._inside, False
        if not inside:
            broadcast(self.comm, None if error is None else type(error).__name__, _CALL)

    def follow(self, pieces: list[Any]) -> None:
        """The others': compute with the leader until its step is over. Raises PeerError where an error has ended it."""
        while (said := broadcast(self.comm, None, _CALL)) is not None:
            if isinstance(said, str):
                raise PeerError(f"{_CALL}: the rank that leads this rank's replica has left it by {said}")
            portion, values = said
            self._step(pieces[portion], values)

    def _step(self, piece: Any, values: Mapping[str, Any] | None) -> tuple[float, dict[str, Any]]:
        if values is not None:
            self._split.load_state_dict({**self._state, "parameters": values})
            self._fresh = True
        try:
            loss = self._split.step(*piece)
        except NonFiniteError:
            return np.nan, {name: np.zeros_like(w) for name, w in self.model.parameters.items()}
        return loss, self._split.state_dict()["optimizer"]["gradient"]

    def free(self) -> None:
        """Collective in the replica."""
        self._split.free()
        self.comm.Free()
