"""What an exchange notes down about a compressed run on this rank."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bitring.arrays import Array, all_finite

SAMPLE = 16
"""Of so many segments one is looked at for the norms of a run; others in the next run."""

_SEGMENT_VALUES = 1 << 16
_PIECE_VALUES = 1 << 13
"""Few enough to stay in the cache, and for BLAS to leave other threads alone."""


@dataclass
class Norms:
    """Squared norms: of the ``values``, of the values with their residual (``sums``), of the new ``residual``."""

    values: float = 0.0
    sums: float = 0.0
    residual: float = 0.0

    def look_before(self, values: Iterable[Array], residual: Iterable[Array]) -> None:
        """Add the norms of pieces of host arrays that are about to be encoded."""
        with np.errstate(over="ignore", invalid="ignore"):
            for x, left in zip(values, residual, strict=True):
                wide = x.astype(np.float64)
                self.values += float(np.vdot(wide, wide))
                wide += left
                self.sums += float(np.vdot(wide, wide))

    def look_after(self, residual: Iterable[Array]) -> None:
        """Add the norm of the new residual of what ``look_before`` was given."""
        for left in residual:
            wide = left.astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                self.residual += float(np.vdot(wide, wide))


@dataclass
class RunStats:
    """What one exchange took on this rank.

    ``seconds`` in all, and of them in ``encode`` and ``decode``; ``bytes_sent`` to other ranks. ``norms``, over a
    sample of the values, of this rank's; ``owner_norms`` of the sums that it encodes as an owner. ``finite``: whether
    all new residuals are.
    """

    seconds: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    bytes_sent: int = 0
    norms: Norms = field(default_factory=Norms)
    owner_norms: Norms = field(default_factory=Norms)
    finite: bool = True

    @contextlib.contextmanager
    def during(self, part: Literal["encode", "decode"]) -> Generator[None]:
        """Count the time of the body in."""
        began = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - began)

    def look_at_all(self, residual: Array) -> None:
        """Note whether all of a new residual, a 1-D host array, is finite."""
        self.finite = self.finite and all_finite(residual)


def samples(x: Array, every: int = 1, first: int = 0) -> list[Array]:
    """Views of ``x``, 1-D: of ``every`` pieces one, from number ``first`` on."""
    return [x[i : i + _PIECE_VALUES] for i in range(first * _PIECE_VALUES, x.size, every * _PIECE_VALUES)]


def sample(x: Array, run: int) -> list[Array]:
    """Pieces from all over ``x``, 1-D: all of a small array, about a sixteenth of a large one, others in each run."""
    every = max(1, min(SAMPLE, x.size // _SEGMENT_VALUES))
    return samples(x, every, run % every)
