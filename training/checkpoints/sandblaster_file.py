"""Checkpoints of a Sandblaster: its whole vectors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.training.checkpoints.whole_file import LOAD, SAVE, Whole, load_whole, save_whole
from bitring.training.lbfgs import NUMBERS
from bitring.training.sandblaster import Sandblaster
from bitring.training.step.checks import text_of
from bitring.training.tree import Path

_VECTORS = ("parameters", "gradient", "s", "y", "gram")


def save_sandblaster(
    path: str | os.PathLike[str],
    job: Sandblaster,
    extra: Mapping[str, Any],
    versions: Any,
    problem: Exception | None,
    keep: int,
) -> None:
    """Write all that ``job`` needs to go on, unless a rank has a ``problem``. Collective; see ``save_checkpoint``."""

    def save(comm: MPI.Intracomm) -> None:
        raise_everywhere(comm, SAVE, problem, alike=(TypeError,))
        state = job.exchange_state(comm)
        arrays: dict[Path, Any] = {(name,): np.ascontiguousarray(state[name], np.float64) for name in _VECTORS}
        arrays[("numbers",)] = np.array(list(state["numbers"].values()), np.float64)
        arrays[("batch",)] = np.array(state["batch"] or (), np.float64)
        save_whole(path, comm, Whole(arrays, {}, _settings(job), state["steps"], extra), versions, keep)

    job.together(SAVE, save)


def load_sandblaster(path: str | os.PathLike[str], job: Sandblaster) -> dict[str, Any]:
    """Make ``job`` go on from the file, which rank 0 reads. Collective; see ``load_checkpoint``."""
    wanted = _settings(job)

    def wrong(made: Mapping[str, Any]) -> str | None:
        keys = ("mode", "parameters", "optimizer")
        return next(
            (f"{key} is {wanted[key]}, not {made.get(key)}" for key in keys if made.get(key) != wanted[key]), None
        )

    whole: Whole = job.together(LOAD, lambda comm: load_whole(path, comm, wrong))
    arrays = {at[0]: array for at, array in whole.arrays.items()}
    measured = ("loss", "step", "slope")  # the others are counts
    numbers = {
        name: float(x) if name in measured else int(x) for name, x in zip(NUMBERS, arrays.pop("numbers"), strict=True)
    }
    batch = tuple(map(float, arrays.pop("batch"))) or None
    job.load_state_dict({**arrays, "numbers": numbers, "batch": batch, "steps": whole.steps})
    return dict(whole.extra)


def _settings(job: Sandblaster) -> dict[str, Any]:
    return {
        "parameters": {name: [w.dtype.name, list(w.shape)] for name, w in job.model.parameters.items()},
        "optimizer": text_of(job.optimizer),
        "mode": "sandblaster",
        "compression": "none",
        "ranks": 1,
    }
