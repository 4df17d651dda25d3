"""A bucket: gradients packed into one flat buffer, which is what travels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.arrays import xp_of
from bitring.collectives.base_plan import Plan
from bitring.compression.compressor import Compressor
from bitring.compression.plans.plan import plan_allreduce
from bitring.native import address_of, extension, native, type_of
from bitring.training.step.bucket_sizes import Size, bucket_sizes, kind_of, largest_bucket

TOGETHER_VALUES = 1 << 15
"""Neighbours of so many values in all are packed in one call, which is what they mostly cost; larger arrays alone."""


class Run(NamedTuple):
    """Neighbours in a bucket, or one large array: their place in the buffer, and their names."""

    start: int
    stop: int
    names: tuple[str, ...]


class Bucket:
    """Gradients of some parameters of one dtype, packed into ``flat``; ``views`` are its parts, by name.

    ``compressor``: what they travel by; None for exact sums.
    """

    def __init__(
        self, parameters: Mapping[str, Any], compressor: Compressor | None, empty: Callable[[int, Any], Any]
    ) -> None:
        first = next(iter(parameters.values()))
        ends = list(accumulate(array.size for array in parameters.values()))
        self.compressor = compressor
        self.starts = [0, *ends[:-1]]
        self.flat = empty(ends[-1], first.dtype)
        self.shapes = {name: array.shape for name, array in parameters.items()}
        self.views = dict(self.unflatten(self.flat))
        self.runs = _runs(list(parameters), self.starts, ends)
        self.wide = np.float64 if first.dtype == np.float64 else np.float32
        self._xp = xp_of(first)
        self._packer: Any = None
        kind = type_of(first.dtype)
        if native() is not None and kind is not None and self._xp is np and first.dtype == self.wide:
            self._packer = extension.Packer(kind, address_of(self.flat), list(self.shapes.values()), self.flat)

    @property
    def compressed(self) -> bool:
        """Whether the gradients do not travel exactly."""
        return self.compressor is not None

    def unflatten(self, flat: Any) -> list[tuple[str, Any]]:
        """Name and part of an array as large as the bucket, each part of the parameter's shape."""
        return [
            (name, flat[start : start + math.prod(shape)].reshape(shape))
            for (name, shape), start in zip(self.shapes.items(), self.starts, strict=True)
        ]

    def plan(self, comm: MPI.Intracomm, algorithm: str, compression: Compressor | None) -> Plan:
        """A plan that sums this bucket over all ranks. Collective."""
        return plan_allreduce(
            self.flat,
            comm=comm,
            algorithm=algorithm,
            compression=compression,
            shapes=list(self.shapes.values()),
            check_finite=False,  # the trainer has looked at every gradient
        )

    def packed(self, arrays: Mapping[str, Any], run: Run) -> Any:
        """The values of ``arrays`` in ``run``: packed in the buffer, or a large array as it is."""
        if len(run.names) == 1:
            return arrays[run.names[0]]
        part = self.flat[run.start : run.stop]
        self._xp.concatenate([arrays[name] for name in run.names], axis=None, out=part)
        return part

    def load(self, arrays: Mapping[str, Any], scale: float, minus: Mapping[str, Any] | None, packed: bool) -> None:
        """Fill the buffer with scale·(arrays − minus); ``packed``: ``packed`` has seen these arrays already.

        16-bit values are scaled in float32 and rounded once.
        """
        xp = self._xp
        factor = np.float32(scale) if self.flat.dtype.itemsize == 2 else scale
        for run in self.runs:
            part = self.flat[run.start : run.stop]
            if minus is not None:
                for name in run.names:
                    xp.subtract(arrays[name], minus[name], out=self.views[name])
            elif len(run.names) == 1:
                xp.multiply(arrays[run.names[0]], factor, out=self.views[run.names[0]], casting="same_kind")
                continue
            elif not packed:
                self.packed(arrays, run)
            if scale != 1:
                xp.multiply(part, factor, out=part, casting="same_kind")

    @property
    def packs(self) -> bool:
        """Whether ``pack`` may do it."""
        return self._packer is not None

    def pack(self, arrays: Mapping[str, Any], scale: float) -> bool | None:
        """Fill the buffer with scale·arrays, in one pass. Returns whether all values are finite.

        None where that cannot be done so, and nothing was: it is for contiguous arrays of the parameters' shapes and
        dtype, ``load`` for any.
        """
        if self._packer is None:
            return None
        finite: int = self._packer.pack([arrays[name] for name in self.shapes], scale)
        return None if finite < 0 else bool(finite)

    def gather(self, arrays: Mapping[str, Any]) -> None:
        """Copy all of the bucket's ``arrays`` to the buffer."""
        self._xp.concatenate([arrays[name] for name in self.shapes], axis=None, out=self.flat)

    def scatter(self, arrays: Mapping[str, Any]) -> None:
        """Copy the buffer to the ``arrays``."""
        for name, view in self.views.items():
            arrays[name][...] = view


def _runs(names: list[str], starts: list[int], ends: list[int]) -> list[Run]:
    runs: list[Run] = []
    for name, start, stop in zip(names, starts, ends, strict=True):
        if runs and stop - runs[-1].start <= TOGETHER_VALUES:
            runs[-1] = Run(runs[-1].start, stop, (*runs[-1].names, name))
        else:
            runs.append(Run(start, stop, (name,)))
    return runs


def make_buckets(
    parameters: Mapping[str, Any],
    compressors: Mapping[str, Compressor | None],
    bucket_bytes: int,
    nodes: int,
    empty: Callable[[int, Any], Any],
) -> list[Bucket]:
    """Buckets of ``parameters``; see ``bucket_sizes`` and ``largest_bucket``. ``empty`` makes the buffers."""
    bucket_bytes = largest_bucket(bucket_bytes, sum(array.nbytes for array in parameters.values()), nodes)
    sizes = {name: Size(array.dtype, array.size, array.nbytes) for name, array in parameters.items()}
    kinds = {name: kind_of(compressors[name], array.size) for name, array in parameters.items()}
    return [
        Bucket({name: parameters[name] for name in names}, compressor, empty)
        for names, compressor in bucket_sizes(sizes, kinds, bucket_bytes)
    ]
