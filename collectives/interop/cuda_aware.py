"""Whether the MPI library takes device pointers.

A wrong guess crashes, so the library is asked: Open MPI answers ``MPIX_Query_cuda_support``, MPICH
``MPIX_GPU_query_support``. ``BITRING_CUDA_AWARE=1`` or ``0`` overrides; ``bitring doctor`` tries it in a child process.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os

from bitring.collectives.interop.mpi_library import library_path

logger = logging.getLogger("bitring")


def _asked() -> bool:
    path = library_path()
    if path is None:
        return False
    library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support())
    if hasattr(library, "MPIX_GPU_query_support"):
        answer = ctypes.c_int(0)
        library.MPIX_GPU_query_support(ctypes.c_int(0), ctypes.byref(answer))  # 0: CUDA
        return bool(answer.value)
    return False


@functools.cache
def cuda_aware() -> bool:
    """Whether device buffers go to MPI directly. Needs an initialised MPI; logs the answer once."""
    setting = os.environ.get("BITRING_CUDA_AWARE")
    if setting not in (None, "", "0", "1"):
        raise ValueError(f"BITRING_CUDA_AWARE must be 0 or 1; got {setting!r}")
    answer = setting == "1" if setting else _asked()
    how = "as BITRING_CUDA_AWARE says" if setting else "as the MPI library says"
    logger.info(
        "device buffers are %s, %s", "handed to MPI directly" if answer else "staged through pinned memory", how
    )
    return answer
