"""Reading mpi4py's buffer specifications: ``x``, ``[x, count, MPI.DOUBLE]``, ``[x, (count, displ), "d"]``, …"""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.arrays import BFLOAT16, Array, as_array, bytes_of, flat_view


def is_in_place(spec: Any) -> bool:
    """Whether ``spec`` says MPI.IN_PLACE (mpi4py takes None for it, too)."""
    return spec is None or spec is MPI.IN_PLACE


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether bitring moves and reduces arrays of ``dtype``."""
    return dtype.kind in "iufcb" or dtype == BFLOAT16


def parse(spec: Any, function: str, argument: str, *, writable: bool, blocks: int = 1) -> Array | None:
    """The values that ``spec`` names, as a 1-D array in its own memory; None where only the MPI library can read it.

    ``blocks``: an explicit count is of one of so many equal blocks, as in Allgather's receive buffer. Raises
    TypeError or ValueError, naming ``function`` and ``argument``, for what neither bitring nor mpi4py can read.
    """
    count, displ, datatype = None, 0, None
    buffer = spec
    if isinstance(spec, (list, tuple)):
        if len(spec) == 2:
            buffer, second = spec
            if isinstance(second, (MPI.Datatype, str)):
                datatype = second
            else:
                count = second
        elif len(spec) == 3:
            buffer, count, datatype = spec
        elif len(spec) == 4:
            buffer, count, displ, datatype = spec
        else:
            raise ValueError(
                f"{function}: {argument} must be an array or a list of 2 to 4 items; got {len(spec)} items"
            )
        if isinstance(count, (list, tuple)):
            count, displ = count
    dtype = _dtype_of(datatype)
    if buffer is None or isinstance(buffer, type(MPI.BOTTOM)) or (datatype is not None and dtype is None):
        _library_reads(spec, function, argument)
        return None
    try:
        array = as_array(buffer, function, argument)
    except TypeError:
        _library_reads(spec, function, argument)
        return None
    if not is_numeric(array.dtype):
        _library_reads(spec, function, argument)
        return None
    flat = flat_view(array, function, argument, writable)
    if dtype is not None and dtype != flat.dtype:
        raw = bytes_of(flat)
        flat = raw[: raw.size - raw.size % dtype.itemsize].view(dtype)
    first = int(displ or 0)
    count = flat.size - first if count is None else int(count) * blocks
    if count < 0 or first < 0 or first + count > flat.size:
        raise ValueError(
            f"{function}: {argument} must hold {count} values from position {first} on; got {flat.size} values"
        )
    return flat[first : first + count]


def _dtype_of(datatype: MPI.Datatype | str | None) -> np.dtype[Any] | None:
    if isinstance(datatype, str):
        datatype = MPI.Datatype.fromcode(datatype)
    if datatype is None or not datatype.is_predefined or "LOGICAL" in datatype.Get_name():
        return None
    try:
        dtype = np.dtype(datatype.typestr)
    except TypeError:
        return None
    return dtype if is_numeric(dtype) else None


def _library_reads(spec: Any, function: str, argument: str) -> None:
    """Raise what mpi4py has to say of ``spec`` now, before other ranks enter the library's call and wait."""
    try:
        MPI.COMM_SELF.Bcast(spec, 0)
    except MPI.Exception:
        return
    except Exception as error:
        kind = ValueError if isinstance(error, (ValueError, BufferError)) else TypeError
        raise kind(f"{function}: {argument}: {error}") from None
