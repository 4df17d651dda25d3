"""Query to an algorithm: one collective on one kind of buffer, and where its ranks are."""

from __future__ import annotations

from dataclasses import dataclass

from bitring.collectives.schedules.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A collective that an algorithm is wanted for; the same on all ranks, so all come to the same answers.

    ``nbytes``: bytes of a rank's buffer, ``itemsize`` of a value. ``own``: whether bitring can serve this combination
    of operation and dtype itself; ``library``: whether the MPI library can, one of which holds. ``host``: whether the
    values are in host memory. ``blocking``: whether the ranks wait for each other now, and may set up what they need.
    ``resident``: whether all ranks' buffers are in memory that their nodes share.
    """

    collective: str
    nbytes: int
    topology: Topology
    own: bool
    library: bool
    itemsize: int = 4
    host: bool = True
    blocking: bool = True
    resident: bool = False

    def unshared(self) -> str | None:
        """The reason why values cannot be reduced through memory that a node's ranks share; None: they can."""
        if not self.host:
            return "the values are on a device"
        if not self.topology.native:
            return "the native engine is not in use"
        if not self.topology.shared:
            return "no ranks share memory"
        return None
