"""Project Adam: ranks train alone, and push how their weights have changed, which shards add up.

Weight differences in place of gradients: the optimizer runs on each rank, with its own slots, and a shard only adds.
So pushing costs the shards little, and a rank that fetches keeps what it has changed since its last push (Chilimbi,
Suzue, Apacible and Kalyanaraman, "Project Adam", OSDI 2014). Their dense layers send factors, which is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.settings import setting
from bitring.training.modes.parameter_server import ParameterServer


@dataclass(frozen=True)
class ProjectAdam(ParameterServer):
    """The parameter server that adds changes."""

    send: str = setting("change", one_of=("gradient", "change"))
