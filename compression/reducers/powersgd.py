"""PowerSGD: low-rank gradients by one warm-started power iteration per run (Vogels et al., "PowerSGD: Practical
Low-Rank Gradient Compression for Distributed Optimization", NeurIPS 2019).

A parameter of shape (m, ...) is taken as a matrix of m rows and n columns, M = gradient + residual. With Q (n, r) from
the run before:

1. P = M·Q; the P's of all matrices are summed over the ranks in one exact AllReduce; P̂ is the sum's columns made
   orthonormal, computed by every rank from the same bits;
2. Q = Mᵀ·P̂; residual = M − P̂·Qᵀ; the Q's are summed in a second AllReduce;
3. the sum's approximation is P̂·Qᵀ, and Q, its columns made one long, is the next run's start.

So decoded + all residuals = the sum of all M, to rounding. A gradient that stays the same is approximated better in
each run, towards its best approximation of rank r. Q begins with random numbers that are the same on every rank, and
so does a column of it that has become zero.

Parameters of one dimension, and those with m·n values of no more bytes than the r·(m + n) of P and Q, are summed
exactly and travel with the P's. P and Q are float32, float64 for float64 gradients. Two AllReduces per run, of r·Σm
values and the exact ones, and of r·Σn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from bitring.arrays import Array
from bitring.compression.encoder import residual_dtype
from bitring.compression.exchange.shared_random import uniform
from bitring.compression.reducer import Reducer, Reduction, check_host, unflatten
from bitring.settings import setting

if TYPE_CHECKING:
    from bitring.collectives.interop.steps import Progress, Steps
    from bitring.compression.exchange.exchange import Exchange

_BLOCK_VALUES = 16 << 10
"""16-bit results are made in float32 so many at a time, before they are rounded."""


@dataclass(frozen=True)
class PowerSGD(Reducer):
    """Approximate each matrix of the gradients by one of rank ``matrix_rank`` (at least 1). Host memory only."""

    matrix_rank: int = setting(4, least=1)
    seed: int = setting(0, least=0)

    def check(self, flat: Array) -> None:
        """See Reducer."""
        check_host(self, flat)

    def bind(self, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> Reduction:
        """See Reducer."""
        return _LowRank(self, flat, parameters, exchange)

    def columns(self, shape: tuple[int, ...], dtype: Any) -> int:
        """The columns of P and Q for a parameter; 0 where it is summed exactly."""
        if len(shape) < 2:
            return 0
        m, n = shape[0], math.prod(shape[1:])
        r = min(self.matrix_rank, m, n)
        return r if r * (m + n) * residual_dtype(dtype).itemsize < m * n * np.dtype(dtype).itemsize else 0


@dataclass
class _Matrix:
    values: Array
    """(m, n), in the buffer."""
    residual: Array
    """(m, n)."""
    p: Array
    """(m, r), in what is summed first."""
    q: Array
    """(r, n), in what is summed second: Q's transpose."""
    start: Array
    """(r, n), the transpose of the next run's Q."""
    fresh: Array
    """(r, n), random."""


class _LowRank(Reduction):
    """State: ``residual``, n values, and for each matrix ``warm_start/NUMBER``, (r, columns), Q's transpose."""

    def __init__(self, settings: PowerSGD, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> None:
        super().__init__(parameters)
        wide = residual_dtype(flat.dtype)
        residual = np.zeros(flat.size, wide)
        residuals = unflatten(residual, [values.shape for values in parameters])
        columns = [settings.columns(values.shape, flat.dtype) for values in parameters]
        self._exact = [values for values, r in zip(parameters, columns, strict=True) if not r]
        firsts = [values.shape for values in self._exact]
        seconds: list[tuple[int, int]] = []
        for values, r in zip(parameters, columns, strict=True):
            if r:
                firsts.append((len(values), r))
                seconds.append((r, values.size // len(values)))
        first, second = (np.empty(sum(map(math.prod, shapes)), wide) for shapes in (firsts, seconds))
        self._exact_wide = unflatten(first, firsts)[: len(self._exact)]
        factors = zip(unflatten(first, firsts)[len(self._exact) :], unflatten(second, seconds), strict=True)
        self.state = {"residual": residual}
        self._matrices: list[_Matrix] = []
        for number, (values, left, r) in enumerate(zip(parameters, residuals, columns, strict=True)):
            if not r:
                continue
            p, q = next(factors)
            fresh = uniform(settings.seed, number, q.size).astype(wide).reshape(q.shape)
            start = self.state[f"warm_start/{number}"] = fresh.copy()
            shape = len(p), q.shape[1]
            self._matrices.append(_Matrix(values.reshape(shape), left.reshape(shape), p, q, start, fresh))
        self._least = 16 * float(ml_dtypes.finfo(wide).eps)
        self._wide = wide
        self._whole = exchange.sum(flat) if not self._matrices else None
        self._first = exchange.sum(first) if self._matrices else None
        self._second = exchange.sum(second) if self._matrices else None
        self.why = (
            f"{len(self._matrices)} of {len(parameters)} parameters travel as {first.size + second.size} of "
            f"{flat.size} values, the others exactly, summed by {exchange.algorithms}"
        )
        if self._matrices and exchange.size > 1:
            exchange.once_a_node(lambda: warm_up(wide))

    def steps(self, progress: Progress) -> Steps:
        """See Reduction."""
        # Imported late: who only asks for settings does not need Numba.
        from bitring.compression.kernels.powersgd_numba import orthogonalise, subtract_low_rank, unit_rows

        if self._whole is not None:
            yield from self._whole.steps(progress)
            return
        assert self._first is not None and self._second is not None
        with self.stats.during("encode"), np.errstate(over="ignore", invalid="ignore"):
            for values, wide in zip(self._exact, self._exact_wide, strict=True):
                wide[...] = values
            for each in self._matrices:
                each.residual += each.values.astype(self._wide, copy=False)
                np.matmul(each.residual, each.start.T, out=each.p)
        yield from self._first.steps(progress)
        with self.stats.during("encode"), np.errstate(over="ignore", invalid="ignore"):
            for each in self._matrices:
                orthogonalise(each.p, self._least)
                np.matmul(each.p.T, each.residual, out=each.q)
                subtract_low_rank(each.p, each.q, each.residual)
        yield from self._second.steps(progress)
        with self.stats.during("decode"):
            for values, wide in zip(self._exact, self._exact_wide, strict=True):
                values[...] = wide
            for each in self._matrices:
                self._approximate(each)
                each.start[...] = each.q
                unit_rows(each.start, each.fresh)

    def _approximate(self, matrix: _Matrix) -> None:
        """Write P̂·Qᵀ to the buffer."""
        from bitring.compression.kernels.powersgd_numba import low_rank

        values, p, q = matrix.values, matrix.p, matrix.q
        if values.dtype == self._wide:
            low_rank(p, q, values)
            return
        m, n = values.shape
        rows = max(1, _BLOCK_VALUES // n)
        scratch = np.empty((min(rows, m), n), self._wide)
        for i in range(0, m, rows):
            part = scratch[: min(rows, m - i)]
            low_rank(p[i : i + rows], q, part)
            values[i : i + rows] = part


def warm_up(dtype: Any) -> None:
    """Compile the kernels, or load them from the cache."""
    from bitring.compression.kernels import powersgd_numba as kernels

    p, q, out = np.ones((2, 1), dtype), np.ones((1, 2), dtype), np.zeros((2, 2), dtype)
    kernels.orthogonalise(p, 0.0)
    kernels.low_rank(p, q, out)
    kernels.subtract_low_rank(p, q, out)
    kernels.unit_rows(q, q.copy())
