"""What a result was made with: the processor, the MPI library, versions. No host names and no paths, so that results
may be published."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def describe(comm: MPI.Intracomm) -> dict[str, Any]:
    """This machine and this run of ``comm``, as plain data. Collective."""
    return {
        "processor": processor(),
        "cores_of_node": os.cpu_count(),
        "cores_of_rank": [len(cpus) for cpus in comm.allgather(sorted(os.sched_getaffinity(0)))],
        "load_average": round(os.getloadavg()[0], 1),  # above 1 or so, others were at work, too
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "ranks": comm.size,
        "nodes": len(node_map(comm)),
        "thread_level": THREAD_LEVELS[MPI.Query_thread()],
        "versions": versions(),
    }


def node_map(comm: MPI.Intracomm) -> list[list[int]]:
    """The ranks of each node, by what MPI says of shared memory. Collective."""
    node = MPI.Intracomm(comm).Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    leader = node.bcast(comm.rank)
    node.Free()
    nodes: dict[int, list[int]] = {}
    for rank, first in enumerate(comm.allgather(leader)):
        nodes.setdefault(first, []).append(rank)
    return list(nodes.values())


def thread_share(comm: MPI.Intracomm) -> int:
    """How many threads this rank may use: its cores, shared with the node's ranks that may use the same. Collective.

    Ranks that are not in ``comm`` count, too, where the launcher says how many there are and binds none to cores.
    OMP_NUM_THREADS, where it is set, is the user's own answer.
    """
    mine = os.sched_getaffinity(0)
    cores = comm.allgather(mine)
    node = next(ranks for ranks in node_map(comm) if comm.rank in ranks)
    sharing = sum(1 for rank in node if cores[rank] & mine)
    if len(mine) == os.cpu_count():
        sharing = max(sharing, launched_local_size())
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    return max(1, len(mine) // sharing)
