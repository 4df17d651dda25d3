"""PowerSGD's small steps, whose bits must be the same on all ranks: plain loops, in one order, with no fused
multiply-add, whatever the CPU. Products of large matrices, which each rank makes for itself, are BLAS's.

``low_rank_reference`` and ``orthogonalise_reference`` are what they compute, in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.jit import jit


def low_rank_reference(p: Any, q: Any) -> Any:
    """What ``low_rank`` writes to ``out``."""
    return p @ q


def orthogonalise_reference(p: Any) -> Any:
    """What ``orthogonalise`` makes of ``p``, up to signs, when its columns are independent."""
    return np.linalg.qr(p)[0]


@jit
def low_rank(p: Any, q: Any, out: Any) -> None:
    """Out (m, n) = ``p`` (m, r) times ``q`` (r, n)."""
    for i in range(p.shape[0]):
        row = out[i]
        row[:] = 0
        for k in range(p.shape[1]):
            factor, other = p[i, k], q[k]
            for j in range(row.size):
                row[j] += factor * other[j]


@jit
def subtract_low_rank(p: Any, q: Any, out: Any) -> None:
    """Out (m, n) -= ``p`` (m, r) times ``q`` (r, n)."""
    for i in range(p.shape[0]):
        row = out[i]
        for k in range(p.shape[1]):
            factor, other = p[i, k], q[k]
            for j in range(row.size):
                row[j] -= factor * other[j]


@jit
def orthogonalise(p: Any, least: float) -> None:
    """Make the columns of ``p`` (m, r) orthonormal in place, by Gram-Schmidt done twice, with sums in float64.

    A column becomes zeros of which no more than ``least`` of its length is left beside those before it, or that holds
    NaN or infinity.
    """
    m, r = p.shape
    for k in range(r):
        before = 0.0
        for i in range(m):
            before += np.float64(p[i, k]) * np.float64(p[i, k])
        for _ in range(2):
            for j in range(k):
                along = 0.0
                for i in range(m):
                    along += np.float64(p[i, j]) * np.float64(p[i, k])
                for i in range(m):
                    p[i, k] -= along * p[i, j]
        after = 0.0
        for i in range(m):
            after += np.float64(p[i, k]) * np.float64(p[i, k])
        if after > least * least * before and after < np.inf:
            scale = 1.0 / np.sqrt(after)
            for i in range(m):
                p[i, k] *= scale
        else:
            for i in range(m):
                p[i, k] = 0.0


@jit
def unit_rows(q: Any, instead: Any) -> None:
    """Make each row of ``q`` (r, n) one long, in place; of zeros, NaN or infinity it becomes that of ``instead``."""
    for k in range(q.shape[0]):
        row = q[k]
        length = 0.0
        for j in range(row.size):
            length += np.float64(row[j]) * np.float64(row[j])
        if 0.0 < length < np.inf:
            scale = 1.0 / np.sqrt(length)
            for j in range(row.size):
                row[j] *= scale
        else:
            row[:] = instead[k]
