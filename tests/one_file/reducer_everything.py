"""All values, summed exactly: the smallest reducer there is, to begin another from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitring.arrays import Array
from bitring.compression.encoder import residual_dtype
from bitring.compression.reducer import Reducer, Reduction

if TYPE_CHECKING:
    from bitring.collectives.interop.steps import Progress, Steps
    from bitring.compression.exchange.exchange import Exchange


@dataclass(frozen=True)
class Everything(Reducer):
    """Sum all values, in float32 (float64 for float64 values)."""

    def check(self, flat: Array) -> None:
        """See Reducer; any memory will do."""

    def bind(self, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> Reduction:
        """See Reducer."""
        return _Summed(flat, parameters, exchange)


class _Summed(Reduction):
    """No state."""

    def __init__(self, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> None:
        super().__init__(parameters)
        self._flat = flat
        self._wide = flat.astype(residual_dtype(flat.dtype))
        self._sum = exchange.sum(self._wide)
        self.why = f"all {flat.size} values are summed by {self._sum.algorithm}"

    def steps(self, progress: Progress) -> Steps:
        """See Reduction."""
        with self.stats.during("encode"):
            self._wide[...] = self._flat
        yield from self._sum.steps(progress)
        with self.stats.during("decode"):
            self._flat[...] = self._wide.astype(self._flat.dtype)
