"""Replicas: what is to be equal on all ranks, compared, and made equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import bytes_of
from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.errors import MismatchError
from bitring.training.step.gradient_exchange import GradientExchange
from bitring.training.tree import Path, fill, host_copy, is_array, leaves, set_leaf

_SMALL_NBYTES = 1 << 10


def digest_of(array: Any) -> bytes:
    """A hash of an array's bits, 8 bytes; about a second per GB."""
    host: Any = array if isinstance(array, np.ndarray) else host_copy(array)
    return blake2b(host.reshape(-1).view(np.uint8), digest_size=8).digest()


def compare(comm: MPI.Intracomm, arrays: Mapping[str, Any], where: str) -> None:
    """Raise MismatchError on all ranks unless ``arrays`` have the same bits on all: it names the first. Collective."""
    digests = {name: digest_of(array) for name, array in arrays.items()}
    whole = blake2b(b"".join(digests.values()), digest_size=8).digest()
    if len(set(allgather(comm, whole, where))) == 1:
        return
    everyone: list[list[bytes]] = allgather(comm, list(digests.values()), where)
    for name, each in zip(digests, zip(*everyone, strict=True), strict=True):
        usual = Counter(each).most_common(1)[0][0]
        odd = next((rank for rank, one in enumerate(each) if one != usual), None)
        if odd is not None:
            raise MismatchError(
                f"{where}: the parameter {name!r} on rank {odd} is not what it is on rank {each.index(usual)}; "
                "DataParallel.broadcast makes all replicas equal to one"
            )


def broadcast_tree(comm: MPI.Intracomm, exchange: GradientExchange, tree: dict[str, Any], root: int) -> None:
    """Give the arrays and numbers in ``tree`` the values of rank ``root``'s, in place. Collective.

    Arrays like the parameters, one for each, travel in the buckets of ``exchange``, small ones all together.
    """
    kinds = {name: (view.shape, view.dtype) for bucket in exchange.buckets for name, view in bucket.views.items()}
    groups: dict[Path, dict[str, Any]] = {}
    for path, leaf in leaves(tree):
        groups.setdefault(path[:-1], {})[path[-1]] = leaf
    others: list[tuple[Path, Any]] = []
    for at, group in groups.items():
        if kinds.items() <= {name: (x.shape, x.dtype) for name, x in group.items() if is_array(x)}.items():
            exchange.broadcast(group, root)
        else:
            others += [((*at, key), leaf) for key, leaf in group.items()]
    small = [None if is_array(leaf) and leaf.nbytes > _SMALL_NBYTES else host_copy(leaf) for _, leaf in others]
    theirs: list[Any] = broadcast(comm, small, "DataParallel.broadcast", root)
    for (path, leaf), value in zip(others, theirs, strict=True):
        if value is not None:
            set_leaf(tree, path, value)
        else:
            host = host_copy(leaf)
            Communicator(comm).Bcast(bytes_of(host.reshape(-1)), root)
            fill(leaf, host)
