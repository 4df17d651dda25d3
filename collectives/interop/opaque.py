"""Buffers that only the MPI library reads: of how many values of which type they are, as far as that can be told."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.buffers import dtype_of, unpacked


class Opaque(NamedTuple):
    """``dtype``: the basic type of all values, NumPy's or the name of MPI's, None where there are several or none is
    known; ``values``: how many; ``nbytes``: how many bytes travel. None where it is not known.
    """

    dtype: np.dtype[Any] | str | None
    values: int | None
    nbytes: int | None


def opaque(spec: Any, function: str, argument: str, blocks: int = 1) -> Opaque:
    """What can be told of ``spec``; ``blocks``: an explicit count is of one of so many equal blocks."""
    buffer, count, displ, datatype = unpacked(spec, function, argument)
    if isinstance(datatype, str):
        datatype = MPI.Datatype.fromcode(datatype)
    room = _nbytes(buffer)
    if datatype is None:
        return Opaque(None, None, room if count is None else None)
    if count is None:
        extent = datatype.extent
        units = None if room is None or extent <= 0 else room // extent - int(displ or 0)
    else:
        units = int(count) * blocks
    if units is None:
        return Opaque(None, None, None)
    nbytes, basic = units * datatype.Get_size(), _basic(datatype)
    if basic is None or not basic.Get_size():
        return Opaque(None, None, nbytes)
    return Opaque(dtype_of(basic) or basic.Get_name(), nbytes // basic.Get_size(), nbytes)


def _nbytes(buffer: Any) -> int | None:
    try:
        return memoryview(buffer).nbytes
    except (TypeError, ValueError, BufferError):
        return None


def _basic(datatype: MPI.Datatype) -> MPI.Datatype | None:
    """The predefined type that ``datatype`` is made of; None where there are several."""
    if datatype.is_predefined:
        return datatype
    *_, parts = datatype.Get_contents()
    found = [_basic(part) for part in parts]
    for part in parts:
        if not part.is_predefined:
            part.Free()
    return found[0] if found and found.count(found[0]) == len(found) else None
