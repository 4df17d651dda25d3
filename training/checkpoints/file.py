"""The file of a checkpoint: an uncompressed ``.npz`` of arrays and one ``header.json``; no pickles.

``numpy.load`` opens it. Its arrays are written, looked at and read in pieces, so that whoever waits for this rank can
be told now and then that it goes on, and that memory is bounded, whatever the file says of itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from bitring.collectives.runtime.pieces import Span
from bitring.paths import as_path
from bitring.training.checkpoints.header import CheckpointError, Header, checked_header
from bitring.training.checkpoints.resharding import Share

HEADER = "header.json"

_SYNC_NBYTES = 32 << 20
"""So much at a time is brought to the disk, beside what is written next, so that the end is no long silence."""

_LOCAL_HEADER_NBYTES = 30
_NPY_HEADER_NBYTES = 10_000
_LONGEST_NAME = 200


def file_path(given: str | os.PathLike[str], function: str) -> Path:
    """``given`` as a Path. Raises TypeError and ValueError, naming ``function``, for what no file can be at."""
    path = as_path(given, function)
    if not path.name:
        raise ValueError(f"{function}: path must be a file's; got {os.fspath(given)!r}")
    return path


def previous(path: Path, number: int = 1) -> Path:
    """The name of the checkpoint that was ``path`` before ``number`` newer ones."""
    return path.with_name(f"{path.name}.previous{number if number > 1 else ''}")


def remove_checkpoints(path: Path) -> None:
    """Remove ``path`` and those before it."""
    path.unlink(missing_ok=True)
    _remove_previous(path, 1)


def _remove_previous(path: Path, number: int) -> None:
    """Those before ``path``, from number ``number`` on."""
    while previous(path, number).exists():
        previous(path, number).unlink()
        number += 1


def member_name(rank: int, path: Sequence[str]) -> str:
    """A readable name for an array in the file; the header says which is which."""
    name = "/".join(quote(part, safe="", errors="surrogatepass") for part in path)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}~{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"
    return name if rank == 0 else f"rank{rank}/{name}"


def _stored_as(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """``.npy`` has no bfloat16."""
    return np.dtype(np.uint16) if dtype.kind == "V" else dtype


class CheckpointWriter:
    """The new file, under a temporary name; leaving the context without ``finish`` removes it.

    Raises OSError, with the path, for all that can go wrong in it.
    """

    def __init__(self, path: Path, keep: int) -> None:
        """``keep``: so many files are left in the end, the new one included."""
        self._path = path
        self._keep = keep
        self._partial = path.with_name(f"{path.name}.partial")
        self._dtypes: dict[str, str] = {}
        self._unsynced = 0
        self._sync: Future[None] | None = None
        self._threads = ThreadPoolExecutor(1, "bitring-disk")  # makes its thread when there is something to do
        self._member: Any = None
        self._file: Any = None
        self._zip: Any = None
        with self._failing():
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a directory")
            self._partial.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self._partial, flags, 0o666), "wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)

    @contextlib.contextmanager
    def _failing(self) -> Any:
        try:
            yield
        except (OSError, MemoryError, zipfile.LargeZipFile) as problem:
            kind = type(problem) if isinstance(problem, OSError) else OSError
            raise kind(f"save_checkpoint: {self._path} cannot be written: {problem}") from problem

    def begin(self, member: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Begin an array: the bytes written from now on are its."""
        with self._failing():
            self._end()
            self._dtypes[member] = dtype.name
            self._member = self._zip.open(zipfile.ZipInfo(f"{member}.npy"), "w", force_zip64=True)
            described = {"descr": _stored_as(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._member, described)

    def write(self, data: Any) -> None:
        """Append the bytes of a contiguous NumPy array."""
        with self._failing():
            self._member.write(data)
            self._unsynced += data.nbytes
            if self._unsynced >= _SYNC_NBYTES:
                self._unsynced = 0
                self._file.flush()
                self._await_sync()
                self._sync = self._threads.submit(os.fdatasync, self._file.fileno())

    def _await_sync(self) -> None:
        """Until the disk has what it was given before."""
        if self._sync is not None:
            sync, self._sync = self._sync, None
            sync.result()

    def _end(self) -> None:
        if self._member is not None:
            self._member.close()
            self._member = None

    def finish(self, header: dict[str, Any]) -> None:
        """Append the header, bring everything to the disk, and put the file in its place."""
        with self._failing():
            self._end()
            self._zip.writestr(HEADER, json.dumps({**header, "dtypes": self._dtypes}))
            self._zip.close()
            self._file.flush()
            self._await_sync()
            os.fsync(self._file.fileno())
            self._file.close()
            _put_in_place(self._partial, self._path, self._keep)
            self._file = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()  # before the file that it has is closed
        if self._file is None:
            return
        for opened in (self._member, self._zip, self._file):
            # What is still buffered cannot be written either.
            if opened is not None:
                with contextlib.suppress(OSError, ValueError):
                    opened.close()
        with contextlib.suppress(OSError):
            self._partial.unlink()


def _put_in_place(partial: Path, path: Path, keep: int) -> None:
    """``partial`` becomes ``path``, which becomes the first of ``keep - 1`` previous ones.

    At no moment is there no ``path``, but on a file system without hard links.
    """
    _remove_previous(path, max(keep, 1))  # more were kept before
    if path.exists() and keep > 1:
        for number in range(keep - 1, 1, -1):
            if previous(path, number - 1).exists():
                previous(path, number - 1).replace(previous(path, number))
        spare = path.with_name(f"{path.name}.spare")
        try:
            spare.unlink(missing_ok=True)
            os.link(path, spare)
            spare.replace(previous(path))
        except OSError:  # a file system without hard links
            path.replace(previous(path))
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Member(NamedTuple):
    """An array's place in the file: of its record, of its values; the sum that CRC-32 must give; and what it is."""

    name: str
    begin: int
    values: int
    end: int
    crc: int
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]


