"""What the launcher (mpirun, srun) told this process, without MPI, which may not work yet."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
LOCAL_SIZE_VARIABLES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


def launched_rank() -> int:
    """This process's number among those started together; 0 for one started by itself."""
    return _first(RANK_VARIABLES, 0)


def launched_size() -> int:
    """How many processes were started together; 1 for one started by itself."""
    return _first(SIZE_VARIABLES, 1)


def launched_local_size() -> int:
    """How many of them were started on this node; 1 where the launcher does not say."""
    return _first(LOCAL_SIZE_VARIABLES, 1)


def unknown_to_mpich() -> str | None:
    """What to say where the launcher offers PMIx, and the MPI library is MPICH's wheel, which it ends in MPI_Init."""
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


def _first(variables: tuple[str, ...], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in variables if os.environ.get(name, "").isdigit()), otherwise)
