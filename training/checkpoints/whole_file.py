"""Checkpoints of trainers whose state is whole on every rank: one file of the usual format, for any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import broadcast
from bitring.collectives.runtime.pieces import split
from bitring.training.checkpoints.file import CheckpointFile, CheckpointWriter, file_path, member_name
from bitring.training.checkpoints.header import FORMAT, CheckpointError
from bitring.training.checkpoints.resharding import Part
from bitring.training.tree import Path

SAVE, LOAD = "save_checkpoint", "load_checkpoint"


class Whole(NamedTuple):
    """``arrays`` and ``numbers`` by path, the trainer's ``settings``, the ``steps`` it has made, and the user's."""

    arrays: Mapping[Path, Any]
    numbers: Mapping[Path, float]
    settings: Mapping[str, Any]
    steps: int
    extra: Mapping[str, Any]


def save_whole(path: str | os.PathLike[str], comm: MPI.Intracomm, whole: Whole, versions: Any, keep: int) -> None:
    """Write what all ranks have alike, rank 0 does, and keep so many files. Collective. Raises OSError on all ranks."""

    def write() -> None:
        if comm.Get_rank():
            return
        members = {at: member_name(0, at) for at in whole.arrays}
        with CheckpointWriter(file_path(path, SAVE), keep) as writer:
            for at, array in whole.arrays.items():
                writer.begin(members[at], array.dtype, array.shape)
                writer.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            header = {
                "format": FORMAT,
                "settings": whole.settings,
                "algorithms": [],
                "steps": whole.steps,
                "numbers": [[at, x] for at, x in whole.numbers.items()],
                "ranks": [[[at, member] for at, member in members.items()]],
                "owner_residuals": [],
                "extra": whole.extra,
                "versions": versions,
            }
            writer.finish(header)

    jointly(comm, SAVE, write, alike=(OSError,))


def load_whole(
    path: str | os.PathLike[str], comm: MPI.Intracomm, wrong: Callable[[Mapping[str, Any]], str | None]
) -> Whole:
    """What the file holds, on all ranks; rank 0 reads it. Collective.

    ``wrong``: why its settings are of other training, in words. Raises OSError and CheckpointError on all ranks.
    """

    def read() -> Whole | None:
        if comm.Get_rank():
            return None
        with CheckpointFile(file_path(path, LOAD)) as file:
            header = file.header
            text = wrong(header.settings)
            if text is not None:
                raise file.error(f"belongs to other training: here, {text}")
            if any(table != header.tables[0] for table in header.tables):
                raise file.error("holds arrays that each rank has of its own; here, all have the same")
            for piece in split(file.sizes):
                file.check(piece)
            arrays = {at: _array(file, member) for at, member in header.tables[0].items()}
            return Whole(arrays, header.numbers, header.settings, header.steps, header.extra)

    whole: Whole = broadcast(comm, jointly(comm, LOAD, read, (OSError, CheckpointError)), LOAD)
    return whole


def _array(file: CheckpointFile, member: str) -> Any:
    name, shape = file.kind(member)
    dtype = np.dtype(name)
    values = int(np.prod(shape))
    share = (Part((member,), 0, values),)
    return np.frombuffer(file.read(share, dtype, 0, values * dtype.itemsize), dtype).reshape(shape).copy()
