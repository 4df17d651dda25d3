"""Checkpoints of a Sandblaster: its whole vectors in one file of the usual format, on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import broadcast
from bitring.collectives.runtime.pieces import split
from bitring.training.checkpoints.file import CheckpointFile, CheckpointWriter, file_path
from bitring.training.checkpoints.header import FORMAT, CheckpointError
from bitring.training.checkpoints.resharding import Part
from bitring.training.sandblaster import NUMBERS, Sandblaster
from bitring.training.step.checks import text_of

SAVE, LOAD = "save_checkpoint", "load_checkpoint"

_KEPT_FILES = 2
_VECTORS = ("parameters", "gradient", "s", "y", "gram")


def save_sandblaster(path: str | os.PathLike[str], job: Sandblaster, extra: Mapping[str, Any], versions: Any) -> None:
    """Write all that ``job`` needs to go on. Collective; see ``save_checkpoint``."""
    state = job.state_dict()
    arrays = {name: np.ascontiguousarray(state[name], np.float64) for name in _VECTORS}
    arrays["numbers"] = np.array(list(state["numbers"].values()), np.float64)
    arrays["batch"] = np.array(state["batch"] or (), np.float64)

    def write() -> None:
        if job.rank:
            return
        with CheckpointWriter(file_path(path, SAVE), _KEPT_FILES) as writer:
            for name, array in arrays.items():
                writer.begin(name, array.dtype, array.shape)
                writer.write(array.reshape(-1).view(np.uint8))
            header = {
                "format": FORMAT,
                "settings": _settings(job),
                "algorithms": [],
                "steps": state["steps"],
                "numbers": [],
                "ranks": [[[[name], name] for name in arrays]],
                "owner_residuals": [],
                "extra": extra,
                "versions": versions,
            }
            writer.finish(header)

    jointly(job.comm, SAVE, write, alike=(OSError,))


def load_sandblaster(path: str | os.PathLike[str], job: Sandblaster) -> dict[str, Any]:
    """Make ``job`` go on from the file, which rank 0 reads. Collective; see ``load_checkpoint``."""
    alike = (OSError, CheckpointError)

    def read() -> Any:
        if job.rank:
            return None
        with CheckpointFile(file_path(path, LOAD)) as file:
            made, wanted = file.header.settings, _settings(job)
            for key in ("mode", "parameters", "optimizer"):
                if made.get(key) != wanted[key]:
                    raise file.error(f"belongs to other training: here, {key} is {wanted[key]}, not {made.get(key)}")
            for piece in split(file.sizes):
                file.check(piece)
            arrays = {name: _array(file, name) for name in (*_VECTORS, "numbers", "batch")}
            return arrays, file.header.extra, file.header.steps

    arrays, extra, steps = broadcast(job.comm, jointly(job.comm, LOAD, read, alike), LOAD)
    measured = ("loss", "step", "slope")  # the others are counts
    numbers = {
        name: float(x) if name in measured else int(x) for name, x in zip(NUMBERS, arrays.pop("numbers"), strict=True)
    }
    batch = tuple(map(float, arrays.pop("batch"))) or None
    job.load_state_dict({**arrays, "numbers": numbers, "batch": batch, "steps": steps})
    return dict(extra)


def _array(file: CheckpointFile, name: str) -> Any:
    dtype, shape = file.kind(name)
    values = int(np.prod(shape))
    share = (Part((name,), 0, values),)
    return np.frombuffer(file.read(share, np.dtype(dtype), 0, values * 8), dtype).reshape(shape).copy()


def _settings(job: Sandblaster) -> dict[str, Any]:
    return {
        "parameters": {name: [w.dtype.name, list(w.shape)] for name, w in job.model.parameters.items()},
        "optimizer": text_of(job.optimizer),
        "mode": "sandblaster",
        "compression": "none",
        "ranks": 1,
    }
