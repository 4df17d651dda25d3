"""From one rank to all: a module's parameters and buffers, an optimizer's state, or any tree with tensors in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI

from bitring.collectives.calls import require_root
from bitring.collectives.runtime.context import given_comm
from bitring.collectives.runtime.jointly import jointly, raise_everywhere
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.collectives.runtime.pieces import nbytes_of, split, transfer
from bitring.errors import MismatchError
from bitring.torch.tensors import bytes_over
from bitring.torch.watched import state_tensors


def broadcast_parameters(module: Any, root: int = 0, *, comm: MPI.Intracomm | None = None) -> None:
    """Give the parameters and buffers of ``module``, in place, the values of rank ``root``'s. Collective.

    Raises on all ranks: TypeError or ValueError for bad arguments, MismatchError where the modules differ.
    """
    where = "broadcast_parameters"
    comm = given_comm(comm, where)
    error: Exception | None = None
    named: dict[str, Any] = {}
    try:
        require_root(root, comm.Get_size(), where)
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{where}: module must be a torch.nn.Module; got {type(module).__name__}")
        named = state_tensors(module)
    except Exception as problem:  # whatever it is, the other ranks must not wait
        error = problem
    raise_everywhere(comm, where, error)
    words = [f"{name} is {t.dtype} of shape {tuple(t.shape)}" for name, t in named.items()]
    everyone = allgather(comm, words, where)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[root]:
            odd = sorted(set(theirs) ^ set(everyone[root]))
            raise MismatchError(f"{where}: the module of rank {rank} differs from rank {root}'s: {'; '.join(odd[:2])}")
    broadcast_tensors(comm, list(named.values()), where, root)


@torch.no_grad()
def broadcast_tensors(comm: MPI.Intracomm, tensors: Sequence[Any], where: str, root: int) -> None:
    """Give ``tensors``, alike on all ranks, the values of rank ``root``'s, in place. Collective."""
    sizes = [t.numel() * t.element_size() for t in tensors]
    at_root = comm.Get_rank() == root
    for piece in split(sizes):
        data = np.empty(nbytes_of(piece), np.uint8)
        hosts = {number: tensors[number].detach().cpu().contiguous() for number, _, _ in piece}
        start = 0
        for number, begin, end in piece:
            if at_root:
                data[start : start + end - begin] = bytes_over(hosts[number])[begin:end]
            start += end - begin
        transfer(comm, data, where, root)
        start = 0
        for number, begin, end in piece:
            if not at_root:
                bytes_over(hosts[number])[begin:end] = data[start : start + end - begin]
                if hosts[number].data_ptr() != tensors[number].data_ptr():
                    tensors[number].copy_(hosts[number])
            start += end - begin


class _Place(NamedTuple):
    """Where a tensor was in a tree: its number, kind and device."""

    number: int
    dtype: Any
    shape: tuple[int, ...]
    device: str


def taken_apart(tree: Any, tensors: list[Any]) -> Any:
    """``tree`` with places for its tensors, which are appended to ``tensors``: dicts, lists and tuples are walked.

    NumPy's numbers become Python's.
    """
    if isinstance(tree, torch.Tensor):
        tensors.append(tree.detach())
        return _Place(len(tensors) - 1, tree.dtype, tuple(tree.shape), str(tree.device))
    if isinstance(tree, np.generic):  # a learning rate made by NumPy: torch.load would refuse it
        return tree.item()
    if isinstance(tree, Mapping):
        return {key: taken_apart(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
        return type(tree)(taken_apart(value, tensors) for value in tree)
    return tree


def put_together(skeleton: Any, tensors: Sequence[Any]) -> Any:
    """The tree that ``taken_apart`` took apart."""
    if isinstance(skeleton, _Place):
        return tensors[skeleton.number]
    if isinstance(skeleton, dict):
        return {key: put_together(value, tensors) for key, value in skeleton.items()}
    if type(skeleton) in (list, tuple):
        return type(skeleton)(put_together(value, tensors) for value in skeleton)
    return skeleton


def _places(skeleton: Any) -> list[_Place]:
    if isinstance(skeleton, _Place):
        return [skeleton]
    if isinstance(skeleton, dict):
        return [place for value in skeleton.values() for place in _places(value)]
    if type(skeleton) in (list, tuple):
        return [place for value in skeleton for place in _places(value)]
    return []


def broadcast_tree(comm: MPI.Intracomm, tree: Any, where: str, root: int = 0) -> Any:
    """Rank ``root``'s ``tree``, of dicts, lists, tuples, tensors and what pickle can hold, on every rank. Collective.

    Tensors come to the host. The others' ``tree`` is not looked at.
    """
    tensors: list[Any] = []
    at_root = comm.Get_rank() == root
    skeleton = broadcast(comm, taken_apart(tree, tensors) if at_root else None, where, root)
    tensors = [t.cpu().contiguous() for t in tensors] if at_root else empty(_places(skeleton))
    broadcast_tensors(comm, tensors, where, root)
    return put_together(skeleton, tensors)


def empty(places: Sequence[_Place]) -> list[Any]:
    """Tensors on the host for these places."""
    return [torch.empty(place.shape, dtype=place.dtype) for place in places]


def broadcast_optimizer_state(optimizer: Any, root: int = 0, *, comm: MPI.Intracomm | None = None) -> None:
    """Give ``optimizer`` the state and the settings, such as the learning rate, of rank ``root``'s. Collective.

    The optimizers must be of the same kind, for the same parameters. Raises on all ranks: TypeError or ValueError for
    bad arguments; what ``load_state_dict`` raises there, and PeerError on the others.
    """
    where = "broadcast_optimizer_state"
    comm = given_comm(comm, where)

    def state() -> Any:
        require_root(root, comm.Get_size(), where)
        if not (hasattr(optimizer, "state_dict") and hasattr(optimizer, "load_state_dict")):
            raise TypeError(f"{where}: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
        return optimizer.state_dict()

    mine = jointly(comm, where, state)
    theirs = broadcast_tree(comm, mine, where, root)
    jointly(comm, where, lambda: None if comm.Get_rank() == root else optimizer.load_state_dict(theirs))
