"""A bucket: gradients packed into one flat buffer, which is what travels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from mpi4py import MPI

from bitring.compression.compressor import Compressor
from bitring.compression.plan import plan_allreduce


class Bucket:
    """Gradients of some parameters of one dtype, packed into ``flat``; ``views`` are its parts, by name."""

    def __init__(self, parameters: Mapping[str, Any], compressed: bool, empty: Callable[[int, Any], Any]) -> None:
        first = next(iter(parameters.values()))
        ends = list(accumulate(array.size for array in parameters.values()))
        self.compressed = compressed
        self.starts = [0, *ends[:-1]]
        self.flat = empty(ends[-1], first.dtype)
        self.shapes = {name: array.shape for name, array in parameters.items()}
        self.views = dict(self.cut(self.flat))

    def cut(self, flat: Any) -> list[tuple[str, Any]]:
        """Name and part of an array as large as the bucket, each part of the parameter's shape."""
        return [
            (name, flat[start : start + math.prod(shape)].reshape(shape))
            for (name, shape), start in zip(self.shapes.items(), self.starts, strict=True)
        ]

    def plan(self, comm: MPI.Intracomm, algorithm: str, compression: Compressor | None) -> Any:
        """A plan on this bucket. Collective."""
        return plan_allreduce(
            self.flat,
            comm=comm,
            algorithm=algorithm,
            compression=compression,
            boundaries=self.starts,
            shapes=list(self.shapes.values()),
            check_finite=False,  # the trainer has looked at every gradient
        )
