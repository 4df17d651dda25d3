"""Soft synchronisation: the mean of ``gather`` updates is applied, whichever ranks they come from.

With ``gather`` 1 this is asynchronous SGD without scaling; with as many as ranks, and ``staleness=0``, synchronous SGD
(Gupta, Zhang and Wang, "Model Accuracy and Runtime Tradeoff in Distributed Deep Learning", Rudra, ICDM 2016, whose
n-softsync on P ranks gathers P/n). When ranks have finished, fewer are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.settings import setting
from bitring.training.modes.parameter_server import ParameterServer


@dataclass(frozen=True)
class SoftSync(ParameterServer):
    """The parameter server that gathers."""

    gather: int = setting(2, least=1)
