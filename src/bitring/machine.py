"""The origin of a result: the processor, the MPI library, versions. No host names and no paths, so that results
may be published."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mpi4py import MPI

from bitring.collectives.interop.mpi_library import library_version

THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


def versions() -> dict[str, str]:
    """Versions of Python, of the MPI library, and of the packages that decide about speed and bits."""
    found = {"python": platform.python_version(), "mpi": library_version()}
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


def processor() -> str:
    """The processor's model, or its architecture where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.machine()
