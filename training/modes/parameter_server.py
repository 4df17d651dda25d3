"""The parameter server: values in shards, which ranks push gradients to and fetch from at their own pace.

A rank's step computes nothing for others: it pushes its gradients, and fetches the parameters at the end. The settings
answer three questions (``training/store/rule.py``): when is an update applied, when may a read be served, and what
travels. Other modes are this one, at the settings that a paper gives a name to::

    asynchronous    scale="inverse"                 each as it comes, over its staleness (Zhang et al., IJCAI 2016)
    ssp             staleness=s                     bounded staleness (Ho et al., NIPS 2013)
    soft_sync       gather=S                        the mean of S updates (Gupta et al., Rudra, ICDM 2016)
    backup_workers  gather=S, late="drop"           the first S of a round, the rest dropped (Chen et al., 2016)
    downpour        fetch=n, push=n                 every n steps, with AdaGrad (Dean et al., NIPS 2012)
    project_adam    send="change"                   weight differences (Chilimbi et al., OSDI 2014)

After Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014. Per step and rank each way
as many bytes as the parameters have, less what is on the rank's own shard: as much as an AllReduce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitring.settings import setting
from bitring.training.mode import FreeMode, Running, State

if TYPE_CHECKING:
    from mpi4py import MPI

    from bitring.compression.compressor import Compressor
    from bitring.training.step.replica import Replica


@dataclass(frozen=True)
class ParameterServer(FreeMode):
    """Push and fetch at one's own pace.

    ``gather``: so many updates are applied together, as their mean weighted by samples; at most as many as ranks are
    still at work. ``staleness``: a fetch waits while this rank's clock, the number of its pushes, is more than so many
    ahead of the slowest; None: never. ``scale``: "inverse" divides an update by its staleness, the updates applied
    between its fetch and its application. ``late``: "drop" goes in rounds, of which the first ``gather`` updates count.
    ``fetch``, ``push``: after so many steps each; in between a rank goes on from its own updates, and what it pushes
    is the sum of its gradients since the last push. ``send``: "change" pushes what the rank's own optimizer has
    changed, which is added. ``servers``: so many ranks, the first ones, have shards; None: all. ``lone_steps``: so many
    steps rank 0 makes alone; the other ranks' first step waits for them, and counts for nothing else. ``record``: a
    path; each owner of a shard writes what it does, in order, to ``path.RANK``. ``replay``: such a path; what was done
    is done again in that order, which gives the same bits where ranks compute the same. ``copies``: 1 has another rank
    keep a copy of each shard, and when a rank dies the others go on (``training/store/copied_service.py``).
    """

    gather: int = setting(1, least=1)
    staleness: int | None = setting(None, least=0)
    scale: str = setting("none", one_of=("none", "inverse"))
    late: str = setting("keep", one_of=("keep", "drop"))
    fetch: int = setting(1, least=1)
    push: int = setting(1, least=1)
    send: str = setting("gradient", one_of=("gradient", "change"))
    servers: int | None = setting(None, least=1)
    lone_steps: int = setting(0, least=0)
    record: str | None = None
    replay: str | None = None
    copies: int = setting(0, least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.late == "drop" and self.staleness is not None:
            raise ValueError(f"{name}: late='drop' goes in rounds, and needs staleness=None; got {self.staleness}")
        if self.copies and (self.record or self.replay):
            raise ValueError(f"{name}: copies: whoever takes a shard over writes and follows no record; got both")
        if self.late == "drop" and self.push % self.fetch:
            raise ValueError(
                f"{name}: late='drop' goes in rounds, and needs a fetch after each push; got push={self.push}, "
                f"fetch={self.fetch}"
            )

    def take_over(self, state: State) -> None:
        """Raises ValueError: shards and ranks have begun with the settings that there were."""
        raise ValueError(f"{type(self).__name__}: its settings hold for a trainer's life, got others; make another one")

    def start(self, comm: MPI.Intracomm, replica: Replica, compressors: Mapping[str, Compressor | None]) -> Running:
        """See FreeMode. Raises ValueError for parameters on a device, and compressors that are no encoders."""
        from bitring.training.store.starting import start  # which initialises MPI

        return start(self, comm, replica, compressors)
