"""Where ``bitring train`` computes: in host memory, or on a card."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np

DEVICES = ("host", "cuda")

_LOCAL_RANK = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
"""What launchers call the number of a rank on its node."""


def array_module(device: str, rank: int) -> Any:
    """NumPy for "host"; CuPy for "cuda", with a card as the current one: a node's ranks take its cards in turn.

    Raises ValueError, with a word of why, where there is no CuPy or no card.
    """
    if device == "host":
        return np
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError as error:
        raise ValueError(f"--device cuda needs CuPy, which is not there: {error}") from error
    try:
        cards = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # of CuPy's own kind, which is not there without it
        raise ValueError(f"--device cuda needs a card, and CuPy finds none: {error}") from error
    if not cards:
        raise ValueError("--device cuda needs a card, and CuPy finds none")
    place = next((int(os.environ[name]) for name in _LOCAL_RANK if name in os.environ), rank)
    cupy.cuda.Device(place % cards).use()
    return cupy
