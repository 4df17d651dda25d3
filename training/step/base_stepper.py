"""What a trainer asks of its steps, whether all ranks make the same ones or each its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from bitring.training.mode import modes
from bitring.training.step.gradient_exchange import GradientExchange
from bitring.training.step.notices import Notices
from bitring.training.step.open_step import OpenStep
from bitring.training.step.replica import Replica
from bitring.training.step.waits import Waits

T = TypeVar("T")


class BaseStepper(ABC):
    """The steps of ``replica`` on ``comm``."""

    compare_at: float = np.inf
    """The step after which they are."""

    def __init__(self, comm: MPI.Intracomm, replica: Replica, exchange: GradientExchange) -> None:
        self.comm = comm
        self.steps = 0
        self.notices = Notices(comm)
        self.waits = Waits()
        self.operation = "step"
        self._where = "", 0, ""
        self._replica = replica
        self._exchange = exchange

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.comm.Get_rank()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.Get_size()

    @property
    def parameters(self) -> dict[str, Any]:
        """Name -> array, to be changed in place."""
        return self._replica.parameters

    @property
    def where(self) -> str:
        """The operation under way, for messages."""
        operation, steps, words = self._where
        if operation != self.operation or steps != self.steps:
            operation, steps = self.operation, self.steps
            words = operation if "checkpoint" in operation else f"DataParallel.{operation} (step {steps})"
            self._where = operation, steps, words
        return words

    def mode_has_changed(self) -> None:
        """The mode has other settings now, and its state may have other arrays."""

    @property
    def compares_now(self) -> bool:
        """Whether the replicas are to be compared after the step just made."""
        return False

    # Steps

    @abstractmethod
    def step(self, gradients: Any, weight: Any) -> None:
        """See ``DataParallel.step``."""

    @abstractmethod
    def begin(self, weight: Any) -> OpenStep:
        """See ``DataParallel.begin``."""

    @abstractmethod
    def ready(self, name: str, gradient: Any) -> None:
        """See ``DataParallel.ready``."""

    @abstractmethod
    def step_opened(self) -> bool:
        """Make the step that is open, if one is."""

    def leave(self) -> None:
        """See ``DataParallel.leave``."""
        mode = modes.name_of(type(self._replica.mode))
        raise RuntimeError(f"DataParallel.leave: in mode {mode} all ranks make equally many steps; none can leave")

    @property
    def claims(self) -> bool:
        """See ``DataParallel.claims``."""
        return False

    def claim(self, row: tuple[int, ...]) -> int:
        """See ``DataParallel.claim``; where it ``claims``."""
        raise NotImplementedError

    def end(self) -> None:
        """The trainer's ``with`` block ends on this rank."""

    # What is told of them

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent so far."""
        return self._exchange.bytes_sent

    @property
    def clocks(self) -> list[float]:
        """See ``DataParallel.clocks``."""
        return [float(self.steps)] * self.comm.Get_size()

    def telemetry(self) -> dict[str, Any]:
        """See ``DataParallel.telemetry``."""
        return {**self._exchange.totals.taken(), **self.waits.taken(), **self._exchange.timeline.taken()}

    # Other operations

    @abstractmethod
    def begin_operation(self, operation: str) -> None:
        """Another operation than the last one. Raises RuntimeError where a step is open."""

    @abstractmethod
    def synchronize(self) -> None:
        """See ``DataParallel.synchronize``."""

    @abstractmethod
    def meet(self, operation: str, error: Exception | None, afresh: bool = False) -> None:
        """See ``DataParallel.meet``."""

    def common_state(self) -> dict[str, Any]:
        """The part of the replica's ``live`` state that all ranks are to have alike."""
        return self._replica.live()

    def collect(self, take: Callable[[], T]) -> T:
        """What ``take`` returns of the whole state."""
        self.synchronize()
        return take()

    def put_in(self, load: Callable[[], None]) -> None:
        """Call ``load``, which fills the state, while no step is made."""
        load()

    @abstractmethod
    def restore(self, values: Mapping[tuple[str, ...], Any], steps: int) -> None:
        """Fill leaves of the state, by path; ``steps`` have been made. ``reload`` must follow."""

    def reload(self) -> None:
        """Go on from what was filled in."""

    def free(self) -> None:
        """The trainer is freed."""
        self.begin_operation("free")
