"""The launcher's (mpirun, srun) word to this process, read without MPI, which may not work yet."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
LOCAL_SIZE_VARIABLES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


def launched_rank() -> int:
    """This process's number among those started together; 0 for one started by itself."""
    return _first(RANK_VARIABLES, 0)


def launched_size() -> int:
    """Number of processes that were started together; 1 for one started by itself."""
    mpirun = _first(SIZE_VARIABLES[:2], 0)
    # Slurm's number alone may be of a job's script; a process that srun has started has its own number too.
    return mpirun or (_first(SIZE_VARIABLES[2:], 1) if "SLURM_PROCID" in os.environ else 1)


def launched_local_size() -> int:
    """Number of them that were started on this node; 1 where the launcher does not say."""
    return _first(LOCAL_SIZE_VARIABLES, 1)


def launch_words(size: int) -> list[str]:
    """The words before a command that ``size`` processes shall run, started as these were; nothing for one alone."""
    if "MPI_LOCALNRANKS" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ:
        beside = str(Path(sys.prefix) / "bin" / "mpirun")
        elsewhere = os.path.exists(beside) and shutil.which("mpirun") != beside
        return [beside if elsewhere else "mpirun", "-n", str(size)]
    if "SLURM_PROCID" in os.environ:
        return ["srun", "-n", str(size)]
    return []


def alone_by_mistake(world_size: int, library: str) -> str | None:
    """A message, and what to type, where several processes were started and each is a world of its own.

    ``library`` names the MPI library. None where all is well, and where BITRING_ALONE=1 says that it is meant.
    """
    launched = launched_size()
    if world_size > 1 or launched == 1 or os.environ.get("BITRING_ALONE") == "1":
        return None
    if any(os.environ.get(name, "").isdigit() for name in SIZE_VARIABLES[:2]):
        advice = f"the launcher belongs to another MPI library than {library}: {_own_mpirun()}"
    else:
        way = "pmix" if "Open MPI" in library else "pmi2"
        advice = f"srun offered nothing that {library} knows: type srun --mpi={way}, or {_own_mpirun()}"
    return (
        f"{launched} processes were started, and each takes itself for the only one; {advice}. "
        "Where each is meant to be alone, set BITRING_ALONE=1"
    )


def _own_mpirun() -> str:
    beside = Path(sys.prefix) / "bin" / "mpirun"
    return f"start them by {beside}" if beside.exists() else "start them by that library's mpirun"


def unknown_to_mpich() -> str | None:
    """A message for where the launcher offers PMIx, and the MPI library is MPICH's wheel, which it ends in MPI_Init."""
    if "PMIX_NAMESPACE" not in os.environ:
        return None
    try:
        number = version("mpich")
    except PackageNotFoundError:
        return None
    return (
        "bitring: these ranks were started by Open MPI's mpirun, or otherwise through PMIx, and "
        f"MPICH {number} does not know it: start them by {sys.prefix}/bin/mpirun, or srun --mpi=pmi2"
    )


def thread_share(cores: Sequence[set[int]], number: int) -> int:
    """Number of threads that rank ``number`` of a node may use: its cores, shared with those that may use the same.

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


def _first(variables: tuple[str, ...], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in variables if os.environ.get(name, "").isdigit()), otherwise)
