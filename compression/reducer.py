"""Base of all reducers: a gradient's small representation that can be summed, exchanged by exact AllReduces.

A reducer object is settings, a frozen dataclass. Bound to a plan's buffer it becomes a reduction, which has the memory,
the state (residuals, warm starts, counters) and the steps of a run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitring.arrays import Array, all_finite, device_of
from bitring.compression.compressor import Compressor
from bitring.compression.exchange.run_stats import RunStats
from bitring.compression.factors import Factors

if TYPE_CHECKING:  # settings need no MPI
    from bitring.collectives.interop.steps import Progress, Steps
    from bitring.compression.exchange.exchange import Exchange


class Reduction(ABC):
    """A reducer bound to ``parameters``, the parts of a buffer: views of it, one for each parameter."""

    why = ""
    """A description of how it serves these parameters."""

    def __init__(self, parameters: Sequence[Array]) -> None:
        self.parameters = list(parameters)
        self.state: dict[str, Array] = {}
        """Arrays that it carries from run to run; changed in place.

        ``residual``, if there is one, has a value for each of the buffer. All else is identical on all ranks, and is a
        parameter's own where the key ends in ``/`` and the parameter's number.
        """
        self.stats = RunStats()
        """Stats of this run. ``steps`` records its times of encoding and decoding; the plan records the rest."""

    @abstractmethod
    def steps(self, progress: Progress) -> Steps:
        """One run, in place on the buffer; not called where there is one rank."""

    def take(self, number: int, factors: Factors) -> None:
        """Take the values of a parameter as ``factors``, for the next run."""
        factors.multiply(self.parameters[number])

    def drop(self) -> None:
        """Forget the factors that ``take`` was given: the run is not made."""

    def finish(self) -> None:
        """One run where there is one rank: bring the buffer up to date."""

    def finite(self) -> bool:
        """Whether the next run's values hold neither NaN nor Inf."""
        return all(all_finite(values.reshape(-1)) for values in self.parameters)


class Reducer(Compressor, ABC):
    """Base of every reducer. A subclass in ``compression/reducers/NAME.py`` is registered as ``NAME``.

    ``tests/test_reducers.py`` checks every registered reducer the moment its file exists.
    """

    @abstractmethod
    def check(self, flat: Array) -> None:
        """Raise TypeError for a buffer that cannot be served."""

    @abstractmethod
    def bind(self, flat: Array, parameters: Sequence[Array], exchange: Exchange) -> Reduction:
        """A reduction of ``flat``, whose parts are ``parameters``. Collective."""


def check_host(reducer: Reducer, flat: Array) -> None:
    """Raise TypeError for device memory."""
    if device_of(flat) is not None:
        name = type(reducer).__name__
        raise TypeError(f"plan_allreduce: {name} is for host memory; got x in device memory")


def unflatten(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """The parts of ``flat``, one behind the other, as views of the given shapes."""
    parts: list[Array] = []
    start = 0
    for shape in shapes:
        stop = start + math.prod(shape)
        parts.append(flat[start:stop].reshape(shape))
        start = stop
    return parts
