"""Checkpoints: one file, written by rank 0, that resumes a run bit for bit, or on another number of ranks.

The file is an uncompressed ``.npz`` (``numpy.load`` opens it) of arrays and one ``header.json``, no pickles. The header
maps what each rank keeps to arrays; equal arrays of several ranks are stored once. Every array has a checksum. Rank 0
holds one rank's array at a time.

On q ranks instead of p, old rank r's residual is added to new rank r mod q's, so that their sum, what all ranks still
owe, stays. The owners' residuals are put together and cut again where the new owners' parts are. What else a compressed
plan keeps is alike on all ranks, and stays so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ml_dtypes
import numpy as np
from mpi4py import MPI

from bitring.training.bucket import Bucket
from bitring.training.checks import difference, resumable
from bitring.training.data_parallel import DataParallel
from bitring.training.tree import host_copy, is_array, leaves

FORMAT = "bitring checkpoint 1"
HEADER = "header.json"


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or belongs to other training. Raised on all ranks."""


@contextlib.contextmanager
def _private(comm: MPI.Intracomm) -> Generator[MPI.Intracomm]:
    """A duplicate for one checkpoint, so that no message meets one of the user's."""
    private = MPI.Intracomm.Dup(MPI.Intracomm(comm))
    try:
        yield private
    finally:
        private.Free()


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def _member(rank: int, path: Sequence[str]) -> str:
    """A readable name for an array in the file."""
    return "/".join(([] if rank == 0 else [f"rank{rank}"]) + [quote(part, safe="") for part in path])


def _raw(array: Any) -> Any:
    """The array's bytes as MPI sends them."""
    return array.reshape(-1).view(np.uint8)


# Writing


def save_checkpoint(path: str | os.PathLike[str], trainer: DataParallel, **extra: Any) -> None:
    """Write all that ``trainer`` needs to resume to ``path``. Collective; synchronises the replicas first.

    ``extra`` is anything JSON holds (epoch, seed, position in the data); rank 0's is stored, as ``path`` is rank 0's.
    The file is complete on the disk before it takes the old one's place, which becomes ``path.previous``. Raises on all
    ranks, leaving the old file as it was: OSError when it cannot be written, TypeError when ``extra`` is not JSON.
    """
    error: Exception | None = None
    text = ""
    try:
        text = json.dumps(extra)
    except (TypeError, ValueError) as problem:
        error = TypeError(f"save_checkpoint: extra must be what JSON holds: {problem}")
    trainer.meet("save_checkpoint", error)
    trainer.synchronize()
    with _private(trainer.comm) as comm:
        writer = _Writer(Path(path)) if comm.rank == 0 else None
        tables = _write_kept(comm, writer, _kept(trainer))
        owed = _write_owner_residuals(comm, writer, trainer)
        failure: OSError | None = None
        if writer is not None:
            header = {
                "format": FORMAT,
                "settings": trainer.describe(),
                "algorithms": trainer.algorithms,
                "steps": trainer.steps,
                "numbers": [[at, x] for at, x in leaves(trainer.live()) if not is_array(x)],
                "ranks": tables,
                "owner_residuals": owed,
                "extra": json.loads(text),
                "versions": _versions(),
            }
            failure = writer.finish(json.dumps(header))
        failure = comm.bcast(failure)
    if failure is not None:
        raise failure


def _versions() -> dict[str, str]:
    return {
        "python": sys.version.split()[0],
        **{package: version(package) for package in ("bitring", "numpy", "mpi4py")},
        "mpi": MPI.Get_library_version().strip("\x00 \n").splitlines()[0],
    }


def _kept(trainer: DataParallel) -> dict[tuple[str, ...], Any]:
    """This rank's arrays by path: parameters, optimizer, mode, and what the compressed plans keep, by parameter."""
    kept = {at: x for at, x in leaves(trainer.live()) if is_array(x)}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        if bucket.compressed:
            state = plan.state_dict()
            if "residual" in state:
                kept |= {("residual", name): part for name, part in bucket.cut(state["residual"])}
            for at, key in _common(bucket, state).items():
                # One number for all buckets; that of one which has stopped compressing stays behind.
                kept[at] = np.maximum(kept[at], state[key]) if at in kept else state[key]
    return kept


