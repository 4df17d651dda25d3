"""From one rank to all: a tree of JAX's arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from mpi4py import MPI

from bitring.arrays import bytes_of
from bitring.collectives.calls import require_root
from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.collectives.runtime.objects import allgather
from bitring.errors import MismatchError
from bitring.jax.channel import channel_of
from bitring.jax.order import settle
from bitring.jax.trees import leaves_of, require_concrete


def broadcast(tree: Any, root: int = 0, *, comm: MPI.Intracomm | None = None) -> Any:
    """The arrays of rank ``root``'s ``tree``, as new arrays of JAX's in the same tree, on all ranks. Collective.

    ``tree``: as for ``allreduce``: parameters, an optimizer's state. It must be alike on all ranks in names, shapes and
    dtypes. Not for use inside ``jit``.

    Raises on all ranks: TypeError or ValueError where a rank's arguments are bad, and PeerError on the others;
    MismatchError, which names the first leaf that differs.
    """
    channel = channel_of(comm, "broadcast")
    settle()  # what is under way comes first
    error: Exception | None = None
    names: list[str] = []
    arrays: list[Any] = []
    structure: Any = None
    try:
        require_root(root, channel.Get_size(), "broadcast")
        names, arrays, structure = leaves_of(tree, "broadcast", "tree")
        require_concrete(names, arrays, "broadcast")
    except Exception as problem:  # whatever it is, the other ranks must not wait
        error = problem
    raise_everywhere(channel, "broadcast", error)
    mine = [f"{name} is {x.dtype} of shape {x.shape}" for name, x in zip(names, arrays, strict=True)]
    everyone = allgather(channel, (root, mine), "broadcast")
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise MismatchError(f"broadcast: rank {rank} differs from rank 0: {_difference(theirs, everyone[0])}")
    hosts = [np.asarray(x) for x in arrays]
    flat = np.empty(sum(x.nbytes for x in hosts), np.uint8)
    if channel.Get_rank() == root and hosts:
        np.concatenate([bytes_of(np.ascontiguousarray(x).reshape(-1)) for x in hosts], out=flat)
    if flat.size:
        channel.Bcast(flat, root)
    values: list[Any] = []
    start = 0
    for x in hosts:
        values.append(jax.device_put(flat[start : start + x.nbytes].copy().view(x.dtype).reshape(x.shape)))
        start += x.nbytes
    return jax.tree_util.tree_unflatten(structure, values)


def _difference(theirs: tuple[int, list[str]], first: tuple[int, list[str]]) -> str:
    if theirs[0] != first[0]:
        return f"root is {theirs[0]}, not {first[0]}"
    for a, b in zip(theirs[1], first[1], strict=False):
        if a != b:
            return f"{a}; there, {b}"
    return f"it has {len(theirs[1])} leaves, not {len(first[1])}"
