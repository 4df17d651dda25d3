"""Sufficient factors by row owners: each rank multiplies the rows that it owns, and hands them to all (Zhang et al.,
"Poseidon", 2017, whose server does that for all rows; Chilimbi et al., "Project Adam", 2014). Exact: no residual.

Over K samples the gradient of a weight (M, N) is uᵀ·v, with u (K, M) and v (K, N), handed over as
``bitring.Factors(u, v)``. On p ranks each owns about M/p rows. A rank gives all others its v, and each the columns of u
that are its rows'; the owner multiplies, the samples in rank order, and gives its rows to all. A rank sends
(p−1)·K·N + (p−1)/p·K·M + (p−1)/p·M·N values, and computes a p-th of what ``sufficient_factors`` does. A parameter
travels so where this is less than the dense exchange's 2(p−1)/p·M·N, and every rank has handed factors over.

Each row is made by one rank, so bits are equal on all ranks whatever their BLAS libraries do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from bitring.arrays import Array, bytes_of
from bitring.compression.factors import Factors
from bitring.compression.reducer import Reducer, Reduction, check_host
from bitring.compression.reducers.sufficient_factors import FactorsReduction

if TYPE_CHECKING:
    from bitring.collectives.interop.steps import Progress, Steps
    from bitring.compression.exchange.exchange import Exchange


@dataclass(frozen=True)
class RowOwners(Reducer):
    """Exchange ``bitring.Factors`` by row owners where that is fewer bytes, all else exactly and densely.

    Host memory only.
    """

    takes_factors = True

    def check(self, flat: Array) -> None:
        """See Reducer."""
        check_host(self, flat)

    def bind(self, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> Reduction:
        """See Reducer."""
        return _Owned(flat, parameters, exchange)


class _Owned(FactorsReduction):
    """No state."""

    def pays(self, samples: int, shape: tuple[int, int]) -> bool:
        """See FactorsReduction."""
        m, n = shape
        return samples * (m / self._exchange.size + n) < m * n

    def multiply(
        self, gathered: list[int], given: dict[int, Factors], samples: dict[int, list[int]], progress: Progress
    ) -> Steps:
        """See FactorsReduction."""
        exchange, itemsize = self._exchange, self._dtype.itemsize
        size, rank = exchange.size, exchange.rank
        rows = {i: [len(self.parameters[i]) * r // size for r in range(size + 1)] for i in gathered}
        counts = [sum(samples[i][r] * self.parameters[i].shape[1] for i in gathered) for r in range(size)]
        vs = yield from self.gather(counts, [given[i].v for i in gathered], progress)

        # Columns of u: the owner's rows.
        out = [sum(samples[i][rank] * (rows[i][r + 1] - rows[i][r]) for i in gathered) for r in range(size)]
        into = [sum(samples[i][r] * (rows[i][rank + 1] - rows[i][rank]) for i in gathered) for r in range(size)]
        sent, room = np.empty(sum(out), self._dtype), np.empty(sum(into), self._dtype)
        with self.stats.during("encode"):
            parts = [given[i].u[:, rows[i][r] : rows[i][r + 1]].reshape(-1) for r in range(size) for i in gathered]
            np.concatenate(parts, out=sent)
        nbytes, taken = ([count * itemsize for count in each] for each in (out, into))
        yield from exchange.deal(bytes_of(sent), nbytes, bytes_of(room), taken, progress)
        ends = np.cumsum([0, *into]).tolist()
        us = [room[start:end] for start, end in pairwise(ends)]

        at_u, at_v = [0] * size, [0] * size
        for i in gathered:
            matrix, first, last = self.parameters[i], rows[i][rank], rows[i][rank + 1]
            with self.stats.during("decode"):
                u = _stacked(us, at_u, samples[i], last - first)
                v = _stacked(vs, at_v, samples[i], matrix.shape[1])
                Factors(u, v).multiply(matrix[first:last])
            progress.moves += 1
            shares = [(end - start) * matrix.shape[1] * itemsize for start, end in pairwise(rows[i])]
            yield from exchange.gather(bytes_of(matrix.reshape(-1)), shares, progress)


def _stacked(parts: Sequence[Array], at: list[int], samples: Sequence[int], width: int) -> Array:
    """The ranks' next rows of ``width`` values, as one matrix; ``at``: where each rank's are, moved on."""
    taken: list[Array] = []
    for r, (part, count) in enumerate(zip(parts, samples, strict=True)):
        taken.append(part[at[r] : at[r] + count * width].reshape(count, width))
        at[r] += count * width
    return np.concatenate(taken)
