"""The check of ``bitring doctor`` whether the MPI library takes device pointers; a child process tries it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from mpi4py import MPI

from bitring.collectives.interop.cuda_aware import cuda_aware
from bitring.commands._findings import FAIL, NOTE, OK, Finding
from bitring.commands._units import count

_PROBE_SECONDS = 60

# Variables by which a launcher tells a process which rank it is; a child that inherits them takes itself for that rank.
_LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "HYDRA_", "PRTE_", "SLURM_")

_PROBE = """
import cupy
from mpi4py import MPI

sent = cupy.arange(1 << 20, dtype=cupy.float32)
received = cupy.zeros_like(sent)
cupy.cuda.get_current_stream().synchronize()
MPI.COMM_SELF.Sendrecv(sent, 0, 0, received, 0, 0)
raise SystemExit(0 if bool((sent == received).all()) else 1)
"""


def cuda(comm: MPI.Intracomm) -> Finding:
    """Findings on device pointers: what the library says of them, and what happens when it gets some. Collective."""
    asked = cuda_aware()
    finding = _probed(asked) if comm.rank == 0 else None
    found: Finding = comm.bcast(finding)
    return found


def _probed(asked: bool) -> Finding:
    what = "CUDA-aware MPI"
    says = f"{'yes' if asked else 'no'}, {'as BITRING_CUDA_AWARE says' if _overridden() else 'the library says'}"
    devices = _devices()
    if isinstance(devices, str):
        return Finding(what, OK, f"{says}; not tried: {devices}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=_PROBE_SECONDS, check=False
        )
        works = done.returncode == 0
    except subprocess.TimeoutExpired:
        works = False
    if works and asked:
        return Finding(what, OK, f"{says}; a message between device buffers arrived; {count(devices, 'device')}")
    if asked:
        return Finding(
            what,
            FAIL,
            f"{says}; but a message between device buffers failed",
            "set BITRING_CUDA_AWARE=0: buffers are then staged through pinned host memory",
        )
    if works:
        return Finding(
            what,
            NOTE,
            f"{says}; but a message of a process to itself between device buffers arrived",
            "if it does between two ranks as well, BITRING_CUDA_AWARE=1 saves the staging",
        )
    return Finding(what, OK, f"{says}; device buffers are staged through pinned memory; {count(devices, 'device')}")


def _overridden() -> bool:
    return os.environ.get("BITRING_CUDA_AWARE", "") != ""


def _devices() -> int | str:
    """The number of CUDA devices, or why there are none."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        number = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # CuPy's own error types cannot be named where it is not installed
        return f"CuPy finds no device ({str(error).partition(':')[0]})"
    return number or "there is no device"
