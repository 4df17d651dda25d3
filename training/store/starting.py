"""The start of a parameter server's mode: its table, and this rank's worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.jointly import jointly
from bitring.compression.compressor import Compressor
from bitring.compression.encoder import Encoder
from bitring.compression.exchange.once_a_node import once_a_node
from bitring.compression.reducers.row_owners import RowOwners
from bitring.training.step.checks import text_of
from bitring.training.step.replica import Replica
from bitring.training.store.making import make_table
from bitring.training.store.replay import Journal
from bitring.training.store.rule import Terms
from bitring.training.store.table import Setup
from bitring.training.store.worker import CHANGES, Pace, Worker

if TYPE_CHECKING:
    from bitring.training.modes.parameter_server import ParameterServer


def start(
    mode: ParameterServer, comm: MPI.Intracomm, replica: Replica, compressors: Mapping[str, Compressor | None]
) -> Worker:
    """See ``ParameterServer.start``. Collective."""
    name = type(mode).__name__
    encoders, factors = jointly(comm, name, lambda: _checked(name, replica.parameters, compressors), (ValueError,))
    once_a_node(context_of(comm), lambda: _warm_up(encoders, replica.parameters), name)
    size, changes = comm.Get_size(), mode.send == "change"
    terms = Terms(min(mode.gather, size), mode.staleness, mode.scale, mode.late)
    setup = Setup(
        comm,
        "DataParallel",
        replica.parameters,
        CHANGES if changes else replica.optimizer,
        terms,
        mode.servers,
        clocks=[0] + [mode.lone_steps] * (size - 1),
        encoders=encoders,
        factors=factors,
        call="step",
        journal=Journal(mode.record, mode.replay),
        copies=mode.copies,
    )
    pace = Pace(mode.push, mode.fetch, changes, mode.lone_steps, mode.late == "drop")
    return Worker(make_table(setup), replica, pace, comm.Get_rank())


def _warm_up(encoders: Mapping[str, Encoder | None], parameters: Mapping[str, Any]) -> None:
    """Compile what encodes, or load it: others would wait for that in their first steps."""
    for name, encoder in encoders.items():
        if encoder is not None:
            w = parameters[name]
            for each in (encoder, encoder.for_shape(w.shape)):
                each.warm_up(w.dtype)


def _checked(
    name: str, parameters: Mapping[str, Any], compressors: Mapping[str, Compressor | None]
) -> tuple[dict[str, Encoder | None], frozenset[str]]:
    """The encoders, and the parameters whose gradients may be factors.

    Raises ValueError for other compressors, and parameters that are not on the host.
    """
    encoders: dict[str, Encoder | None] = {}
    factors: set[str] = set()
    for parameter, w in parameters.items():
        if not isinstance(w, np.ndarray):
            raise ValueError(f"{name}: parameters must be in host memory, as shards are; {parameter!r} is on a device")
        each = compressors[parameter]
        if isinstance(each, RowOwners):
            factors.add(parameter)
            continue
        if each is not None and not isinstance(each, Encoder):
            raise ValueError(
                f"{name}: compression must be an encoder, whose payloads can go to shards, or row_owners; "
                f"got {text_of(each)} for {parameter!r}"
            )
        encoders[parameter] = each
    return encoders, frozenset(factors)
