"""Buffers of a module, such as running statistics: made equal on all ranks in each step, by rank 0's or by the mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bitring.collectives.communicator import Communicator
from bitring.torch.bucket import Entry
from bitring.torch.exchange import Exchange
from bitring.torch.tensors import ARRAY_DTYPES
from bitring.torch.watched import kept_buffers

_DTYPES: dict[Any, np.dtype[Any]] = {
    **ARRAY_DTYPES,
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}


class Buffers:
    """The buffers of ``module``; ``how``: "broadcast" gives all ranks rank 0's, "mean" the weighted mean. Collective.

    Of whole numbers there is no mean: they are rank 0's.
    """

    def __init__(self, comm: Communicator, module: Any, how: str, bucket_bytes: int) -> None:
        self._root = comm.Get_rank() == 0
        tensors = kept_buffers(module)
        means = {n: t for n, t in tensors.items() if how == "mean" and t.is_floating_point()}
        firsts = {n: t for n, t in tensors.items() if n not in means}
        self._exchanges = [
            (Exchange(comm, _entries(group), "auto", bucket_bytes), is_mean)
            for group, is_mean in ((means, True), (firsts, False))
            if group
        ]

    def __bool__(self) -> bool:
        return bool(self._exchanges)

    def exchange(self, module: Any, scale: float) -> None:
        """Exchange the values, ``scale`` being this rank's part of the weight. Nothing is changed yet."""
        tensors = dict(module.named_buffers())
        for exchange, _ in self._exchanges:
            for entry in exchange.entries:
                there = tensors.get(entry.name)
                if there is None or tuple(there.shape) != entry.shape:
                    now = "gone" if there is None else f"of shape {tuple(there.shape)}"
                    raise RuntimeError(
                        f"the buffer {entry.name!r} was of shape {entry.shape} when the step began and is {now}; "
                        "buffers='own' leaves buffers alone"
                    )
        for exchange, is_mean in self._exchanges:
            for bucket in exchange.buckets:
                exchange.load([tensors[name] for name in bucket.names], scale if is_mean else float(self._root), False)
            exchange.finish()

    def take_part(self, seconds: float) -> bool:
        """Exchange zeros, or what is left to: the others wait for it. See ``Exchange.take_part``."""
        return all(exchange.take_part(seconds) for exchange, _ in self._exchanges)

    def begin(self) -> None:
        """A new step begins."""
        for exchange, _ in self._exchanges:
            exchange.begin()

    @torch.no_grad()
    def store(self, module: Any) -> None:
        """Give the module what has been exchanged."""
        tensors = dict(module.named_buffers())
        for exchange, _ in self._exchanges:
            for bucket in exchange.buckets:
                torch._foreach_copy_([tensors[name] for name in bucket.names], bucket.views)

    def free(self) -> None:
        """Free the plans."""
        for exchange, _ in self._exchanges:
            exchange.free()


def _entries(tensors: dict[str, Any]) -> list[Entry]:
    return [
        Entry(
            name,
            _DTYPES[t.dtype],
            tuple(t.shape),
            tuple(range(t.dim())),
            str(t.device),
            None,
        )
        for name, t in tensors.items()
    ]
