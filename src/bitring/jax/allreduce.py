"""AllReduce of trees of JAX's arrays, inside ``jit`` and outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from mpi4py import MPI

from bitring.arrays import require_numeric
from bitring.collectives.allreduce import allreduce as allreduce_array
from bitring.collectives.allreduce import allreduce_together, check_mean
from bitring.collectives.communicator import Communicator
from bitring.collectives.interop.operators import op_name, require_op
from bitring.collectives.selection.selection import check_name
from bitring.jax.channel import channel_of, heard_by_all, require_channel
from bitring.jax.primitive import do
from bitring.jax.trees import leaves_of
from bitring.jax.work import Work

_SMALL_NBYTES = 1 << 16
"""Arrays of up to so many bytes, of one dtype, travel together."""


def allreduce(
    tree: Any,
    *,
    op: MPI.Op = MPI.SUM,
    comm: MPI.Intracomm | None = None,
    algorithm: str = "auto",
    mean: bool = False,
) -> Any:
    """Reduce every array of ``tree`` over all ranks; every rank gets the same bits. Collective.

    ``tree``: arrays, JAX's or NumPy's, or numbers, in any nesting that JAX takes apart, alike on all ranks. Returns the
    same tree with new arrays of JAX's. Inside ``jit`` it becomes a part of the compiled computation, and happens in
    program order, as all calls of bitring.jax do; the ranks must run the same computations in the same order.

    ``mean``: the sum divided by the number of ranks. The derivative of a sum, or mean, is the sum, or mean, of the
    ranks' tangents, and of their cotangents; other operations have none. ``vmap`` reduces the whole batch.
    ``op``, ``comm``, ``algorithm`` as with ``bitring.allreduce``.

    Raises what ``bitring.allreduce`` does; from inside ``jit`` it comes as ``jax.errors.JaxRuntimeError`` with the
    name of the error in its text, when the results are waited for.
    """
    channel = channel_of(comm, "allreduce")
    with heard_by_all(channel, "allreduce"):
        require_op(op, "allreduce")
        check_name(algorithm, "allreduce")
        names, arrays, structure = leaves_of(tree, "allreduce", "tree")
        for name, array in zip(names, arrays, strict=True):
            require_numeric(array.dtype, "allreduce", name)
            check_mean(mean, op, array.dtype)
    work = Reduction(op, mean, algorithm, channel)
    return jax.tree_util.tree_unflatten(structure, do(work, arrays) if arrays else [])


class Reduction(Work):
    """AllReduce of each argument."""

    by_value = True

    def __init__(self, op: MPI.Op, mean: bool, algorithm: str, channel: Communicator) -> None:
        self._op = op
        self._mean = mean
        self._algorithm = algorithm
        self._channel = channel
        self.linear = op == MPI.SUM

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Reduction)
            and self._op == other._op
            and (self._mean, self._algorithm) == (other._mean, other._algorithm)
            and self._channel is other._channel
        )

    def __hash__(self) -> int:
        return hash((op_name(self._op), self._mean, self._algorithm, id(self._channel)))

    def shapes(self, arguments: Sequence[Any]) -> list[Any]:
        """As the arguments."""
        return list(arguments)

    def run(self, arguments: Sequence[Any], results: Sequence[Any]) -> None:
        """Large arrays one by one, small ones together."""
        require_channel(self._channel, "allreduce")
        together: dict[Any, list[int]] = {}
        for i, x in enumerate(arguments):
            together.setdefault(x.dtype if x.nbytes <= _SMALL_NBYTES else i, []).append(i)
        for numbers in together.values():
            if len(numbers) == 1:
                self._reduce(arguments[numbers[0]], results[numbers[0]])
                continue
            flat = np.concatenate([arguments[i] for i in numbers], axis=None)
            shapes = [tuple(arguments[i].shape) for i in numbers]
            allreduce_together(
                flat, shapes, op=self._op, comm=self._channel, algorithm=self._algorithm, mean=self._mean
            )
            start = 0
            for i in numbers:
                results[i][...] = flat[start : start + results[i].size].reshape(results[i].shape)
                start += results[i].size

    def _reduce(self, x: Any, out: Any) -> None:
        allreduce_array(x, out, op=self._op, comm=self._channel, algorithm=self._algorithm, mean=self._mean)

    def describe(self) -> str:
        """See Work."""
        return f"allreduce with op={op_name(self._op)}"
