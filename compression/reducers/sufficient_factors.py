"""Sufficient factors: a dense layer's gradient travels as its error and its activation (Xie et al., "Distributed
Machine Learning via Sufficient Factor Broadcasting", UAI 2016; Zhang et al., "Poseidon", 2017). Exact: no residual.

Over K samples the gradient of a weight (M, N) is uᵀ·v, with u (K, M) and v (K, N). Rank r hands over
``bitring.Factors(u, v)`` of its K_r samples. All ranks gather all factors, by one allgather for all parameters, and
each multiplies them out, the samples in rank order: Σ_r u_rᵀ·v_r.

All ranks send (p−1)·ΣK·(M+N) values in that allgather, and 2(p−1)·M·N in a dense AllReduce. So a parameter travels as
factors where ΣK·(M+N) < 2·M·N and every rank has handed factors over (a rank without samples hands over K = 0), which
the ranks find out by exchanging their K's, eight bytes per parameter. Any other is multiplied out, and summed densely.

The product is the BLAS library's: bits are equal on ranks with the same library, kind of CPU, and number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from bitring.arrays import Array, all_finite, bytes_of
from bitring.compression.factors import Factors
from bitring.compression.reducer import Reducer, Reduction, check_host

if TYPE_CHECKING:
    from bitring.collectives.interop.steps import Progress, Steps, StepsTo
    from bitring.compression.exchange.exchange import ExactSum, Exchange

_DENSE = -1


@dataclass(frozen=True)
class SufficientFactors(Reducer):
    """Exchange ``bitring.Factors`` where that is fewer bytes, all else exactly and densely. Host memory only."""

    takes_factors = True

    def check(self, flat: Array) -> None:
        """See Reducer."""
        check_host(self, flat)

    def bind(self, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> Reduction:
        """See Reducer."""
        return FactorsReduction(flat, parameters, exchange)


def pays(samples: int, shape: tuple[int, int]) -> bool:
    """Whether factors to all are fewer bytes than the dense exchange of a parameter."""
    m, n = shape
    return samples * (m + n) < 2 * m * n


class FactorsReduction(Reduction):
    """All gather all factors. No state."""

    def __init__(self, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> None:
        super().__init__(parameters)
        self._exchange = exchange
        self._dtype = flat.dtype
        self._matrices = [i for i, values in enumerate(parameters) if values.ndim == 2 and values.size]
        self._others = [values for values in parameters if values.ndim != 2]
        self._given: dict[int, Factors] = {}
        self._samples = np.empty((exchange.size, len(self._matrices)), np.int64)
        self._room = np.empty(0, np.uint8)
        self._whole = exchange.sum(flat)
        # For runs in which some travel as factors, and others do not.
        self._single: dict[int, ExactSum] = {}
        self._rest = np.empty(0, flat.dtype)
        self._rest_sum: ExactSum | None = None
        if self._matrices:
            self._single = {i: exchange.sum(parameters[i].reshape(-1)) for i in self._matrices}
            self._rest = np.empty(sum(values.size for values in self._others), flat.dtype)
            self._rest_sum = exchange.sum(self._rest)
        self.why = (
            f"{len(self._matrices)} of {len(parameters)} parameters may travel as factors; "
            f"the others are summed by {exchange.algorithms}"
        )

    def pays(self, samples: int, shape: tuple[int, int]) -> bool:
        """Whether factors of ``samples`` samples in all are fewer bytes than the dense exchange of a parameter."""
        return pays(samples, shape)

    def take(self, number: int, factors: Factors) -> None:
        """See Reduction."""
        if number in self._matrices:
            self._given[number] = factors
        else:
            super().take(number, factors)

    def drop(self) -> None:
        """See Reduction."""
        self._given = {}

    def finish(self) -> None:
        """See Reduction."""
        given, self._given = self._given, {}
        for number, factors in given.items():
            factors.multiply(self.parameters[number])

    def finite(self) -> bool:
        """See Reduction."""
        given = self._given
        dense = (values for i, values in enumerate(self.parameters) if i not in given)
        return all(all_finite(values.reshape(-1)) for values in dense) and all(
            all_finite(np.ravel(factors.u)) and all_finite(np.ravel(factors.v)) and not factors.overflows()
            for factors in given.values()
        )

    def steps(self, progress: Progress) -> Steps:
        """See Reduction."""
        given, self._given = self._given, {}
        gathered: list[int] = []
        if self._matrices:
            self._samples[self._exchange.rank] = [len(given[i].u) if i in given else _DENSE for i in self._matrices]
            counts = [self._samples[0].nbytes] * self._exchange.size
            yield from self._exchange.gather(bytes_of(self._samples.reshape(-1)), counts, progress)
            for i, samples in zip(self._matrices, self._samples.T, strict=True):
                if samples.min() >= 0 and self.pays(int(samples.sum()), self.parameters[i].shape):
                    gathered.append(i)
        with self.stats.during("encode"):
            for i, factors in given.items():
                if i not in gathered:
                    factors.multiply(self.parameters[i])
        if not gathered:
            yield from self._whole.steps(progress)
            return
        each = dict(zip(self._matrices, self._samples.T.tolist(), strict=True))
        yield from self.multiply(gathered, given, each, progress)
        for i in self._matrices:
            if i not in gathered:
                yield from self._single[i].steps(progress)
        if self._rest.size and self._rest_sum is not None:
            with self.stats.during("encode"):
                np.concatenate([values.reshape(-1) for values in self._others], out=self._rest)
            yield from self._rest_sum.steps(progress)
            with self.stats.during("decode"):
                start = 0
                for values in self._others:
                    values[...] = self._rest[start : start + values.size].reshape(values.shape)
                    start += values.size

    def gather(self, counts: list[int], mine: list[Array], progress: Progress) -> StepsTo[list[Array]]:
        """All ranks' values, ``counts[r]`` of rank r, as flat arrays; ``mine``: this rank's."""
        exchange, itemsize = self._exchange, self._dtype.itemsize
        if self._room.size < sum(counts) * itemsize:
            self._room = np.empty(sum(counts) * itemsize, np.uint8)
        ends = np.cumsum([0, *counts]) * itemsize
        parts = [self._room[start:end].view(self._dtype) for start, end in pairwise(ends.tolist())]
        if counts[exchange.rank]:
            with self.stats.during("encode"):
                np.concatenate([np.ravel(each) for each in mine], out=parts[exchange.rank])
        yield from exchange.gather(self._room, [count * itemsize for count in counts], progress)
        return parts

    def multiply(
        self, gathered: list[int], given: dict[int, Factors], samples: dict[int, list[int]], progress: Progress
    ) -> Steps:
        """Gather the factors of these parameters, and multiply them out. ``samples[i][r]``: of parameter and rank."""
        size = self._exchange.size
        counts = [sum(samples[i][r] * sum(self.parameters[i].shape) for i in gathered) for r in range(size)]
        parts = yield from self.gather(counts, [x for i in gathered for x in (given[i].u, given[i].v)], progress)
        at = [0] * size
        with self.stats.during("decode"):
            for i in gathered:
                stacked: list[Array] = []
                for width in self.parameters[i].shape:
                    taken: list[Array] = []
                    for r, part in enumerate(parts):
                        count = samples[i][r] * width
                        taken.append(part[at[r] : at[r] + count].reshape(-1, width))
                        at[r] += count
                    stacked.append(np.concatenate(taken))
                Factors(*stacked).multiply(self.parameters[i])
                progress.moves += 1
