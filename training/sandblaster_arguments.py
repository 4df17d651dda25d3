"""What Sandblaster is given, checked: its arguments, and states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitring.errors import MismatchError
from bitring.models.dropout import Dropout
from bitring.models.model import Model
from bitring.settings import Range, checked
from bitring.training.lbfgs import LBFGS, NUMBERS


def checked_arguments(model: Any, optimizer: Any, portions: Any, backups: Any, survives: Any) -> tuple[int, Any]:
    """The number of the model's values, and their dtype."""
    if not isinstance(optimizer, LBFGS):
        raise TypeError(f"Sandblaster: optimizer must be bitring.LBFGS; got {type(optimizer).__name__}")
    checked("Sandblaster", "portions", portions, int, Range(least=1))
    checked("Sandblaster", "backups", backups, bool)
    checked("Sandblaster", "survives", survives, bool)
    parameters = getattr(model, "parameters", None)
    if not isinstance(parameters, Mapping) or not parameters or not hasattr(model, "loss_and_gradients"):
        raise TypeError(
            f"Sandblaster: model must have parameters, a dict of arrays, and loss_and_gradients; "
            f"got {type(model).__name__}"
        )
    nodes = model.nodes if isinstance(model, Model) else []
    drawing = [each.name for each in nodes if isinstance(each.layer, Dropout) and each.layer.rate > 0]
    if drawing:
        raise ValueError(
            f"Sandblaster: the loss of equal parameters must be equal, as a line search compares it; {drawing[0]} is "
            "a Dropout, which draws anew in every call"
        )
    for name, w in parameters.items():
        if not isinstance(w, np.ndarray) or w.dtype not in (np.float32, np.float64):
            kind = w.dtype if isinstance(w, np.ndarray) else type(w).__name__
            raise TypeError(f"Sandblaster: parameter {name!r} must be a NumPy array of float32 or float64; got {kind}")
    dtypes = {w.dtype for w in parameters.values()}
    if len(dtypes) > 1:
        raise TypeError(f"Sandblaster: parameters must be of one dtype; got {sorted(map(str, dtypes))}")
    return sum(w.size for w in parameters.values()), dtypes.pop()


def require_groups(model: Any, placement: Any, replicas: Any, ranks: int) -> None:
    """Raise TypeError or ValueError where ``replicas`` of so many ranks cannot split the model."""
    checked("Sandblaster", "replicas", replicas, int, Range(least=1))
    if placement is None:
        if replicas != 1:
            raise ValueError(f"Sandblaster: replicas needs a placement, each rank is one without it; got {replicas}")
        return
    if not isinstance(model, Model):
        raise TypeError(f"Sandblaster: model must be a bitring.Model to be split; got {type(model).__name__}")
    if isinstance(placement, str) and placement == "auto":
        raise ValueError("Sandblaster: placement must be named, portions are too many to try; got 'auto'")
    if ranks % replicas:
        raise ValueError(f"Sandblaster: replicas must divide the {ranks} ranks; got {replicas}")


def require_alike(mine: Mapping[str, Any], everyone: Sequence[Mapping[str, Any]]) -> None:
    """Raise MismatchError where a rank has others than this one."""
    for rank, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != mine[key] or type(value) is not type(mine[key]):
                raise MismatchError(f"Sandblaster: {key} is {value} on rank {rank}, {mine[key]} on another")


def require_state(state: Mapping[str, Any], size: int, optimizer: LBFGS) -> None:
    """Raise ValueError where a state is not of ``size`` values and this optimizer."""
    where = "Sandblaster.load_state_dict"
    for key in ("parameters", "gradient", "s", "y", "gram", "numbers", "batch", "steps"):
        if key not in state:
            raise ValueError(f"{where}: state has no {key!r}")
    if np.shape(state["parameters"]) != (size,):
        raise ValueError(f"{where}: state has {np.size(state['parameters'])} parameters, the model {size}")
    wanted = (2 * optimizer.memory + 1,) * 2
    if np.shape(state["gram"]) != wanted:
        raise ValueError(f"{where}: state is of memory {len(state['gram']) // 2}, not {optimizer.memory}")
    if np.shape(state["gradient"]) != (size,):
        raise ValueError(f"{where}: gradient must be of shape ({size},), got {np.shape(state['gradient'])}")
    numbers = state["numbers"]
    if not isinstance(numbers, Mapping) or set(numbers) != set(NUMBERS):
        raise ValueError(f"{where}: numbers must be a dict of {', '.join(NUMBERS)}")
    pairs = numbers["pairs"]
    for name in ("s", "y"):
        if np.shape(state[name]) != (pairs, size):
            raise ValueError(f"{where}: {name} must be of shape ({pairs}, {size}), got {np.shape(state[name])}")
