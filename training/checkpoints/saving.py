"""Saving a checkpoint: every rank's arrays go to rank 0, which writes one file.

The header maps what each rank keeps to arrays of the file; equal arrays of several ranks are stored once. Whatever a
rank does between two exchanges it does ``jointly`` with the others: an error on one is raised on all. Arrays travel in
pieces, and rank 0 writes in pieces, so that a wait for it is no longer than one of them takes: under
``BITRING_TIMEOUT`` a slow disk does not look like a rank that is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.jointly import jointly, raise_everywhere
from bitring.collectives.runtime.objects import allgather
from bitring.collectives.runtime.pieces import Span, nbytes_of, split, transfer
from bitring.errors import MismatchError
from bitring.training.checkpoints.file import CheckpointWriter, file_path, member_name
from bitring.training.checkpoints.header import FORMAT, is_number
from bitring.training.checkpoints.model_parallel_file import save_model_parallel
from bitring.training.checkpoints.sandblaster_file import save_sandblaster
from bitring.training.checkpoints.state import bytes_of, kept_by, numbers_of, on_host, require_trainer, with_owners
from bitring.training.data_parallel import DataParallel
from bitring.training.model_parallel import ModelParallel
from bitring.training.sandblaster import Sandblaster
from bitring.training.step.bucket import Bucket
from bitring.training.tree import Path as At

SAVE = "save_checkpoint"

_KEPT_FILES = 2
_DIGEST_NBYTES = 20


def save_checkpoint(
    path: str | os.PathLike[str], trainer: DataParallel | ModelParallel | Sandblaster, **extra: Any
) -> None:
    """Write all that ``trainer`` needs to resume to ``path``. Collective; synchronises the replicas first.

    ``extra`` is anything JSON holds (epoch, seed, position in the data); rank 0's is stored, as ``path`` is rank 0's.
    The file is complete on the disk before it takes the old one's place, which becomes ``path.previous``. Raises on all
    ranks, leaving the old file as it was: OSError when it cannot be written, TypeError when ``extra`` is not JSON.
    """
    if not isinstance(trainer, (ModelParallel, Sandblaster)):
        require_trainer(trainer, SAVE)
        trainer.meet(SAVE, _not_json(extra))
        trainer.synchronize()
    write_checkpoint(path, trainer, extra)


def write_checkpoint(
    path: str | os.PathLike[str],
    trainer: DataParallel | ModelParallel | Sandblaster,
    extra: Mapping[str, Any],
    keep: int = _KEPT_FILES,
) -> None:
    """As ``save_checkpoint``, with a DataParallel left as it is: whether a run is saved makes no difference to it.

    To be called between two blocks of steps (``trainer.in_a_block`` is false); raises ValueError elsewhere. ``keep``:
    so many files are kept, this one and those before it, which are named ``path.previous``, ``path.previous2``, ...
    """
    problem = _not_json(extra)
    if isinstance(trainer, Sandblaster):
        save_sandblaster(path, trainer, extra, _versions(), problem, keep)
        return
    if isinstance(trainer, ModelParallel):
        raise_everywhere(trainer.comm, SAVE, problem, alike=(TypeError,))
        save_model_parallel(path, trainer, extra, _versions(), keep)
        return
    if trainer.in_a_block:
        problem = ValueError(f"{SAVE}: this rank is inside a block of steps; call trainer.synchronize() before")
    trainer.meet(SAVE, problem)
    with contextlib.ExitStack() as stack:
        _write(trainer, path, extra, keep, stack)


def _not_json(extra: Mapping[str, Any]) -> Exception | None:
    try:
        json.dumps(extra)
    except Exception as problem:  # whatever it is, the other ranks must not wait
        return TypeError(f"{SAVE}: extra must be what JSON holds: {problem}")
    return None


def _write(
    trainer: DataParallel,
    path: str | os.PathLike[str],
    extra: Mapping[str, Any],
    keep: int,
    stack: contextlib.ExitStack,
) -> None:
    comm, root = trainer.comm, trainer.rank == 0

    def opened() -> CheckpointWriter | None:
        return stack.enter_context(CheckpointWriter(file_path(path, SAVE), keep)) if root else None

    writer = jointly(comm, SAVE, opened, alike=(OSError,))
    kept, numbers, digests = jointly(comm, SAVE, lambda: _described(trainer))
    shapes = [(at, x.dtype, x.shape) for at, x in kept.items()]
    tables, wanted = _members(allgather(comm, (str(shapes), digests), SAVE), shapes)
    arrays = list(kept.values())
    for rank, chosen in enumerate(wanted):
        entries = [(member_name(rank, shapes[i][0]), *shapes[i][1:]) for i in chosen]
        _append(comm, writer, rank, entries, [arrays[i] for i in chosen])
    owed: list[Any] = []
    for bucket, plan in with_owners(trainer).values():
        dtype, whole = _gathered(comm, bucket, plan)
        paths = [("owner_residual", name) for name in bucket.shapes]
        entries = [(member_name(0, at), dtype, bucket.shapes[at[1]]) for at in paths]
        _append(comm, writer, 0, entries, [part for _, part in bucket.unflatten(whole)] if root else [])
        owed += [[at, member_name(0, at)] for at in paths]

    def finished() -> None:
        if writer is not None:
            header = {
                "format": FORMAT,
                "settings": trainer.describe(),
                "algorithms": trainer.algorithms,
                "steps": trainer.steps,
                "numbers": [[at, x] for at, x in numbers.items()],
                "ranks": tables,
                "owner_residuals": owed,
                "extra": extra,
                "versions": _versions(),
            }
            writer.finish(header)

    jointly(comm, SAVE, finished, alike=(OSError,))


def _versions() -> dict[str, str]:
    return {
        "python": sys.version.split()[0],
        **{package: version(package) for package in ("bitring", "numpy", "mpi4py")},
        "mpi": MPI.Get_library_version().strip("\x00 \n").splitlines()[0],
    }


def _described(trainer: DataParallel) -> tuple[dict[At, Any], dict[At, Any], bytes]:
    """The arrays and numbers that this rank keeps, and the arrays' digests."""
    kept, numbers = kept_by(trainer), numbers_of(trainer)
    for at, x in numbers.items():
        if not is_number(x):
            raise ValueError(f"{SAVE}: {'/'.join(at)} must be a number that is finite and >= 0; got {x!r}")
    return kept, numbers, b"".join(map(_digest, kept.values()))


