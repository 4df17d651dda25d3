"""Checkpoints of training with PyTorch: model, optimizer, schedule, scaler and residuals, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.torch.broadcast import broadcast_tree, taken_apart
from bitring.torch.residuals import Kept
from bitring.torch.tensors import bytes_over
from bitring.training.checkpoints.file import file_path, previous
from bitring.training.checkpoints.header import CheckpointError

FORMAT = "bitring.torch checkpoint 1"
SAVE, LOAD = "bitring.torch.save_checkpoint", "bitring.torch.load_checkpoint"


def save_checkpoint(
    path: str | os.PathLike[str],
    averager: Any,
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    **extra: Any,
) -> None:
    """Write what training needs to go on to ``path``. Collective; rank 0 writes.

    ``averager``: a GradientAverager, a DistributedOptimizer's ``averager``, OneBitAdam or LocalUpdates: its residuals
    are kept. Of ``model``, ``optimizer``, ``scheduler`` and ``scaler`` it is what ``state_dict()`` returns, of every
    rank where they differ. ``extra`` is anything JSON holds (epoch, position in the data); rank 0's is stored.

    The file is complete on the disk before it takes the old one's place, which becomes ``path.previous``. Raises on all
    ranks, leaving the old file as it was: OSError when it cannot be written, TypeError for a bad ``extra``,
    and for a ``state_dict()`` that could not be loaded again.
    """
    comm = averager.comm
    parts = _parts(averager, model, optimizer, scheduler, scaler)

    def states() -> dict[str, Any]:
        try:
            json.dumps(extra)
        except Exception as problem:
            raise TypeError(f"{SAVE}: extra must be what JSON holds: {problem}") from None
        return {name: part.state_dict() for name, part in parts.items()}

    mine = jointly(comm, SAVE, states, alike=(TypeError,))
    digests = allgather(comm, {name: _digest(state) for name, state in mine.items()}, SAVE)
    values: dict[str, list[Any]] = {}
    whose: dict[str, list[int]] = {}
    for name in parts:
        all_of_it = [each[name] for each in digests]
        kinds = list(dict.fromkeys(all_of_it))
        whose[name] = [kinds.index(digest) for digest in all_of_it]
        values[name] = [_at_writer(comm, mine[name], all_of_it.index(digest)) for digest in kinds]
    kept = averager.residuals()
    residuals = [_at_writer(comm, _tensors(kept.residual), rank) for rank in range(comm.Get_size())]

    def write() -> None:
        if comm.Get_rank() == 0:
            whole = {
                "format": FORMAT,
                "ranks": comm.Get_size(),
                "steps": averager.steps,
                "parts": values,
                "whose": whose,
                "residuals": residuals,
                "owner_residual": _tensors(kept.owner_residual),
                "alike": [[*key, torch.from_numpy(array)] for key, array in kept.alike.items()],
                "extra": json.dumps(extra),
            }
            _write(file_path(path, SAVE), whole)

    jointly(comm, SAVE, write, alike=(OSError, TypeError))


def _at_writer(comm: Any, tree: Any, root: int) -> Any:
    """Rank ``root``'s ``tree`` on rank 0, which writes; None elsewhere, where all of them might not have room."""
    there = broadcast_tree(comm, tree, SAVE, root)
    return there if comm.Get_rank() == 0 else None