def _common(bucket: Bucket, state: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """What of a compressed plan's state is alike on all ranks: path -> key. Keys may end in a parameter's number."""
    names = list(bucket.shapes)
    common: dict[tuple[str, ...], str] = {}
    for key in state:
        if key not in ("residual", "owner_residual"):
            kind, _, number = key.partition("/")
            common[("compression", kind, names[int(number)]) if number else ("compression", kind)] = key
    return common


def _write_kept(comm: MPI.Intracomm, writer: _Writer | None, kept: Mapping[tuple[str, ...], Any]) -> list[Any]:
    """Rank 0 writes its own arrays, then the other ranks', those not written yet. Returns each rank's table on rank 0.

    A table's entries are [path, member].
    """
    described: list[tuple[tuple[str, ...], str, tuple[int, ...], bytes]] = []
    for at, x in kept.items():
        host = host_copy(x)
        described.append((at, host.dtype.name, host.shape, hashlib.blake2b(_raw(host), digest_size=32).digest()))
    everyone: list[Any] = comm.gather(described) or []
    tables: list[Any] = []
    wanted: list[list[int]] = []
    members: dict[Any, str] = {}
    for rank, entries in enumerate(everyone):
        tables.append([])
        wanted.append([])
        for i, (at, *content) in enumerate(entries):
            key = tuple(content)
            if key not in members:
                members[key] = _member(rank, at)
                wanted[rank].append(i)
            tables[rank].append([at, members[key]])
    mine = comm.scatter(wanted if writer is not None else None)
    arrays = list(kept.values())
    if writer is None:
        for i in mine:
            comm.Send(_raw(host_copy(arrays[i])), dest=0)
        return tables
    for i in mine:
        writer.write(_member(0, described[i][0]), host_copy(arrays[i]))
    for rank in range(1, comm.size):
        for i in wanted[rank]:
            at, dtype, shape, _ = everyone[rank][i]
            host = np.empty(shape, _dtype(dtype))
            comm.Recv(_raw(host), source=rank)
            writer.write(_member(rank, at), host)
    return tables


def _write_owner_residuals(comm: MPI.Intracomm, writer: _Writer | None, trainer: DataParallel) -> list[Any]:
    """Rank 0 puts each compressed bucket's owner residuals together and writes them by parameter. Returns a table."""
    table: list[Any] = []
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        if not bucket.compressed or "owner_residual" not in plan.state_dict():
            continue
        owed = host_copy(plan.state_dict()["owner_residual"])
        owned: list[Any] | None = comm.gather(plan.owned)
        if writer is None or owned is None:
            comm.Send(_raw(owed), dest=0)
            continue
        whole = np.zeros(bucket.flat.size, owed.dtype)
        whole[slice(*owned[0])] = owed
        for rank in range(1, comm.size):
            comm.Recv(_raw(whole[slice(*owned[rank])]), source=rank)
        for name, part in bucket.cut(whole):
            at = ("owner_residual", name)
            writer.write(_member(0, at), part)
            table.append([at, _member(0, at)])
    return table


class _Writer:
    """The new file, under a temporary name. The first failure is kept: other ranks' messages must still be received."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._failure: OSError | None = None
        self._dtypes: dict[str, str] = {}  # member -> dtype, which .npy cannot say of bfloat16
        self._file: Any = None
        self._zip: Any = None
        with self._failing():
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a directory")
            self._file = self._partial.open("wb")
            self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)

    @contextlib.contextmanager
    def _failing(self) -> Generator[None]:
        """Skip the body after a failure; keep the body's own."""
        try:
            yield
        except (OSError, MemoryError, zipfile.LargeZipFile) as problem:
            if self._failure is None:
                kind = type(problem) if isinstance(problem, OSError) else OSError
                self._failure = kind(f"save_checkpoint: {self._path} cannot be written: {problem}")

    def write(self, member: str, array: Any) -> None:
        """Append a NumPy array."""
        if self._failure is not None:
            return
        self._dtypes[member] = array.dtype.name
        if array.dtype.kind == "V":
            array = array.view(np.uint16)
        with self._failing(), self._zip.open(zipfile.ZipInfo(f"{member}.npy"), "w", force_zip64=True) as out:
            np.lib.format.write_array(out, array, allow_pickle=False)

    def finish(self, header: str) -> OSError | None:
        """Append the header, bring everything to the disk, and put the file in its place. Returns the failure."""
        if self._failure is None:
            with self._failing():
                self._zip.writestr(HEADER, json.dumps({**json.loads(header), "dtypes": self._dtypes}))
                self._zip.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                _put_in_place(self._partial, self._path)
        if self._failure is not None:
            # What the file object still buffers cannot be written either.
            for opened in (self._zip, self._file):
                if opened is not None:
                    with contextlib.suppress(OSError, ValueError):
                        opened.close()
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._partial.unlink()
        return self._failure


def _put_in_place(partial: Path, path: Path) -> None:
    """``path`` becomes the previous file, ``partial`` becomes ``path``; at no moment is there no ``path``."""
    if path.exists():
        spare = path.with_name(f"{path.name}.spare")
        try:
            spare.unlink(missing_ok=True)
            os.link(path, spare)
            spare.replace(_previous(path))
        except OSError:  # a file system without hard links
            path.replace(_previous(path))
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# Reading


def load_checkpoint(path: str | os.PathLike[str], trainer: DataParallel) -> dict[str, Any]:
    """Make ``trainer`` go on from the checkpoint ``path``, which rank 0 reads. Collective; returns ``extra``.

    The trainer must have the same parameters (names, shapes, dtypes), compression, and kinds of optimizer and mode;
    other settings may differ. It may have another number of ranks, see the module. With ``algorithm="auto"`` and the
    same ranks and buckets, the algorithms chosen then are used again, since bits depend on them.

    Raises on all ranks, before anything is changed: FileNotFoundError or another OSError, and CheckpointError, which
    names ``path.previous`` where there is one, for a file that is truncated, damaged, foreign, or of other training.
    """
    trainer.meet("load_checkpoint", None, afresh=True)
    with _private(trainer.comm) as comm:
        reader: _Reader | None = None
        failure: Exception | None = None
        header: Any = None
        if comm.rank == 0:
            try:
                reader = _Reader(Path(path))
                header = reader.header
                _check(reader.path, header, trainer)
            except Exception as problem:  # whatever it is, the other ranks must not wait
                failure = problem
        failure, header = comm.bcast((failure, header))
        if failure is not None:
            raise failure
        same_ranks = header["settings"]["ranks"] == trainer.size
        if trainer.algorithm == "auto" and same_ranks and len(header["algorithms"]) == len(trainer.buckets):
            trainer.use_algorithms(header["algorithms"])
        _read_kept(comm, reader, header, trainer)
        _read_residuals(comm, reader, header, trainer)
        if reader is not None:
            reader.close()
            failure = reader.failure
        failure = comm.bcast(failure)
    if failure is not None:
        raise failure
    extra: dict[str, Any] = header["extra"]
    return extra


def _check(path: Path, header: Mapping[str, Any], trainer: DataParallel) -> None:
    text = difference(resumable(trainer.describe()), resumable(header["settings"]))
    if text is None:
        there = {tuple(at) for at, _ in header["ranks"][0] if at[0] not in ("residual", "compression")}
        there |= {tuple(at) for at, _ in header["numbers"]}
        here = {at for at, _ in leaves(trainer.live())}
        if odd := there ^ here:
            at = min(odd)
            text = f"{'/'.join(at)} is kept on one side only"
    if text is not None:
        raise CheckpointError(f"load_checkpoint: {path} belongs to other training: here, {text}")


def _read_kept(comm: MPI.Intracomm, reader: _Reader | None, header: Mapping[str, Any], trainer: DataParallel) -> None:
    """Fill parameters, optimizer and mode. Rank r takes what old rank r mod p kept."""
    tables = [{tuple(at): member for at, member in table} for table in header["ranks"]]
    values: dict[tuple[str, ...], Any] = {tuple(at): x for at, x in header["numbers"]}
    trainer.restore(values, header["steps"])
    for at, x in leaves(trainer.live()):
        if not is_array(x):
            continue
        members = [tables[rank % len(tables)][at] for rank in range(comm.size)]
        host = np.empty(x.shape, x.dtype)
        if len(set(members)) == 1:
            if reader is not None:
                reader.read(members[0], host)
            comm.Bcast(_raw(host))
        else:

            def read(rank: int, out: Any, members: Sequence[str] = members) -> None:
                _read_into(reader, [members[rank]], out)

            _hand_out(comm, host, read)
        trainer.restore({at: host}, header["steps"])


def _read_residuals(
    comm: MPI.Intracomm, reader: _Reader | None, header: Mapping[str, Any], trainer: DataParallel
) -> None:
    """Fill what the compressed plans keep."""
    tables = [{tuple(at): member for at, member in table} for table in header["ranks"]]
    owed = {tuple(at): member for at, member in header["owner_residuals"]}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        if not bucket.compressed:
            continue
        state = {key: host_copy(x) for key, x in plan.state_dict().items()}
        if "residual" in state:
            for name, part in bucket.cut(state["residual"]):
                at = ("residual", name)

                def read(rank: int, out: Any, at: tuple[str, ...] = at) -> None:
                    _read_into(reader, [table[at] for table in tables[rank :: comm.size]], out)

                _hand_out(comm, part, read)
        if "owner_residual" in state:
            whole = np.zeros(bucket.flat.size, state["owner_residual"].dtype)
            for name, part in bucket.cut(whole):
                if reader is not None:
                    reader.read(owed["owner_residual", name], part)
                comm.Bcast(_raw(part))
            state["owner_residual"] = whole[slice(*plan.owned)]
        for path, key in _common(bucket, state).items():
            if reader is not None:
                reader.read(tables[0][path], state[key])
            comm.Bcast(_raw(state[key]))
        plan.load_state_dict(state)


def _read_into(reader: _Reader | None, members: Sequence[str], out: Any) -> None:
    """``out`` becomes the sum of the members."""
    assert reader is not None
    if len(members) == 1:
        reader.read(members[0], out)
        return
    out[...] = 0
    part = np.empty_like(out)
    for member in members:
        reader.read(member, part)
        out += part


def _hand_out(comm: MPI.Intracomm, mine: Any, read: Callable[[int, Any], None]) -> None:
    """Rank 0 reads each rank's array and sends it; each ends with its own in the C-contiguous NumPy array ``mine``."""
    if comm.rank != 0:
        comm.Recv(_raw(mine), source=0)
        return
    out = np.empty_like(mine)
    for rank in range(1, comm.size):
        read(rank, out)
        comm.Send(_raw(out), dest=rank)
    read(0, mine)


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class _Reader:
    """A checkpoint file whose checksums are right. A failure after that is kept, as other ranks wait for messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: Exception | None = None
        hint = f"; the checkpoint before it is {_previous(path)}" if _previous(path).exists() else ""
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as problem:
            raise type(problem)(f"load_checkpoint: {path} cannot be read: {problem}{hint}") from None
        except Exception as problem:  # zipfile raises many kinds for a damaged file
            raise CheckpointError(
                f"load_checkpoint: {path} is no checkpoint, or is truncated or damaged: {problem}{hint}"
            ) from None
        try:
            damaged = self._zip.testzip()
            if damaged is not None:
                raise CheckpointError(f"load_checkpoint: {path} is damaged at {damaged}{hint}")
            self.header: dict[str, Any] = json.loads(self._zip.read(HEADER))
            if self.header["format"] != FORMAT:
                raise CheckpointError(
                    f"load_checkpoint: {path} is of the format {self.header['format']!r}, not {FORMAT!r}{hint}"
                )
            present = set(self._zip.namelist())
            for _, member in chain(*self.header["ranks"], self.header["owner_residuals"]):
                if f"{member}.npy" not in present or member not in self.header["dtypes"]:
                    raise CheckpointError(f"load_checkpoint: {path} is damaged: {member} is missing{hint}")
        except CheckpointError:
            self._zip.close()
            raise
        except Exception as problem:
            self._zip.close()
            raise CheckpointError(
                f"load_checkpoint: {path} is no checkpoint, or is truncated or damaged: {problem!r}{hint}"
            ) from None

    def read(self, member: str, out: Any) -> None:
        """Fill the NumPy array ``out``."""
        try:
            with self._zip.open(f"{member}.npy") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            out[...] = array.view(_dtype(self.header["dtypes"][member]))
        except Exception as problem:
            out[...] = 0
            self.failure = self.failure or CheckpointError(
                f"load_checkpoint: {self.path} changed while it was read; the trainer is only partly loaded: {problem}"
            )

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
