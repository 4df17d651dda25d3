"""What a result was made with: the processor, the MPI library, versions. No host names and no paths, so that results
may be published."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mpi4py import MPI

from bitring.launcher import launched_local_size

THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


def versions() -> dict[str, str]:
    """Versions of Python, of the MPI library, and of the packages that decide about speed and bits."""
    found = {"python": platform.python_version(), "mpi": mpi_library()}
    for package in ("bitring", "mpi4py", "numpy", "numba", "cupy"):
        if (number := package_version(package)) is not None:
            found[package] = number
    return found


def package_version(package: str) -> str | None:
    """The installed version of ``package``; None where it is not installed."""
    # CuPy's wheels are named after the CUDA version they are for.
    for name in (package, *(f"{package}-cuda{n}x" for n in (13, 12, 11) if package == "cupy")):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def mpi_library() -> str:
    """Name and version, such as ``"MPICH 5.0.2"``."""
    text = MPI.Get_library_version().strip("\x00 \n").partition("\n")[0]
    # MPICH: "MPICH Version:      5.0.2". Open MPI: "Open MPI v5.0.11, package: ...", which names the build's host.
    return re.sub(r"\s+(Version:\s*|v)", " ", text.partition(",")[0]).strip()


def processor() -> str:
    """The processor's model, or its architecture where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.machine()


def thread_share(cores: Sequence[set[int]], number: int) -> int:
    """How many threads rank ``number`` of a node may use: its cores, shared with those that may use the same.

    ``cores``: of each of the node's ranks that take part. Others count, too, where the launcher says how many there are
    and binds none to cores. OMP_NUM_THREADS, where it is set, is the user's own answer.
    """
    mine = cores[number]
    sharing = sum(1 for theirs in cores if theirs & mine)
    if len(mine) == os.cpu_count():
        sharing = max(sharing, launched_local_size())
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    return max(1, len(mine) // sharing)
