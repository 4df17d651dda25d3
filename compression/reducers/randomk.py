"""Random sparsification with a shared seed, and error feedback (Stich et al., "Sparsified SGD with Memory", 2018).

The buffer is cut into k = ⌈density·n⌉ cells of equal size, to one value. In every run one value of each cell is drawn,
with equal chances, by a seed that all ranks share: the same values everywhere, so that no indexes travel and the drawn
values can be summed. What is not drawn stays in the residual. On average a value waits for 1/density runs, and then
comes with all that has gathered: a learning rate that is near the largest for exact gradients is too large here.

One run sends what an exact AllReduce of k values sends, float32 (float64 for float64 gradients).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitring.arrays import Array, xp_of
from bitring.compression.encoder import residual_dtype
from bitring.compression.exchange.shared_random import words
from bitring.compression.reducer import Reducer, Reduction
from bitring.settings import setting

if TYPE_CHECKING:
    from bitring.collectives.interop.steps import Progress, Steps
    from bitring.compression.exchange.exchange import Exchange


@dataclass(frozen=True)
class RandomK(Reducer):
    """Send a random part of the values, ``density`` of them (0 < density <= 1), chosen anew in every run."""

    density: float = setting(0.1, above=0, most=1)
    seed: int = 0

    def check(self, flat: Array) -> None:
        """See Reducer; any memory will do."""

    def bind(self, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> Reduction:
        """See Reducer."""
        return _Drawn(self, flat, parameters, exchange)


class _Drawn(Reduction):
    """State: ``residual``, n values; ``runs``, how many there were, an int64 in host memory."""

    def __init__(self, settings: RandomK, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> None:
        super().__init__(parameters)
        self._flat = flat
        self._seed = settings.seed
        xp, wide = xp_of(flat), residual_dtype(flat.dtype)
        cells = math.ceil(settings.density * flat.size)
        self._starts = xp.arange(cells, dtype=np.int64) * flat.size // max(cells, 1)
        self._widths = xp.empty(cells, np.uint64)
        self._widths[:-1] = self._starts[1:] - self._starts[:-1]
        self._widths[-1:] = flat.size - self._starts[-1:]
        self._drawn = xp.empty(cells, wide)
        self._sum = exchange.sum(self._drawn)
        self.state = {"residual": xp.zeros(flat.size, wide), "runs": np.zeros(1, np.int64)}
        self.why = f"{cells} of {flat.size} values are summed by {self._sum.algorithm}"

    def steps(self, progress: Progress) -> Steps:
        """See Reduction."""
        residual, runs = self.state["residual"], self.state["runs"]
        with self.stats.during("encode"):
            where = words(self._seed, int(runs[0]), self._widths.size, xp_of(self._flat)) % self._widths
            where = where.astype(np.int64) + self._starts
            residual += self._flat.astype(residual.dtype, copy=False)
            self._drawn[...] = residual[where]
            residual[where] = 0
            runs += 1
        yield from self._sum.steps(progress)
        with self.stats.during("decode"):
            self._flat[...] = 0
            self._flat[where] = self._drawn.astype(self._flat.dtype, copy=False)
