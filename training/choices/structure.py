"""For each parameter the exchange that takes the least predicted time (Zhang et al., "Poseidon", 2017).

What is weighed: the dense sum by the best algorithm; the factors of a dense layer's gradient to all ranks, which
multiply them (``bitring.SufficientFactors``), or to the owners of its rows (``bitring.RowOwners``); and an encoder, if
one is allowed. Seconds are those of ``bitring predict``. In modes of a parameter server the owners are those of shards,
and factors to all are not weighed; with ``begin`` and ``ready`` that is Poseidon's combination: wait-free,
structure-aware, and under bounded staleness.

Where messages and computing cost nothing, factors win by Poseidon's structure-aware inequality: with K samples per rank
and a weight (M, N) on p ranks, (p−1)·K·(M+N) < 2(p−1)/p·M·N. Exact, unless an encoder is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitring.compression.compressor import Compressor, parsed
from bitring.compression.encoder import Encoder
from bitring.compression.reducers.row_owners import RowOwners
from bitring.compression.reducers.sufficient_factors import SufficientFactors
from bitring.models.architecture import LayerTable
from bitring.settings import setting
from bitring.training.choice import Choice, Picked
from bitring.training.prediction.cluster import BUILT_IN, Cluster, read_machine
from bitring.training.prediction.predict import exchange_seconds

FACTORS, OWNERS = "sufficient_factors", "row_owners"


@dataclass(frozen=True)
class Structure(Choice):
    """Dense, factors, or ``encoder`` (a name such as "onebit", without its settings), by predicted seconds.

    ``batch``: samples per rank in a step, on which the factors' size depends; matrices are taken to have factors, and
    are summed densely where they are not given as such. ``bandwidth``: bytes per second out of a node, ``latency``:
    seconds per message between nodes; where either is None both are measured when the trainer is made. ``machine``: a
    file of ``bitring bench compress --json``, which rank 0 reads for how fast it computes; "built_in": the machine on
    which bitring is developed. Raises OSError and ValueError, when the trainer is made, for another file.
    """

    batch: int = setting(64, least=1)
    encoder: str = "none"
    bandwidth: float | None = setting(None, above=0)
    latency: float | None = setting(None, least=0)
    machine: str = "built_in"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._encoder()

    def _encoder(self) -> Compressor | None:
        if self.encoder == "none":
            return None
        made = parsed(self.encoder, "Structure")
        if not isinstance(made, Encoder):
            raise ValueError(f"Structure: encoder must be an encoder's name, or none; got {self.encoder!r}")
        return made

    def given_network(self) -> tuple[float, float] | None:
        """See Choice."""
        return None if self.latency is None or self.bandwidth is None else (self.latency, self.bandwidth)

    def pick(
        self, shapes: Mapping[str, tuple[int, ...]], cluster: Cluster, by_owners: bool = False
    ) -> dict[str, Picked]:
        """See Choice. By owners it takes as many bytes as an exchange in which all ranks take part."""
        encoder = self._encoder()
        machine = BUILT_IN if self.machine == "built_in" else read_machine(Path(self.machine))
        compressors: dict[str, Compressor | None] = {"exact": None, OWNERS: RowOwners()}
        if not by_owners:
            compressors[FACTORS] = SufficientFactors()
        if encoder is not None:
            compressors[self.encoder] = encoder
        picked: dict[str, Picked] = {}
        for name, shape in shapes.items():
            kind, factors = ("dense", 1) if len(shape) == 2 else ("norm", 0)
            layer = LayerTable(name, kind, ((name, tuple(shape)),), 0, factors)
            seconds = exchange_seconds(layer, cluster, machine, self.batch, compressors)
            picked[name] = Picked(compressors[min(seconds, key=lambda each: seconds[each])], seconds)
        return picked
