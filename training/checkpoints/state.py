"""The parts of a trainer that a checkpoint holds, by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitring.training.data_parallel import DataParallel
from bitring.training.step.bucket import Bucket
from bitring.training.tree import Path, host_copy, is_array, leaves


def require_trainer(trainer: object, function: str) -> None:
    """Raise TypeError, naming ``function``, for anything but a trainer."""
    if not isinstance(trainer, DataParallel):
        raise TypeError(
            f"{function}: trainer must be a DataParallel, ModelParallel or Sandblaster; got {type(trainer).__name__}"
        )


def kept_by(trainer: DataParallel) -> dict[Path, Any]:
    """This rank's arrays by path: parameters, optimizer, mode, and what the compressed plans keep, by parameter."""
    kept = {at: x for at, x in leaves(trainer.live()) if is_array(x)}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        if bucket.compressed:
            state = plan.state_dict()
            if "residual" in state:
                kept |= {("residual", name): part for name, part in bucket.unflatten(state["residual"])}
            for at, key in alike_in(bucket, state).items():
                # One number for all buckets; that of one which has stopped compressing stays behind.
                kept[at] = np.maximum(kept[at], state[key]) if at in kept else state[key]
    return kept


def alike_in(bucket: Bucket, state: Mapping[str, Any]) -> dict[Path, str]:
    """The parts of a compressed plan's state that are identical on all ranks: path -> key.

    Keys may end in a parameter's number.
    """
    names = list(bucket.shapes)
    common: dict[Path, str] = {}
    for key in state:
        if key not in ("residual", "owner_residual"):
            kind, _, number = key.partition("/")
            common[("compression", kind, names[int(number)]) if number else ("compression", kind)] = key
    return common


def numbers_of(trainer: DataParallel) -> dict[Path, Any]:
    """The numbers of its state, identical on all ranks between two blocks."""
    return {at: x for at, x in leaves(trainer.live()) if not is_array(x)}


def with_owners(trainer: DataParallel) -> dict[str, tuple[Bucket, Any]]:
    """The buckets whose sums have owners, which keep residuals: their numbers, as text -> bucket and plan."""
    pairs = enumerate(zip(trainer.buckets, trainer.plans, strict=True))
    return {
        str(number): (bucket, plan)
        for number, (bucket, plan) in pairs
        if bucket.compressed and "owner_residual" in plan.state_dict()
    }


def on_host(x: Any) -> Any:
    """The values in a C-contiguous NumPy array, which is not to be changed."""
    return x if isinstance(x, np.ndarray) and x.flags.c_contiguous else host_copy(x)


def bytes_of(array: Any) -> Any:
    """The bytes of a C-contiguous NumPy array, in place."""
    return array.reshape(-1).view(np.uint8)
