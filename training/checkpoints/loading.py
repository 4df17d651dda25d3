"""Loading a checkpoint, which resumes a run bit for bit, or on another number of ranks.

Rank 0 reads the file and sends every rank its arrays, which ``resharding`` finds in it. As in ``saving``, ranks work
``jointly`` between two exchanges, and arrays are read and travel in pieces.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.collectives.runtime.pieces import Span, nbytes_of, split, transfer
from bitring.collectives.selection.selection import check_name
from bitring.training.checkpoints.file import CheckpointFile, file_path
from bitring.training.checkpoints.header import CheckpointError, Header
from bitring.training.checkpoints.model_parallel_file import load_model_parallel
from bitring.training.checkpoints.resharding import Owned, Share, shares
from bitring.training.checkpoints.sandblaster_file import load_sandblaster
from bitring.training.checkpoints.state import alike_in, bytes_of, kept_by, numbers_of, require_trainer, with_owners
from bitring.training.data_parallel import DataParallel
from bitring.training.model_parallel import ModelParallel
from bitring.training.sandblaster import Sandblaster
from bitring.training.step.checks import difference, resumable
from bitring.training.tree import Path as At
from bitring.training.tree import is_array, leaves

LOAD = "load_checkpoint"


def load_checkpoint(
    path: str | os.PathLike[str], trainer: DataParallel | ModelParallel | Sandblaster
) -> dict[str, Any]:
    """Make ``trainer`` go on from the checkpoint ``path``, which rank 0 reads. Collective; returns ``extra``.

    The trainer must have the same parameters (names, shapes, dtypes), compression, and kinds of optimizer and mode;
    other settings may differ. It may have another number of ranks, see ``resharding``. With ``algorithm="auto"`` and
    the same ranks and buckets, the algorithms chosen then are used again, since bits depend on them.

    Raises on all ranks, before anything is changed: FileNotFoundError or another OSError, and CheckpointError, which
    names ``path.previous`` where there is one, for a file that is truncated, damaged, foreign, or of other training.
    What is loaded is in memory twice, until all ranks have all of it. A ModelParallel may have another placement and
    number of replicas; what its replicas' compressed exchange still owes goes to the first.
    """
    if isinstance(trainer, Sandblaster):
        return load_sandblaster(path, trainer)
    if isinstance(trainer, ModelParallel):
        return load_model_parallel(path, trainer)
    require_trainer(trainer, LOAD)
    trainer.meet(LOAD, None, afresh=True)
    with contextlib.ExitStack() as stack:
        return _load(trainer, path, stack)


def _load(trainer: DataParallel, path: str | os.PathLike[str], stack: contextlib.ExitStack) -> dict[str, Any]:
    comm, rank, size = trainer.comm, trainer.rank, trainer.size
    alike = (OSError, CheckpointError)
    owners = with_owners(trainer)
    kept = jointly(comm, LOAD, lambda: {at: (x.dtype, x.shape) for at, x in kept_by(trainer).items()})

    def opened() -> CheckpointFile | None:
        if rank != 0:
            return None
        file = stack.enter_context(CheckpointFile(file_path(path, LOAD)))
        _check(file, trainer, kept)
        return file

    file = jointly(comm, LOAD, opened, alike)
    sizes, header = broadcast(comm, None if file is None else (file.sizes, file.header), LOAD)
    for piece in split(sizes):
        jointly(comm, LOAD, partial(_checked, file, piece), alike)

    names = {number: (tuple(b.shapes), tuple(map(math.prod, b.shapes.values()))) for number, (b, _) in owners.items()}
    owned = allgather(comm, {number: plan.owned for number, (_, plan) in owners.items()}, LOAD)
    shapes = {at: shape for at, (_, shape) in kept.items()}
    everyone = [
        shares(
            header.tables,
            header.owner_residuals,
            shapes,
            {number: Owned(*names[number], *extent) for number, extent in owned[r].items()},
            r,
            size,
        )
        for r in range(size)
    ]
    kinds = dict(kept)
    for number, (_, plan) in owners.items():
        kinds["owner_residual", number] = plan.state_dict()["owner_residual"].dtype, (-1,)
    arrived = _arrived(comm, file, everyone, kinds)
    if algorithms := _algorithms(header, trainer):
        trainer.use_algorithms(algorithms)
    jointly(comm, LOAD, lambda: _restore(trainer, header, arrived))
    trainer.reload()
    return dict(header.extra)


def _checked(file: CheckpointFile | None, piece: Sequence[Span]) -> None:
    if file is not None:
        file.check(piece)


def _check(file: CheckpointFile, trainer: DataParallel, kept: Mapping[At, tuple[Any, tuple[int, ...]]]) -> None:
    """Raise CheckpointError unless the file has what the trainer needs, of the same kinds."""
    header = file.header
    numbers, owners = numbers_of(trainer), with_owners(trainer)
    text = difference(resumable(trainer.describe(), True), resumable(header.settings, True))
    if text is None:
        owned = {("owner_residual", name) for bucket, _ in owners.values() for name in bucket.shapes}
        here = {*kept, *numbers, *owned}
        there = {*header.tables[0], *header.numbers, *(("owner_residual", name) for name in header.owner_residuals)}
        if odd := here ^ there:
            text = f"{'/'.join(min(odd))} is kept on one side only"
    if text is not None:
        raise file.error(f"belongs to other training: here, {text}")
    for at, x in header.numbers.items():
        if isinstance(numbers[at], int) and not isinstance(x, int):
            raise file.error(f"is damaged: {'/'.join(at)} must be an integer; got {x!r}")
    wanted = [(at, member, *kept[at]) for table in header.tables for at, member in table.items()]
    for bucket, plan in owners.values():
        dtype = plan.state_dict()["owner_residual"].dtype
        for name, shape in bucket.shapes.items():
            wanted.append((("owner_residual", name), header.owner_residuals[name], dtype, shape))
    for at, member, dtype, shape in wanted:
        if file.kind(member) != (dtype.name, shape):
            found = "{} of shape {}".format(*file.kind(member))
            raise file.error(f"is damaged: {'/'.join(at)} is {found}, not {dtype.name} of shape {shape}")
    for bucket, algorithm in zip(trainer.buckets, _algorithms(header, trainer), strict=False):
        if not bucket.compressed:
            try:
                check_name(algorithm, LOAD)
            except (TypeError, ValueError) as problem:
                raise file.error(f"is damaged: {problem}") from None


def _algorithms(header: Header, trainer: DataParallel) -> list[str]:
    """Those that the trainer takes over; none where they were chosen for other buckets or ranks."""
    same = header.settings["ranks"] == trainer.size and len(header.algorithms) == len(trainer.buckets)
    return header.algorithms if trainer.algorithm == "auto" and same else []


def _arrived(
    comm: MPI.Intracomm,
    file: CheckpointFile | None,
    everyone: Sequence[Mapping[At, Share]],
    kinds: Mapping[At, tuple[np.dtype[Any], tuple[int, ...]]],
) -> dict[At, Any]:
    """This rank's new arrays, C-contiguous NumPy arrays; ``everyone``: all ranks' shares; ``kinds``: dtypes, shapes."""
    rank, size = comm.Get_rank(), len(everyone)

    def values(at: At, r: int) -> int:
        return sum(end - begin for _, begin, end in everyone[r][at])

    def emptied() -> dict[At, Any]:
        return {at: np.empty(values(at, rank), dtype).reshape(shape) for at, (dtype, shape) in kinds.items()}

    arrays = jointly(comm, LOAD, emptied)
    common = {at for at in kinds if all(each[at] == everyone[0][at] for each in everyone)}
    for target in (None, *range(size)):
        chosen = [at for at in kinds if (at in common) == (target is None)]
        owner = target or 0
        mine = target in (None, rank)

        def read(piece: Sequence[Span], chosen: Sequence[At] = chosen, owner: int = owner, mine: bool = mine) -> Any:
            if file is None:
                return np.empty(nbytes_of(piece), np.uint8) if mine else None
            data = bytearray()
            for number, begin, end in piece:
                at = chosen[number]
                data += file.read(everyone[owner][at], kinds[at][0], begin, end)
            return np.frombuffer(data, np.uint8)

        for piece in split([values(at, owner) * kinds[at][0].itemsize for at in chosen]):
            data = jointly(comm, LOAD, partial(read, piece), (OSError, CheckpointError))
            transfer(comm, data, LOAD, 0, target)
            start = 0
            for number, begin, end in piece if mine else ():
                bytes_of(arrays[chosen[number]])[begin:end] = data[start : start + end - begin]
                start += end - begin
    return arrays


def _restore(trainer: DataParallel, header: Header, arrived: Mapping[At, Any]) -> None:
    """Fill the trainer. Nothing is exchanged."""
    live = dict(leaves(trainer.live()))
    values = {at: arrived[at] if is_array(x) else type(x)(header.numbers[at]) for at, x in live.items()}
    trainer.restore(values, header.steps)
    for number, (bucket, plan) in enumerate(zip(trainer.buckets, trainer.plans, strict=True)):
        if not bucket.compressed:
            continue
        mine = plan.state_dict()
        state: dict[str, Any] = {key: arrived[at] for at, key in alike_in(bucket, mine).items()}
        if "residual" in mine:
            state["residual"] = np.concatenate([arrived["residual", name].reshape(-1) for name in bucket.shapes])
        if "owner_residual" in mine:
            state["owner_residual"] = arrived["owner_residual", str(number)]
        plan.load_state_dict(state)
