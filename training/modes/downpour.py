"""Downpour SGD: ranks train alone for some steps, push what their gradients add up to, and fetch.

Every ``push`` steps a rank pushes the sum of its gradients since the last push, every ``fetch`` steps it takes the
shards' parameters for its own; in between it goes on from its own updates (Dean et al., "Large Scale Distributed Deep
Networks", NIPS 2012). They trained with AdaGrad, at a rate about ten times a fixed one, and began with one replica:
``lone_steps``. With ``fetch`` = ``push`` = 1 on one rank this is the optimizer alone, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.settings import setting
from bitring.training.modes.parameter_server import ParameterServer


@dataclass(frozen=True)
class Downpour(ParameterServer):
    """The parameter server every few steps."""

    fetch: int = setting(5, least=1)
    push: int = setting(5, least=1)