def _digest(x: Any) -> bytes:
    """SHA-1, which many processors have in hardware, and which nowhere takes longer than its safer successors."""
    return hashlib.sha1(bytes_of(on_host(x)), usedforsecurity=False).digest()


def _members(
    everyone: Sequence[tuple[str, bytes]], shapes: Sequence[tuple[At, Any, tuple[int, ...]]]
) -> tuple[list[list[Any]], list[list[int]]]:
    """From what every rank keeps, in words, and its digests: a table for each, and the arrays that are written from it.

    A table's entries are [path, name of the array in the file]. Equal arrays are written once, from the first rank
    that has them.
    """
    tables: list[list[Any]] = []
    wanted: list[list[int]] = []
    members: dict[Any, str] = {}
    for rank, (words, digests) in enumerate(everyone):
        if words != everyone[0][0]:
            raise MismatchError(f"{SAVE}: rank {rank} keeps other arrays than rank 0")
        tables.append([])
        wanted.append([])
        for i, (at, dtype, shape) in enumerate(shapes):
            key = dtype, shape, digests[i * _DIGEST_NBYTES : (i + 1) * _DIGEST_NBYTES]
            if key not in members:
                members[key] = member_name(rank, at)
                wanted[rank].append(i)
            tables[rank].append([at, members[key]])
    return tables, wanted


class _Bytes:
    """The bytes of arrays, one of which at a time is kept on the host."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = arrays
        self._number = -1
        self._host: Any = None

    def of(self, piece: Sequence[Span]) -> Any:
        """A piece of them, not to be changed."""
        parts: list[Any] = []
        for number, begin, end in piece:
            if number != self._number:
                self._number, self._host = number, bytes_of(on_host(self._arrays[number]))
            parts.append(self._host[begin:end])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _append(
    comm: MPI.Intracomm,
    writer: CheckpointWriter | None,
    source: int,
    entries: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]],
    arrays: Sequence[Any],
) -> None:
    """Rank 0 writes arrays that rank ``source`` has: ``entries`` are their names in the file, dtypes and shapes."""
    at_source = comm.Get_rank() == source
    values = _Bytes(arrays)
    alike = (OSError,) if writer is not None else ()  # a disk's errors are everyone's
    pieces = list(split([math.prod(shape) * dtype.itemsize for _, dtype, shape in entries]))
    room: list[Any] = []  # one piece's, in which each arrives: new memory costs more than copying does

    def written(piece: Sequence[Span], data: Any) -> None:
        if writer is None:
            return
        at = 0
        for number, begin, end in piece:
            if begin == 0:
                writer.begin(*entries[number])
            writer.write(data[at : at + end - begin])
            at += end - begin

    def turned(before: tuple[Sequence[Span], Any] | None, piece: Sequence[Span]) -> Any:
        """Write the piece before this one, and give the memory that holds this one, or will."""
        if before is not None:
            written(*before)
        if at_source:
            return values.of(piece)
        if writer is None:
            return None
        if not room:
            room.append(np.empty(max(map(nbytes_of, pieces)), np.uint8))
        return room[0][: nbytes_of(piece)]

    before: tuple[Sequence[Span], Any] | None = None
    for piece in pieces:
        data = jointly(comm, SAVE, partial(turned, before, piece), alike)
        transfer(comm, data, SAVE, source, 0)
        before = piece, data
    if before is not None:
        jointly(comm, SAVE, partial(written, *before), alike)


def _gathered(comm: MPI.Intracomm, bucket: Bucket, plan: Any) -> tuple[np.dtype[Any], Any]:
    """The owners' residuals of a bucket: their dtype, and on rank 0 all of them, put together."""
    mine = jointly(comm, SAVE, lambda: on_host(plan.state_dict()["owner_residual"]))
    root = comm.Get_rank() == 0
    whole = jointly(comm, SAVE, lambda: np.zeros(bucket.flat.size if root else 0, mine.dtype))
    for rank, (first, last) in enumerate(allgather(comm, plan.owned, SAVE)):
        if root and rank == 0:
            whole[first:last] = mine
        data = bytes_of(whole[first:last] if root else mine)
        for piece in split([(last - first) * mine.itemsize]):
            for _, begin, end in piece:
                transfer(comm, data[begin:end], SAVE, rank, 0)
    return mine.dtype, whole
