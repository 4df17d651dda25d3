"""Compiled loops for host memory, where NumPy would pass over large arrays several times.

``layers.py`` holds what each computes in array operations, for CuPy and as the reference; the results are equal, bit
for bit. Compiled at the first call and kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from bitring.kernel_cache import with_cache


def _compiled(function: Callable[..., None]) -> Any:
    return with_cache(numba.njit(nogil=True)(function), function)


@_compiled
def pool(x: Any, y: Any, where: Any) -> None:
    """Writes the largest of each 2×2 square of ``x`` (N, H, W, C) to ``y``, and to ``where`` (int8) which it was."""
    n, h, w, c = y.shape
    one, two, three = where.dtype.type(1), where.dtype.type(2), where.dtype.type(3)
    for s in range(n):
        for i in range(h):
            for j in range(w):
                # Slices of one dimension: with plain index offsets the compiler does not vectorise.
                v0, v1, v2, v3 = (
                    x[s, 2 * i, 2 * j],
                    x[s, 2 * i, 2 * j + 1],
                    x[s, 2 * i + 1, 2 * j],
                    x[s, 2 * i + 1, 2 * j + 1],
                )
                largest, index = y[s, i, j], where[s, i, j]
                for t in range(c):
                    best, at = v0[t], where.dtype.type(0)
                    # v != v: NaN is passed on.
                    v = v1[t]
                    better = (v > best) | (v != v)
                    best, at = (v if better else best), (one if better else at)
                    v = v2[t]
                    better = (v > best) | (v != v)
                    best, at = (v if better else best), (two if better else at)
                    v = v3[t]
                    better = (v > best) | (v != v)
                    best, at = (v if better else best), (three if better else at)
                    largest[t] = best
                    index[t] = at


@_compiled
def unpool(dy: Any, where: Any, dx: Any) -> None:
    """Writes each value of ``dy`` to its place in ``dx``, as ``pool`` noted it, and zeros to its square's others."""
    n, h, w, c = dy.shape
    zero = dy.dtype.type(0)
    for s in range(n):
        for i in range(h):
            for j in range(w):
                d, index = dy[s, i, j], where[s, i, j]
                for m in range(4):
                    place = where.dtype.type(m)
                    target = dx[s, 2 * i + m // 2, 2 * j + m % 2]
                    for t in range(c):
                        target[t] = d[t] if index[t] == place else zero


@_compiled
def fold(neighbours: Any, dx: Any, padding: int) -> None:
    """Sums ``neighbours`` (N, H + 2·padding − K + 1, W + 2·padding, K, C) to the ``dx`` (N, H, W, C) behind them."""
    n, h_out, _, k, _ = neighbours.shape
    _, h, w, c = dx.shape
    for s in range(n):
        for i in range(h):
            row = i + padding
            for j in range(w):
                target = dx[s, i, j]
                target[:] = 0
                for m in range(max(0, row - h_out + 1), min(k, row + 1)):
                    source = neighbours[s, row - m, j + padding, m]
                    for t in range(c):
                        target[t] += source[t]
