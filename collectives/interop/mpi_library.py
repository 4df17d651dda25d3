"""The MPI library that mpi4py has loaded: where it is, what it is, and its functions for native operations."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from mpi4py import MPI

from bitring.native import extension


def library_path() -> str | None:
    """Path of the MPI library that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if re.search(r"/libmpi(_abi|cxx)?\.so[.\d]*$", path):
            return path
    return None


@functools.cache
def library_functions() -> Any:
    """The functions of the MPI library that mpi4py has loaded, for native operations."""
    path = library_path()
    assert path is not None, "mpi4py has loaded no MPI library"
    return extension.MpiLibrary(path)


def library_version() -> str:
    """Name and version, such as ``"MPICH 5.0.2"``."""
    text = MPI.Get_library_version().strip("\x00 \n").partition("\n")[0]
    # MPICH: "MPICH Version:      5.0.2". Open MPI: "Open MPI v5.0.11, package: ...", which names the build's host.
    return re.sub(r"\s+(Version:\s*|v)", " ", text.partition(",")[0]).strip()
