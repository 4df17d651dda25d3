"""``average_gradients``: the mean of a module's gradients, in one call after backward()."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from mpi4py import MPI

from bitring.collectives.runtime.context import context_of, given_comm
from bitring.torch.averager import GradientAverager

_averagers: weakref.WeakKeyDictionary[Any, dict[Any, GradientAverager]] = weakref.WeakKeyDictionary()


def average_gradients(module: Any, *, comm: MPI.Intracomm | None = None, weight: float = 1.0, **options: Any) -> None:
    """Make each gradient of ``module`` its mean over all ranks, weighted by ``weight``. Collective.

    To be called after backward(). ``options`` are GradientAverager's, such as ``compression``; what a compressed
    exchange left out is kept with the module and added in the next call with the same options. Parameters are not
    touched. Raises as ``GradientAverager`` and its ``average`` do.
    """
    comm = given_comm(comm, "average_gradients")
    key = context_of(comm), tuple(sorted((name, _identity(value)) for name, value in options.items()))
    averager: GradientAverager | None = None
    with contextlib.suppress(TypeError):  # of what is no module; GradientAverager says so, on all ranks
        averager = _averagers.setdefault(module, {}).get(key)
    if averager is None:
        averager = GradientAverager(module, comm=comm, broadcast=False, **options)
        _averagers[module][key] = averager
    averager.average(weight)


def _identity(option: Any) -> str:
    """What tells options apart: settings by what they say, tensors and scalers by which they are."""
    if isinstance(option, Mapping):
        return str({name: _identity(value) for name, value in option.items()})
    if isinstance(option, torch.Tensor):
        return str(id(option))
    return str(option)
