"""What a trainer of a split model knows, put together from all ranks' parts, and cut again under any placement.

A tree of whole arrays and of numbers: ``parameters``, ``optimizer``, ``mode``, each by name at its leaves; what is no
array of a parameter's shape is the same on all ranks. It is the first replica's: in modes in which replicas train alone
for a while, or by a store, the others go on with its optimizer's state. ``residuals``: of compressed exchanges between
replicas, name -> what all of them still owe; the first replica gets it back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.objects import allgather
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import FreeMode
from bitring.training.placement.parts import Part, joined
from bitring.training.tree import Path, host_copy, leaves

RESIDUALS = "residuals"
_PUSHED = ("mode", "residual")
"""Where a trainer of a store has what its pushes still owe, by name."""
KINDS = ("parameters", "optimizer", "mode", RESIDUALS)


class WholeState:
    """The state of ``trainer``, which exchanges between replicas this rank's ``parts`` of the ``parameters``.

    ``trainer`` is None on a rank that has no values. ``rank``: in the ``replica``.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        replica: int,
        rank: int,
        parts: Mapping[str, Part],
        parameters: Mapping[str, Any],
        trainer: DataParallel | None,
    ) -> None:
        self._comm = comm
        self._replica, self._rank = replica, rank
        self._parts, self._parameters = parts, parameters
        self._trainer = trainer

    def _is_part(self, path: Path, x: Any) -> bool:
        """Whether a leaf is this rank's part of an array like a parameter."""
        part = self._parts.get(path[-1])
        return part is not None and np.shape(x) == part.of(self._parameters[path[-1]], self._rank).shape

    def meet(self, operation: str) -> None:
        """Have the whole state where the trainer is, in modes in which a store has it. Collective."""
        if self._trainer is not None and isinstance(self._trainer.mode, FreeMode):
            self._trainer.meet(operation, None, afresh=True)

    def collected(self, where: str, kinds: Collection[str] = KINDS) -> dict[str, Any]:
        """The tree, the same on all ranks; new arrays. ``kinds``: these of its branches alone. Collective."""
        pieces: dict[Path, dict[str, Any]] = {}
        alike: dict[Path, Any] = {}
        live = {} if self._trainer is None else self._trainer.live()
        for path, x in leaves({kind: live[kind] for kind in kinds if kind in live}):
            if path[:2] == _PUSHED:
                continue
            if not self._is_part(path, x):
                alike[path] = host_copy(x)
            elif self._replica == 0 and self._rank in self._parts[path[-1]].keepers:
                pieces.setdefault(path[:-1], {})[path[-1]] = x
        owed = {} if self._trainer is None or RESIDUALS not in kinds else _owed(self._trainer)
        owed = {name: x for name, x in owed.items() if self._rank in self._parts[name].keepers}
        everyone = allgather(self._comm, (self._replica, self._rank, pieces, alike, owed), where)
        tree: dict[str, Any] = {kind: {} for kind in kinds}
        for kind in sorted({kind for _, _, theirs, _, _ in everyone for kind in theirs}):
            each = [(rank, theirs[kind]) for _, rank, theirs, _, _ in everyone if kind in theirs]
            _put(tree, kind, joined(each, self._parts, self._parameters))
        for path, x in {path: x for *_, theirs, _ in everyone for path, x in theirs.items()}.items():
            _put(tree, path, x)
        if any(theirs for *_, theirs in everyone):
            replicas = sorted({replica for replica, *_ in everyone})
            sums = [
                joined([(rank, theirs) for at, rank, _, _, theirs in everyone if at == replica], *self._like(everyone))
                for replica in replicas
            ]
            tree[RESIDUALS] = {name: sum(each[name] for each in sums) for name in sums[0]}
        return tree

    def _like(self, everyone: Any) -> tuple[Mapping[str, Part], Mapping[str, Any]]:
        """Parts and parameters that have residuals."""
        names = {name for *_, theirs in everyone for name in theirs}
        return self._parts, {name: w for name, w in self._parameters.items() if name in names}

    def require(self, tree: Any, where: str) -> None:
        """Raise TypeError or ValueError where this rank cannot take ``tree`` and its ``steps``. ``where`` it is."""
        given = tree if isinstance(tree, Mapping) else {}
        for key, kind in (*((kind, Mapping) for kind in KINDS), ("steps", Integral)):
            if not isinstance(given.get(key), kind):
                raise TypeError(
                    f"{where}: state must be what state_dict returned, with {key!r}, "
                    f"{'a mapping' if kind is Mapping else 'a whole number'}; got {type(given.get(key)).__name__}"
                )
        if (problem := self._problem(given)) is not None:
            raise ValueError(f"{where}: {problem}")

    def _problem(self, tree: Mapping[str, Any]) -> str | None:
        there = dict(leaves(tree))
        for name, w in self._parameters.items():
            given = there.get(("parameters", name))
            if given is None or np.shape(given) != w.shape:
                return f"parameters/{name} must be of shape {w.shape}; got {None if given is None else np.shape(given)}"
        if odd := {path[1] for path in there if path[0] == "parameters"} - set(self._parameters):
            return f"parameters/{min(odd)} is unknown here"
        for name, x in tree[RESIDUALS].items():
            if name not in self._parameters or np.shape(x) != self._parameters[name].shape:
                return f"residuals/{name} must be of a parameter and of its shape; got {np.shape(x)}"
        live = {path: x for path, x in self._leaves() if path[:2] != _PUSHED}
        for path, x in live.items():
            wanted = self._parameters[path[-1]].shape if self._is_part(path, x) else np.shape(x)
            if path not in there or np.shape(there[path]) != wanted:
                return f"{'/'.join(path)} must be there, of shape {wanted}"
        kinds = {path[:2] for path in live if path[0] == "optimizer"}
        others = {path[:2] for path in there if path[0] == "optimizer"} - kinds
        if live and others:
            return f"{'/'.join(min(others))} is unknown here"
        return None

    def _leaves(self) -> list[tuple[Path, Any]]:
        return [] if self._trainer is None else list(leaves(self._trainer.live()))

    def take(self, tree: Mapping[str, Any], steps: int) -> None:
        """Cut this rank's parts out of ``tree``, as it is required to be; ``steps`` were made.

        Collective in modes in which a store has the parameters.
        """
        if self._trainer is None:
            return
        there = dict(leaves(tree))
        owed = tree[RESIDUALS] if self._replica == 0 else {}
        values: dict[Path, Any] = {}
        for path, x in self._leaves():
            name = path[-1]
            if path[:2] == _PUSHED:
                values[path] = self._parts[name].of(owed[name], self._rank) if name in owed else np.zeros_like(x)
            else:
                values[path] = self._parts[name].of(there[path], self._rank) if self._is_part(path, x) else there[path]
        self._trainer.restore(values, steps)
        if isinstance(self._trainer.mode, FreeMode):
            self._trainer.reload()
        for bucket, plan in zip(self._trainer.buckets, self._trainer.plans, strict=True):
            state = {key: host_copy(x) for key, x in plan.state_dict().items()}
            if "residual" not in state:
                continue
            for key in state.keys() & {"residual", "owner_residual"}:
                state[key][...] = 0
            for name, x in bucket.unflatten(state["residual"]):
                if name in owed:
                    x[...] = self._parts[name].of(owed[name], self._rank)
            plan.load_state_dict(state)


def _owed(trainer: DataParallel) -> dict[str, Any]:
    """This rank's residuals by parameter: of its values, and of the sums that it encodes as an owner."""
    found: dict[str, Any] = {path[-1]: x for path, x in leaves(trainer.live()) if path[:2] == _PUSHED}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        state = plan.state_dict()
        if "residual" not in state:
            continue
        whole = host_copy(state["residual"])
        if "owner_residual" in state:
            first, last = plan.owned
            whole[first:last] += host_copy(state["owner_residual"])
        found |= dict(bucket.unflatten(whole))
    return found


def _put(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    if isinstance(value, Mapping):
        tree.setdefault(path[-1], {}).update(value)
    else:
        tree[path[-1]] = value
