"""A bucket: gradients of some parameters in one flat buffer, which is what travels; gradients become views of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from bitring.collectives.communicator import Communicator
from bitring.compression.compressor import Compressor
from bitring.compression.plans.plan import plan_allreduce
from bitring.torch.tensors import tensor_over
from bitring.training.step.bucket import TOGETHER_VALUES
from bitring.training.step.bucket_sizes import Size, bucket_sizes


class Entry(NamedTuple):
    """What is exchanged for one parameter: values of ``dtype``, NumPy's, and ``shape``.

    ``order``: the dimensions as they lie in memory, the outermost first. ``device``: torch's name of it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    device: str
    compression: Compressor | None

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The shape in memory's order; what compressors that look at matrices see."""
        return tuple(self.shape[i] for i in self.order)

    def view(self, flat: Any) -> Any:
        """``flat``, the values as they lie in memory, in the parameter's shape: an array or a tensor, no copy."""
        back = [self.order.index(i) for i in range(len(self.order))]
        shaped = flat.reshape(self.memory_shape)
        return shaped.transpose(back) if isinstance(shaped, np.ndarray) else shaped.permute(back)


class Bucket:
    """Values of ``entries``, alike in dtype, device and compression. Collective.

    ``flat`` is the array that travels, ``views`` are tensors in the parameters' shapes and on their device: parts of
    ``flat``, or for a device's parameters of a buffer there, which is copied to ``flat`` and back.
    """

    def __init__(self, comm: Communicator, entries: Sequence[Entry], algorithm: str) -> None:
        first = entries[0]
        ends = list(accumulate(entry.values for entry in entries))
        starts = [0, *ends[:-1]]
        self.entries = list(entries)
        self.names = [entry.name for entry in entries]
        self.compressed = first.compression is not None
        self.flat = comm.empty(ends[-1], first.dtype)
        self._address = self.flat.ctypes.data
        self._device = first.device
        self.places = list(zip(starts, ends, strict=True))
        self._wrap()
        self.algorithm = algorithm
        self.plan: Any = plan_allreduce(
            self.flat,
            comm=comm,
            algorithm=algorithm,
            compression=first.compression,
            shapes=[entry.memory_shape for entry in entries],
        )

    def _wrap(self) -> None:
        """Make the tensors over ``flat``."""
        self._host = tensor_over(self.flat)
        on_host = self._device == "cpu"
        size = self.places[-1][1]
        self.tensor = self._host if on_host else torch.empty(size, dtype=self._host.dtype, device=self._device)
        self.views = self.parts(self.tensor)
        self._given = self.parts(self.tensor)
        self._runs = self._packed_together()

    def gradients(self) -> list[Any]:
        """``views`` once more, the same tensors in each step, to be parameters' gradients.

        Whoever has such a tensor may put other memory under it, by ``p.grad.data = ...`` or ``module.to(...)``; it is
        made anew then.
        """
        for i, (given, view) in enumerate(zip(self._given, self.views, strict=True)):
            if not given.is_set_to(view):
                self._given = [*self._given[:i], *self.parts(self.tensor)[i:]]
                break
        return self._given

    def parts(self, flat: Any) -> list[Any]:
        """The parts of an array or tensor as large as the bucket, each in its parameter's shape."""
        return [entry.view(flat[start:end]) for entry, (start, end) in zip(self.entries, self.places, strict=True)]

    def _packed_together(self) -> list[tuple[Any, int, int]]:
        """Neighbours that are scaled together: their values, and the first parameter and the one after the last."""
        runs: list[tuple[int, int]] = []
        for i, (_, end) in enumerate(self.places):
            if runs and end - self.places[runs[-1][0]][0] <= TOGETHER_VALUES:
                runs[-1] = runs[-1][0], i + 1
            else:
                runs.append((i, i + 1))
        return [(self.tensor[self.places[a][0] : self.places[b - 1][1]], a, b) for a, b in runs]

    def load(self, gradients: Sequence[Any], scale: float) -> None:
        """Fill the buffer with scale·gradients, one for each parameter; None counts as zeros, and for 0 none is read.

        A gradient that is one of ``gradients()`` is scaled where it is. 16-bit values are scaled in float32 and rounded
        once; values of another dtype are converted first.
        """
        if self._host.data_ptr() != self._address:  # module.share_memory() moves all that gradients lie in
            self._wrap()
        if scale == 0:
            self.tensor.zero_()
            return
        dtype, views, given = self.tensor.dtype, self.views, self._given
        for values, first, last in self._runs:
            if last - first == 1:
                gradient, view = gradients[first], views[first]
                plain = gradient is not None and gradient.dtype == dtype and gradient.layout == torch.strided
                if plain and gradient is not given[first] and scale != 1:
                    torch.mul(gradient, scale, out=view)
                    continue
            inside: list[Any] = []
            outside: list[Any] = []
            for gradient, view, own in zip(gradients[first:last], views[first:last], given[first:last], strict=True):
                if gradient is None:
                    view.zero_()
                elif gradient is not own or not own.is_set_to(view):
                    inside.append(view)
                    outside.append(gradient if gradient.layout == torch.strided else gradient.to_dense())
            if inside:
                torch._foreach_copy_(inside, outside)
            if scale != 1:
                values.mul_(scale)

    def leave(self) -> None:
        """Copy what is to travel from the device, where the gradients are on one."""
        if self.tensor is not self._host:
            self._host.copy_(self.tensor)

    def arrive(self) -> None:
        """Copy what has come to the device, where the gradients are on one."""
        if self.tensor is not self._host:
            self.tensor.copy_(self._host)


def make_buckets(comm: Communicator, entries: Sequence[Entry], algorithm: str, bucket_bytes: int) -> list[Bucket]:
    """Buckets of ``entries``, in the order in which back-propagation, which begins at the last, fills them. Collective.

    Those that are alike share buckets of up to ``bucket_bytes``. One without values is in none.
    """
    groups: dict[Any, dict[str, Size]] = {}
    numbers = {entry.name: i for i, entry in enumerate(entries)}
    for entry in entries:
        kind = str(entry.compression)
        groups.setdefault(kind, {})[entry.name] = Size(
            (entry.dtype, entry.device), entry.values, entry.values * entry.dtype.itemsize
        )
    chosen = [
        sizes.names for group in groups.values() for sizes in bucket_sizes(group, dict.fromkeys(group), bucket_bytes)
    ]
    chosen.sort(key=lambda names: min(numbers[name] for name in names), reverse=True)
    return [Bucket(comm, [entries[numbers[name]] for name in names], algorithm) for names in chosen]
