"""Stale synchronous parallel: nobody waits, unless it is ``staleness`` clocks ahead of the slowest.

A fetch at clock c sees all updates of clocks up to c − staleness − 1, of all ranks, and all of its own (Ho et al.,
"More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013). With staleness 0 all
ranks wait for each other in every step, though updates are applied one by one; with ``gather`` as many as ranks it is
synchronous SGD.

It takes up passing delays of some ranks, not a rank that is always slow: in the long run all make equally many steps.
Their proof has a rate that falls with the square root of steps · (staleness + 1) · ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.settings import setting
from bitring.training.modes.parameter_server import ParameterServer


@dataclass(frozen=True)
class SSP(ParameterServer):
    """The parameter server with bounded staleness."""

    staleness: int | None = setting(3, least=0)
