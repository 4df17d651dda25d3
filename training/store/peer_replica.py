"""One of several replicas that send each other encoded updates: what ``Peers`` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import bytes_of
from bitring.collectives.communicator import Communicator
from bitring.collectives.node.shared_shards import DTYPES
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.interrupts import HeldBack
from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.mailbox import MOST_NUMBERS
from bitring.collectives.runtime.objects import allgather
from bitring.compression.compressor import Compressor
from bitring.compression.encoder import Encoder
from bitring.compression.encoders.threshold import Threshold
from bitring.compression.exchange.once_a_node import once_a_node
from bitring.training.mode import Running
from bitring.training.step.checks import text_of
from bitring.training.step.replica import Replica
from bitring.training.store.farewell import at_the_end
from bitring.training.store.owner import WINDOW, Kind
from bitring.training.store.peer_service import PeerService
from bitring.training.store.service_job import ServiceJob, private_context

_WHERE = "DataParallel: mode peers"


class PeerReplica(Running):
    """``replica`` is this rank's. Collective. Raises ValueError on all ranks for what is not served, which it says.

    The mode's state is ``residual``: name -> array like the parameter, what this rank has not sent yet.
    """

    def __init__(self, comm: MPI.Intracomm, replica: Replica, compressors: Mapping[str, Compressor | None]) -> None:
        self._comm = comm
        self._replica = replica
        self._encoders = jointly(comm, _WHERE, lambda: _checked(replica, compressors), (ValueError,))
        parameters = replica.parameters
        self._residual = {name: np.zeros(w.shape, w.dtype) for name, w in parameters.items()}
        replica.mode_state["residual"] = self._residual
        self._arrived = {name: np.zeros(w.size, w.dtype) for name, w in parameters.items()}  # to be taken off
        self._spare = {name: np.zeros(w.size, w.dtype) for name, w in parameters.items()}  # zeros, to take its place
        self._any_arrived = False
        once_a_node(context_of(comm), self._warm_up, _WHERE)
        context = private_context(comm, _WHERE)
        self._rank = context.rank
        # Not all ranks send to the same one first.
        self._others = [(context.rank + distance) % context.size for distance in range(1, context.size)]
        self._service = PeerService(context, self._take)
        self._sent = [0] * context.size
        self._rests = 0
        self._told_seconds = 0.0
        self._ended = self._closed = False
        self._job = ServiceJob(self._service, context, "DataParallel")
        self._forget = at_the_end(self)

    def _warm_up(self) -> None:
        """Compile what encodes, or load it."""
        for name, encoder in self._encoders.items():
            encoder.warm_up(self._replica.parameters[name].dtype)

    # What the service calls, while no other thread is at it

    def _take(self, payload: Any, nbytes: Any) -> None:
        """Add an update to those that have arrived."""
        begin = 0
        for (name, encoder), used in zip(self._encoders.items(), nbytes.astype(int), strict=True):
            if used:
                encoder.decode(payload[begin : begin + used], self._arrived[name], accumulate=True)
                begin += used
        self._any_arrived = True

    # Steps

    def step(self, gradients: Mapping[str, Any], weight: float) -> None:
        """Encode this rank's update and send it to all others; take it, and what has arrived, off the replica."""
        service = self._service
        self._job.until(self._has_room, "step")
        clock = int(service.clocks[self._rank]) + 1
        with HeldBack():
            if weight:
                payload, nbytes = self._encoded(gradients, clock)
                for rank in self._others:
                    if rank not in service.ended:
                        service.post(rank, Kind.PUSH, clock, nbytes, payload)
                        self._sent[rank] += 1
            else:
                self._tell(Kind.CLOCK, clock)
            service.clocks[self._rank] = float(clock)
            self.stands = True
        self._job.go_on()
        self._apply()

    def _has_room(self) -> bool:
        service = self._service
        full = {rank for rank in self._others if self._sent[rank] - service.taken[rank] >= WINDOW}
        service.lack_room(full - service.ended)
        return not service.without_room

    def _encoded(self, gradients: Mapping[str, Any], seed: int) -> tuple[Any, list[float]]:
        """The payload of an update and the bytes of each parameter in it; what it decodes to is off the replica."""
        pieces: list[Any] = []
        updates = self._updates(gradients)
        for name, encoder in self._encoders.items():
            u = updates[name].reshape(-1)
            if not u.size:
                pieces.append(np.empty(0, np.uint8))
                continue
            payload = np.empty(encoder.nbytes(u.size), np.uint8)
            used = encoder.encode(u, self._residual[name].reshape(-1), payload, seed)
            pieces.append(payload[:used])
            encoder.decode(pieces[-1], u)
            w = self._replica.parameters[name]
            w -= u.reshape(w.shape)
        return np.concatenate(pieces), [float(piece.size) for piece in pieces]

    def _updates(self, gradients: Mapping[str, Any]) -> dict[str, Any]:
        """What the optimizer would take off the parameters: new arrays. Its state goes on."""
        replica = self._replica
        optimizer: Any = replica.optimizer
        decay = optimizer.native_update().weight_decay
        if decay:
            # Its own weight decay would see the zeros that are updated here in the parameters' place.
            optimizer = dataclasses.replace(optimizer, weight_decay=0.0)
            gradients = {name: w * w.dtype.type(decay) + gradients[name] for name, w in replica.parameters.items()}
        changes = {name: np.zeros(w.shape, w.dtype) for name, w in replica.parameters.items()}
        optimizer.update(changes, gradients, replica.optimizer_state)
        for change in changes.values():
            np.negative(change, out=change)
        return changes

    def _apply(self) -> None:
        """Take what has arrived off the replica."""
        if not self._any_arrived:
            return

        def exchanged() -> bool:
            self._arrived, self._spare = self._spare, self._arrived
            self._any_arrived = False
            return True

        with HeldBack():
            engine.undisturbed(exchanged)
            for name, w in self._replica.parameters.items():
                w -= self._spare[name].reshape(w.shape)
                self._spare[name].fill(0)

    def miss(self, text: str) -> None:
        """See Running."""
        service = self._service
        clock = int(service.clocks[self._rank]) + 1
        with HeldBack():
            service.clocks[self._rank] = float(clock)
            self._tell(Kind.CLOCK, clock)
            self._tell(Kind.TROUBLE, 0, np.frombuffer(text.encode(errors="replace"), np.uint8))
            service.troubles.append((clock, text))
        self._job.go_on()

    def told(self) -> str | None:
        """See Running."""
        self._job.go_on()
        troubles = self._service.troubles
        return troubles.popleft()[1] if troubles else None

    def leave(self) -> None:
        """See Running. What others send is applied all the same, in ``synchronize``."""
        if self._ended:
            return
        self._service.clocks[self._rank] = float("inf")
        self._tell(Kind.LEAVE)
        self._job.go_on()

    # All ranks together

    def synchronize(self) -> None:
        """Wait until all that was sent has come and is applied. Replicas differ by rounding then: rank 0's is taken."""
        service = self._service
        self._rests += 1

        def asked() -> bool:
            service.awaiting = {rank for rank in self._others if service.rests[rank] < self._rests} - service.ended
            return True

        engine.undisturbed(asked)
        self._tell(Kind.REST, self._rests)
        self._job.until(lambda: not service.awaiting, "synchronize")
        self._apply()
        comm = Communicator(self._comm)
        for w in self._replica.parameters.values():
            if w.size:
                flat = np.ascontiguousarray(w).reshape(-1)
                comm.Bcast(bytes_of(flat), 0)
                w[...] = flat.reshape(w.shape)

    def reload(self) -> None:
        """See Running."""
        allgather(self._comm, None, _WHERE)

    def end(self) -> bool:
        """See ``farewell.Ends``."""
        if not (self._ended or self._job.over):
            self._ended = True
            self._tell(Kind.END)
            self._service.post(self._rank, Kind.END)
        return not self._job.over

    def free(self, waits: bool = True) -> None:
        """See Running and ``farewell.Ends``."""
        if self._closed:
            return
        if self.end():
            self._job.stay(waits)
        self._closed = True
        self._forget()
        self._job.close()

    @property
    def over(self) -> bool:
        """See ``farewell.Ends``."""
        return self._job.over

    # What is known

    @property
    def bytes_sent(self) -> int:
        """See Running."""
        return self._service.nbytes_sent

    @property
    def clocks(self) -> list[float]:
        """See Running."""
        return list(self._service.clocks)

    def telemetry(self) -> dict[str, Any]:
        """``room_seconds``: waited for ranks that took nothing over, or for all to rest."""
        before, self._told_seconds = self._told_seconds, self._job.waited
        return {"room_seconds": self._told_seconds - before}

    # Messages

    def _tell(self, kind: Kind, serial: int = 0, payload: Any = None) -> None:
        for rank in self._others:
            if rank not in self._service.ended:
                self._service.post(rank, kind, serial, (), payload)


def _checked(replica: Replica, compressors: Mapping[str, Compressor | None]) -> dict[str, Encoder]:
    """The encoder of each parameter. Raises ValueError."""
    optimizer = replica.optimizer
    if optimizer.native_update() is None:
        raise ValueError(f"{_WHERE} is for the optimizers SGD and AdaGrad; got {text_of(optimizer)}")
    if len(replica.parameters) > MOST_NUMBERS:
        raise ValueError(f"{_WHERE} is for up to {MOST_NUMBERS} parameters; got {len(replica.parameters)}")
    encoders: dict[str, Encoder] = {}
    for name, w in replica.parameters.items():
        if not isinstance(w, np.ndarray) or w.dtype not in DTYPES:
            kind = w.dtype.name if isinstance(w, np.ndarray) else type(w).__name__
            raise ValueError(f"{_WHERE}: the parameter {name!r} must be float32 or float64 in host memory, got {kind}")
        compressor = compressors[name] or Threshold()
        if not isinstance(compressor, Encoder):
            raise ValueError(f"{_WHERE}: compression must be an encoder, such as Threshold(); got {compressor!r}")
        encoders[name] = compressor.for_shape(w.shape) if w.size else compressor
    return encoders
