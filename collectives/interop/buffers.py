"""Reading mpi4py's buffer specifications: ``x``, ``[x, count, MPI.DOUBLE]``, ``[x, (count, displ), "d"]``, …"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.arrays import (
    BFLOAT16,
    NUMERIC_DTYPES,
    Array,
    as_array,
    bytes_of,
    flat_view,
    is_numeric,
    memory_order,
    require_native,
)

_PLAIN = frozenset(NUMERIC_DTYPES) - {BFLOAT16}


class Values(NamedTuple):
    """The values of a buffer.

    ``flat``: a 1-D array in the buffer's memory. ``order``: in which order they are there, "C" or "Fortran"; empty
    where at most one axis is longer than 1, which may stand for either. ``spec``: what mpi4py is given, which does not
    read all that bitring reads.
    """

    flat: Array
    order: str
    spec: Any


def is_in_place(spec: Any) -> bool:
    """Whether ``spec`` says MPI.IN_PLACE (mpi4py takes None for it, too)."""
    return spec is None or spec is MPI.IN_PLACE


def parse(spec: Any, function: str, argument: str, *, writable: bool, blocks: int = 1) -> Values | None:
    """The values that ``spec`` names, in their own memory; None where only the MPI library can read it.

    ``blocks``: an explicit count is of one of so many equal blocks, as in Allgather's receive buffer. Raises
    TypeError or ValueError, naming ``function`` and ``argument``, for what neither bitring nor mpi4py can read, and
    for values whose bytes are swapped, unless an explicit datatype says that bytes are meant.
    """
    if (
        type(spec) is np.ndarray
        and spec.dtype in _PLAIN
        and spec.flags.c_contiguous
        and (spec.flags.writeable or not writable)
    ):
        return Values(spec.reshape(-1), "C" if sum(length > 1 for length in spec.shape) > 1 else "", spec)
    buffer, count, displ, datatype = unpacked(spec, function, argument)
    dtype = dtype_of(datatype)
    as_bytes = dtype is not None and dtype.itemsize == 1
    if isinstance(buffer, np.ndarray) and not as_bytes:
        require_native(buffer.dtype, function, argument)
    if buffer is None or isinstance(buffer, type(MPI.BOTTOM)) or (datatype is not None and dtype is None):
        _library_reads(spec, function, argument)
        return None
    try:
        array = as_array(buffer, function, argument)
    except TypeError as error:
        _library_reads(spec, function, argument, error if hasattr(buffer, "__dlpack__") else None)
        return None
    if not as_bytes:
        require_native(array.dtype, function, argument)
    if not is_numeric(array.dtype.newbyteorder("=")):
        _library_reads(spec, function, argument)
        return None
    flat = flat_view(array, function, argument, writable)
    order = memory_order(array) if sum(length > 1 for length in array.shape) > 1 else ""
    if dtype is not None and dtype != flat.dtype:
        raw = bytes_of(flat)
        flat = raw[: raw.size - raw.size % dtype.itemsize].view(dtype)
    first = int(displ or 0)
    count = flat.size - first if count is None else int(count) * blocks
    if count < 0 or first < 0 or first + count > flat.size:
        raise ValueError(
            f"{function}: {argument} must hold {count} values from position {first} on; got {flat.size} values"
        )
    values = flat[first : first + count]
    if values.dtype == BFLOAT16:
        spec = bytes_of(values)  # the library does not reduce them, but may move them
    elif hasattr(buffer, "__dlpack__") and not isinstance(buffer, np.ndarray):
        spec = values
    return Values(values, order, spec)


def unpacked(spec: Any, function: str, argument: str) -> tuple[Any, Any, Any, MPI.Datatype | str | None]:
    """What mpi4py's specification ``spec`` says: buffer, count, displacement, datatype; None for what it leaves out."""
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
    return buffer, count, displ, datatype


def dtype_of(datatype: MPI.Datatype | str | None) -> np.dtype[Any] | None:
    """The NumPy dtype of a predefined datatype; None for any other, and where NumPy has none."""
    if isinstance(datatype, str):
        datatype = MPI.Datatype.fromcode(datatype)
    if datatype is None or not datatype.is_predefined or "LOGICAL" in datatype.Get_name():
        return None
    try:
        dtype = np.dtype(datatype.typestr)
    except TypeError:
        return None
    return dtype if is_numeric(dtype) else None


def _library_reads(spec: Any, function: str, argument: str, ours: TypeError | None = None) -> None:
    """Raise mpi4py's error for ``spec`` now, before other ranks enter the library's call and wait.

    ``ours``, an error of bitring's that is clearer, is raised instead.
    """
    try:
        MPI.COMM_SELF.Bcast(spec, 0)
    except MPI.Exception:
        return
    except Exception as error:
        if ours is not None:
            raise ours from None
        kind = ValueError if isinstance(error, (ValueError, BufferError)) else TypeError
        raise kind(f"{function}: {argument}: {error}") from None
