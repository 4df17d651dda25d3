"""Asynchronous SGD: each gradient is applied as it comes, at a rate divided by its staleness.

With learning rate λ, an update of staleness τ (versions between its fetch and its application, at least 1) is applied
at λ/τ (Zhang, Gupta, Lian and Liu, "Staleness-aware Async-SGD for Distributed Deep Learning", IJCAI 2016). With
``scale="none"`` at λ, whatever its age: plain asynchronous SGD. On one rank this is SGD, to the bit.

Stale gradients act like momentum: where training wavers, lower the optimizer's first.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.settings import setting
from bitring.training.modes.parameter_server import ParameterServer


@dataclass(frozen=True)
class Asynchronous(ParameterServer):
    """The parameter server that waits for nobody."""

    scale: str = setting("inverse", one_of=("none", "inverse"))