def load_checkpoint(
    path: str | os.PathLike[str],
    averager: Any,
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
) -> dict[str, Any]:
    """Go on from the checkpoint ``path``, which rank 0 reads. Collective; returns ``extra``.

    What is given must be like what was saved. On the same ranks training goes on bit for bit. On q ranks instead of p
    old rank r's residual is added to new rank r mod q's, and new rank r takes the rest from old rank r mod p.

    Raises on all ranks, before anything is changed: OSError, and CheckpointError for a file that is damaged, foreign or
    of other training.
    """
    comm = averager.comm
    rank, size = comm.Get_rank(), comm.Get_size()
    parts = _parts(averager, model, optimizer, scheduler, scaler)
    mine = averager.residuals()
    shapes = {name: tuple(array.shape) for name, array in mine.residual.items()}

    def read() -> Any:
        return _read(path, set(parts), shapes) if rank == 0 else None

    whole = jointly(comm, LOAD, read, alike=(OSError, CheckpointError))
    old, steps, whose, counts, extra = broadcast(
        comm,
        None
        if whole is None
        else (
            whole["ranks"],
            whole["steps"],
            whole["whose"],
            {name: len(values) for name, values in whole["parts"].items()},
            whole["extra"],
        ),
        LOAD,
    )
    states: dict[str, Any] = {}
    for name in parts:
        for number in range(counts[name]):
            value = broadcast_tree(comm, None if whole is None else whole["parts"][name][number], LOAD)
            if whose[name][rank % old] == number:
                states[name] = value
    kept = Kept()
    for new in range(size):
        total = None if whole is None else _sum(whole["residuals"][new::size], shapes)
        total = broadcast_tree(comm, total, LOAD)
        if new == rank:
            kept.residual = {name: tensor.numpy() for name, tensor in total.items()}
    owned, alike = broadcast_tree(comm, None if whole is None else (whole["owner_residual"], whole["alike"]), LOAD)
    kept.owner_residual = {name: tensor.numpy() for name, tensor in owned.items()}
    kept.alike = {(kind, name): tensor.numpy() for kind, name, tensor in alike}

    def load() -> None:
        for name, state in states.items():
            parts[name].load_state_dict(state)
        averager.give_residuals(kept)
        averager.steps = steps

    jointly(comm, LOAD, load)
    found: dict[str, Any] = json.loads(extra)
    return found


def _parts(averager: Any, model: Any, optimizer: Any, scheduler: Any, scaler: Any) -> dict[str, Any]:
    given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if hasattr(averager, "state_dict") and averager is not optimizer:
        given["averager"] = averager
    return {name: part for name, part in given.items() if part is not None}


def _tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _digest(state: Any) -> bytes:
    tensors: list[Any] = []
    words = hashlib.sha1(pickle.dumps(taken_apart(state, tensors)), usedforsecurity=False)
    for tensor in tensors:
        words.update(bytes_over(tensor.detach().cpu().contiguous()))
    return words.digest()


def _sum(residuals: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The residuals of several old ranks, added; zeros for none."""
    return {
        name: sum(each[name] for each in residuals) if residuals else torch.zeros(shape)
        for name, shape in shapes.items()
    }


def _write(path: Path, whole: dict[str, Any]) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{SAVE}: {path} is a directory")
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        _require_readable(partial)
        if path.exists():
            os.replace(path, previous(path))
        os.replace(partial, path)
    except TypeError:
        partial.unlink()
        raise
    except (OSError, RuntimeError) as problem:
        partial.unlink(missing_ok=True)
        kind = type(problem) if isinstance(problem, OSError) else OSError
        raise kind(f"{SAVE}: {path} cannot be written: {problem}") from problem


def _require_readable(file: Path) -> None:
    """Raise TypeError for what ``load_checkpoint`` would refuse: it executes nothing that a file holds."""
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as problem:
        found = re.search(r"GLOBAL (\S+)", str(problem))
        what = found[1] if found else str(problem)
        raise TypeError(
            f"{SAVE}: a state_dict() holds {what}, which could not be loaded again; it may hold tensors, numbers, "
            "text, and dicts, lists and tuples of these"
        ) from None


def _read(path: str | os.PathLike[str], parts: set[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The file's contents, with what can be known of them looked at. Raises OSError and CheckpointError."""
    file = file_path(path, LOAD)
    hint = f"; the checkpoint before it is {previous(file)}" if previous(file).exists() else ""
    try:
        opened = file.open("rb")
    except OSError as problem:
        raise type(problem)(f"{LOAD}: {file} cannot be read: {problem}{hint}") from None
    try:
        with opened:
            whole = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch.load raises many kinds for a damaged file
        text = str(problem).splitlines()[0] if str(problem) else repr(problem)
        raise CheckpointError(f"{LOAD}: {file} is no checkpoint, or is damaged: {text}{hint}") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise CheckpointError(f"{LOAD}: {file} is no checkpoint of bitring.torch{hint}")
    saved = set(whole["parts"])
    if saved != parts:
        raise CheckpointError(f"{LOAD}: {file} holds {sorted(saved)}; asked for are {sorted(parts)}{hint}")
    there = {name: tuple(tensor.shape) for name, tensor in whole["residuals"][0].items()}
    if there != shapes:
        odd = sorted(set(there.items()) ^ set(shapes.items()))[:2]
        raise CheckpointError(f"{LOAD}: {file} belongs to other training: its residuals differ at {odd}{hint}")
    return whole
