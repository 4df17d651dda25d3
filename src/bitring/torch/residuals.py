"""What compressed exchanges carry from step to step, by parameter: taken out of plans, and put into other ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.torch.exchange import Exchange


@dataclass
class Kept:
    """NumPy arrays, by parameter's name.

    ``residual``: of this rank. ``owner_residual``: the owners', put together. ``alike``: what else a compressor
    carries, identical on all ranks, by its kind and the parameter's name, "" where it is not one parameter's.
    """

    residual: dict[str, Any] = field(default_factory=dict[str, Any])
    owner_residual: dict[str, Any] = field(default_factory=dict[str, Any])
    alike: dict[tuple[str, str], Any] = field(default_factory=dict[tuple[str, str], Any])

    def add(self, more: Kept) -> None:
        """Take what ``more`` has, of other parameters."""
        self.residual |= more.residual
        self.owner_residual |= more.owner_residual
        self.alike |= more.alike


def _kind_and_name(key: str, names: list[str]) -> tuple[str, str]:
    kind, _, number = key.partition("/")
    return kind, names[int(number)] if number else ""


def take(comm: Communicator, exchange: Exchange) -> Kept:
    """Copies of what the plans of ``exchange`` carry. Collective."""
    kept = Kept()
    for bucket in exchange.buckets:
        if not bucket.compressed:
            continue
        state = bucket.plan.state_dict()
        for key, array in state.items():
            if key == "owner_residual":
                whole = np.zeros(bucket.flat.size, array.dtype)
                first, last = bucket.plan.owned
                whole[first:last] = array
                comm.Allreduce(MPI.IN_PLACE, whole)
                kept.owner_residual |= _by_name(bucket, whole)
            elif key == "residual":
                kept.residual |= _by_name(bucket, array)
            else:
                kept.alike[_kind_and_name(key, bucket.names)] = array.copy()
    return kept


def _by_name(bucket: Any, flat: Any) -> dict[str, Any]:
    parts = bucket.parts(flat)
    return {name: np.array(part, order="C") for name, part in zip(bucket.names, parts, strict=True)}


def give(exchange: Exchange, kept: Kept) -> None:
    """Have the plans of ``exchange`` go on with ``kept``; where it has nothing they begin anew."""
    for bucket in exchange.buckets:
        if not bucket.compressed:
            continue
        state = {key: array.copy() for key, array in bucket.plan.state_dict().items()}
        for key, array in state.items():
            if key in ("residual", "owner_residual"):
                whole = np.zeros(bucket.flat.size, array.dtype)
                source = getattr(kept, key)
                for name, part in zip(bucket.names, bucket.parts(whole), strict=True):
                    if name in source and source[name].shape == part.shape:
                        part[...] = source[name]
                if key == "owner_residual":
                    first, last = bucket.plan.owned
                    whole = whole[first:last]
                state[key] = whole
            else:
                given = kept.alike.get(_kind_and_name(key, bucket.names))
                if given is not None and given.shape == array.shape:
                    state[key] = given.astype(array.dtype)
        bucket.plan.load_state_dict(state)
