"""Backup workers: of every round the first ``gather`` updates are averaged, and the late ones dropped.

The ranks beyond ``gather`` are backups for slow ones (Chen, Pan, Monga, Bengio and Jozefowicz, "Revisiting Distributed
Synchronous SGD", 2016). A rank whose update came too late goes on from the newest parameters. Every update that counts
is of the parameters it is applied to, as in ``sync``. Shards close their rounds by themselves. A dropped gradient is
dropped for good; what its payload had taken from the residual of the rank that sent it, where updates travel encoded,
goes back.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.settings import setting
from bitring.training.modes.parameter_server import ParameterServer


@dataclass(frozen=True)
class BackupWorkers(ParameterServer):
    """The parameter server in rounds."""

    gather: int = setting(3, least=1)
    late: str = setting("drop", one_of=("keep", "drop"))
