"""Checkpoints of a ModelParallel: whole arrays, to go on from under any placement and number of replicas."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from bitring.training.checkpoints.header import CheckpointError
from bitring.training.checkpoints.whole_file import Whole, load_whole, save_whole
from bitring.training.model_parallel import ModelParallel
from bitring.training.placement.whole_state import KINDS
from bitring.training.step.checks import difference, resumable
from bitring.training.tree import is_array, leaves


def save_model_parallel(
    path: str | os.PathLike[str], trainer: ModelParallel, extra: Mapping[str, Any], versions: Any, keep: int
) -> None:
    """Write all that ``trainer`` needs to go on. Collective; see ``save_checkpoint``."""
    state = trainer.state_dict()
    steps = state.pop("steps")
    found = dict(leaves(state))
    arrays = {at: x for at, x in found.items() if is_array(x)}
    numbers = {at: x for at, x in found.items() if not is_array(x)}
    save_whole(path, trainer.comm, Whole(arrays, numbers, trainer.describe(), steps, extra), versions, keep)


def load_model_parallel(path: str | os.PathLike[str], trainer: ModelParallel) -> dict[str, Any]:
    """Make ``trainer`` go on from the file, which rank 0 reads. Collective; see ``load_checkpoint``."""
    mine = trainer.describe()
    whole = load_whole(path, trainer.comm, lambda made: difference(resumable(mine), resumable(made)))
    state: dict[str, Any] = {kind: {} for kind in KINDS}
    if odd := {at[0] for at in whole.arrays} - set(KINDS):
        raise CheckpointError(f"load_checkpoint: {os.fspath(path)} holds {min(odd)}, which a ModelParallel has not")
    for at, x in {**whole.arrays, **whole.numbers}.items():
        tree = state
        for key in at[:-1]:
            tree = tree.setdefault(key, {})
        tree[at[-1]] = x
    trainer.load_state_dict({**state, "steps": whole.steps})
    return dict(whole.extra)