class CheckpointFile:
    """A checkpoint to be read. Its structure and the header's fields are right; ``check`` looks at the bytes.

    Raises OSError when there is no reading it, and CheckpointError, which names the path, and the one before it where
    there is one, for everything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._crc = 0
        # A pipe would be waited for, and a device is endless.
        try:
            self._file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        except OSError as problem:
            raise type(problem)(f"load_checkpoint: {path} cannot be read: {problem}{self._hint()}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise CheckpointError("is no regular file")
            try:
                self._members = _members(self._file)
                self._read_header()
            except CheckpointError:
                raise
            except Exception as problem:  # zipfile and json raise many kinds for a damaged file
                if isinstance(problem, OSError) and problem.errno != errno.EINVAL:  # this one: a place no file has
                    raise
                raise CheckpointError(f"is no checkpoint, or is truncated or damaged: {problem!r}") from None
        except CheckpointError as problem:
            self._file.close()
            raise self.error(str(problem)) from None
        except BaseException:
            self._file.close()
            raise

    def _hint(self) -> str:
        return f"; the checkpoint before it is {previous(self.path)}" if previous(self.path).exists() else ""

    def error(self, what: str) -> CheckpointError:
        """To be raised; ``what`` is wrong with the file."""
        return CheckpointError(f"load_checkpoint: {self.path} {what}{self._hint()}")

    def _read_header(self) -> None:
        header = next((member for member in self._members if member.name == HEADER), None)
        if header is None:
            raise CheckpointError(f"is no checkpoint, or is truncated or damaged: {HEADER} is missing")
        text = self._bytes(header.begin, header.end)
        if zlib.crc32(text) != header.crc:
            raise CheckpointError(f"is damaged at {HEADER}")
        self.header: Header = checked_header(json.loads(text))
        self._by_name = {
            member.name.removesuffix(".npy"): member for member in self._members if member.dtype is not None
        }
        named = [member for table in self.header.tables for member in table.values()]
        for name in (*named, *self.header.owner_residuals.values()):
            member = self._by_name.get(name)
            if member is None or name not in self.header.dtypes:
                raise CheckpointError(f"is damaged: {name} is missing")
            said, dtype = self.header.dtypes[name], member.dtype
            assert dtype is not None
            if not dtype.isnative or dtype.name != ("uint16" if said == "bfloat16" else said):
                raise CheckpointError(f"is damaged: {name} holds {dtype.str}, and is said to hold {said[:80]!r}")

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype's name and the shape of an array."""
        return self.header.dtypes[name], self._by_name[name].shape

    @property
    def sizes(self) -> list[int]:
        """The bytes of all that is to be checked; ``check`` takes pieces of these."""
        return [member.end - member.begin for member in self._members]

    def check(self, piece: Sequence[Span]) -> None:
        """Compare checksums; to be called with all pieces in order. Raises CheckpointError."""
        for number, begin, end in piece:
            member = self._members[number]
            self._crc = zlib.crc32(self._bytes(member.begin + begin, member.begin + end), self._crc if begin else 0)
            if end == member.end - member.begin and self._crc != member.crc:
                raise self.error(f"is damaged at {member.name}")

    def read(self, share: Share, dtype: np.dtype[Any], begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end`` of the array that ``share`` makes up."""
        read = io.BytesIO()
        first, last, at = begin // dtype.itemsize, end // dtype.itemsize, 0
        for part in share:
            a, b = max(first, at), min(last, at + part.end - part.begin)
            if a < b:
                read.write(self._sum(part.members, dtype, part.begin + a - at, part.begin + b - at))
            at += part.end - part.begin
        return read.getvalue()

    def _sum(self, members: Sequence[str], dtype: np.dtype[Any], first: int, last: int) -> bytes:
        pieces: list[bytes] = []
        for name in members:
            values = self._by_name[name].values
            pieces.append(self._bytes(values + first * dtype.itemsize, values + last * dtype.itemsize))
        if len(pieces) == 1:
            return pieces[0]
        total = np.zeros(last - first, dtype)
        for piece in pieces:
            total += np.frombuffer(piece, dtype)
        return total.tobytes()

    def _bytes(self, begin: int, end: int) -> bytes:
        data = b""
        while len(data) < end - begin:
            try:
                more = os.pread(self._file.fileno(), end - begin - len(data), begin + len(data))
            except OSError as problem:
                raise type(problem)(f"load_checkpoint: {self.path} cannot be read: {problem}") from None
            if not more:
                raise self.error("became shorter while it was read")
            data += more
        return data

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _members(file: Any) -> list[_Member]:
    """Places of the arrays in the file. Raises CheckpointError and what zipfile does."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        end_of_data = archive.start_dir
    members: list[_Member] = []
    names: set[str] = set()
    reached = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.filename
        if name in names:
            raise CheckpointError(f"is damaged: it has {name[:80]} twice")
        names.add(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise CheckpointError(f"is no checkpoint: {name[:80]} is compressed or encrypted")
        local = os.pread(file.fileno(), _LOCAL_HEADER_NBYTES, info.header_offset)
        if info.header_offset < reached or local[:4] != b"PK\3\4":
            raise CheckpointError(f"is damaged: the place of {name[:80]} is wrong")
        begin = info.header_offset + _LOCAL_HEADER_NBYTES + int.from_bytes(local[26:28], "little")
        begin += int.from_bytes(local[28:30], "little")
        reached = begin + info.file_size
        if reached > end_of_data:
            raise CheckpointError(f"is damaged: the place of {name[:80]} is wrong")
        members.append(_member(file, name, begin, reached, info.CRC))
    return members


def _member(file: Any, name: str, begin: int, end: int, crc: int) -> _Member:
    if not name.endswith(".npy"):
        return _Member(name, begin, begin, end, crc, None, ())
    start = io.BytesIO(os.pread(file.fileno(), min(end - begin, _NPY_HEADER_NBYTES), begin))
    version = np.lib.format.read_magic(start)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise CheckpointError(f"is damaged: {name[:80]} is of the .npy format {version}")
    shape, fortran_order, dtype = read(start)
    values = begin + start.tell()
    counts = all(type(extent) is int and extent >= 0 for extent in shape)
    if fortran_order or dtype.hasobject or not counts or end - values != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"is damaged: {name[:80]} says {dtype} of shape {shape}, and has {end - values} bytes")
    return _Member(name, begin, values, end, crc, dtype, shape)
