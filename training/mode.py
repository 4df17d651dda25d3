"""The base of modes, which say when ranks exchange, and what.

A class ``class Name(Mode):`` in ``training/modes/NAME.py`` is registered as ``NAME``. A mode is a frozen dataclass of
settings. Its state is a dict that ``init`` makes: numbers, arrays, and dicts of these; the trainer keeps it, and
checkpoints carry it. A mode uses no more of the trainer than :class:`Trainer` has.

Modes that exchange once in a block of steps share the functions at the end: in between each rank trains alone.

In a ``class Name(FreeMode):`` ranks go each at its own pace, and none waits for the others' steps. It starts what does
the work, a :class:`Running`, which the trainer keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from bitring.registry import Registry
from bitring.settings import Settings

if TYPE_CHECKING:  # the registry of modes is read where MPI is not wanted
    from mpi4py import MPI

    from bitring.collectives.base_plan import Plan
    from bitring.compression.compressor import Compressor
    from bitring.training.step.bucket import Bucket
    from bitring.training.step.replica import Replica

State = dict[str, Any]


class Trainer(Protocol):
    """What a mode may use of the trainer that it is the mode of."""

    @property
    def rank(self) -> int:
        """This rank's number."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def parameters(self) -> dict[str, Any]:
        """Name -> array, to be changed in place."""
        ...

    def agree(self, weight: float, check: Mapping[str, Any] | None = None) -> float:
        """The sum of all ranks' weights. Collective: one small record per rank; must precede ``exchange``.

        Raises on all ranks when any rank had bad arguments or NaN or Inf in a gradient since the last call, or has it
        in the arrays of ``check``, or is at another step.
        """
        ...

    def exchange(
        self, arrays: Mapping[str, Any], scale: float, minus: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The sum over ranks of scale·(arrays − minus), bucket by bucket: name -> array, which may be overwritten.

        Collective. ``arrays`` are only read. Later buckets may travel while earlier ones are used; iterate to the end.
        """
        ...

    def exchange_later(self, arrays: Mapping[str, Any], scale: float, into: Mapping[str, Any]) -> None:
        """Begin such an exchange when the step has been made on all ranks; it goes on between this step and the next.

        Once a step. The sums are in the arrays of ``into``, name -> array, when the mode is called next. ``arrays`` are
        read until the step's end.
        """
        ...

    def update(self, gradients: Mapping[str, Any], at_end: bool = False) -> None:
        """Let the optimizer change the parameters that ``gradients`` names, in place. ``gradients`` are only read.

        ``at_end``: the step uses nothing that the update changes, so that it may be made at the step's end, which saves
        copies of parameters and state; ``gradients`` must stay as they are until then.
        """
        ...

    def restart_optimizer(self) -> None:
        """Forget the optimizer's momentum."""
        ...


class BaseMode(Settings, ABC):
    """What both kinds of modes are; instances are settings and hold no state."""

    def take_over(self, state: State) -> None:
        """Go on with ``state``, of the same mode with other settings, in place."""


class Mode(BaseMode):
    """Base of every mode in which all ranks make the same steps, in which they meet."""

    writes: ClassVar[bool] = True
    """Whether a step changes parameters, or arrays of the state, in other ways than ``trainer.update``."""

    wait_free: ClassVar[bool] = False
    """Whether a step agrees on its weight, and exchanges its gradients scaled by weight over total, before all else.

    Then buckets may travel while gradients of others are computed; see ``DataParallel.begin``.
    """

    def plan(self, bucket: Bucket, comm: MPI.Intracomm, algorithm: str, compression: Compressor | None) -> Plan:
        """A plan that exchanges ``bucket.flat`` in place: the sum, where a mode wants nothing else. Collective."""
        return bucket.plan(comm, algorithm, compression)

    @abstractmethod
    def init(self, trainer: Trainer) -> State:
        """New state. The parameters are equal on all ranks by now."""

    @abstractmethod
    def step(self, trainer: Trainer, state: State, gradients: Mapping[str, Any], weight: float) -> None:
        """One step with this rank's ``gradients``, the mean over ``weight`` samples; both are checked.

        ``weight`` 0 means that this rank takes no part: its batch was empty, or its arguments were bad, which
        ``trainer.agree`` will raise. The gradients are then not to be looked at.

        A step that fails is taken back, and so may raise anywhere. For that, what it changes before ``trainer.agree``
        are numbers in ``state``, and what ``trainer.update`` does; parameters and arrays only after it.
        """

    @abstractmethod
    def synchronize(self, trainer: Trainer, state: State) -> None:
        """Make the parameters equal on all ranks, for a checkpoint or an evaluation. Collective where that needs it."""


class FreeMode(BaseMode):
    """Base of every mode in which each rank makes its steps at its own pace, as many as it likes."""

    in_shared_memory: ClassVar[bool] = False
    """Whether the parameters must be arrays of ``Communicator.empty``."""

    takes_sparse: ClassVar[bool] = False
    """Whether gradients stay ``Sparse`` where they are given so."""

    @abstractmethod
    def start(self, comm: MPI.Intracomm, replica: Replica, compressors: Mapping[str, Compressor | None]) -> Running:
        """Begin to serve. Collective; the parameters are equal on all ranks by now, and the optimizer's state is zeros.

        ``compressors``: what each parameter was asked to travel by. Raises on all ranks what any has against it.
        """


class Running(ABC):
    """A free mode at work on one rank. The steps are each rank's own; what is collective is called by all ranks."""

    @abstractmethod
    def step(self, gradients: Mapping[str, Any], weight: float) -> None:
        """A step with this rank's ``gradients``, checked and finite, the mean over ``weight`` samples; then the clock.

        They may be ``Sparse`` where the mode takes these. ``weight`` 0: there are none. At the end the replica's
        parameters are what the next gradients are to be computed of.
        """

    stands = False
    """Whether the step under way has been made: an interrupt in the rest of it does not undo it."""

    factors: frozenset[str] = frozenset()
    """The parameters whose gradients stay ``Factors`` where they are given so."""

    def ahead(self, gradients: Mapping[str, Any]) -> None:
        """Some of the next step's gradients, checked and finite, which may travel now; ``step`` gets them again."""

    def forget(self) -> None:
        """The step of which gradients came ahead is not made."""

    @abstractmethod
    def miss(self, text: str) -> None:
        """A step of no use: nothing is applied, the clock advances, and all ranks are told ``text``."""

    @abstractmethod
    def told(self) -> str | None:
        """The text that a rank, this one too, has told by ``miss``, each once; None: nothing new."""

    @abstractmethod
    def leave(self) -> None:
        """This rank makes no more steps, and nobody waits for it."""

    def rest(self) -> None:
        """This rank has come to where all meet, to ``synchronize``, and holds nobody back until all have come."""

    @abstractmethod
    def synchronize(self) -> None:
        """Make the parameters equal on all ranks, with all updates applied. Collective."""

    outlives = False
    """Whether it goes on without ranks that die."""

    claims: ClassVar[bool] = False
    """Whether ``claim`` has something to count in."""

    def claim(self, row: tuple[int, ...]) -> int:
        """The next number of a row of numbers, 0, 1, 2, ..., each of which one rank gets. Not collective."""
        raise NotImplementedError

    def gather(self) -> None:
        """Fill the replica's ``optimizer_state``, after ``synchronize``. Collective."""

    def reload(self) -> None:
        """Go on from what the replica was filled with. Collective."""

    @abstractmethod
    def free(self) -> None:
        """End. Collective; the parameters stay as they are."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others."""
        return 0

    @property
    @abstractmethod
    def clocks(self) -> list[float]:
        """Steps that each rank has made, as far as is known here; infinite for one that has left."""

    def telemetry(self) -> dict[str, Any]:
        """What has been counted since the last call."""
        return {}


modes: Registry[BaseMode] = Registry("mode", BaseMode, "training/modes", group="bitring.modes")


def copies(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of each array."""
    return {name: array.copy() for name, array in arrays.items()}


def new_block(trainer: Trainer) -> State:
    """State of a block of steps that ranks make alone: how many, of what weight, and where the block began."""
    return {"steps": 0, "weight": 0.0, "start": copies(trainer.parameters)}


def local_step(trainer: Trainer, state: State, gradients: Mapping[str, Any], weight: float, tau: int) -> None:
    """A step of this rank alone, in a block of ``tau``; nothing changes when ``weight`` is 0."""
    if weight:
        trainer.update(gradients, at_end=state["steps"] + 1 < tau)
    state["steps"] += 1
    state["weight"] += weight


def mean_changes(trainer: Trainer, state: State) -> Iterator[dict[str, Any]]:
    """End the block: the mean over its samples of parameters − start, bucket by bucket; nothing for no samples."""
    total = trainer.agree(state["weight"], trainer.parameters)
    if total:
        yield from trainer.exchange(trainer.parameters, state["weight"] / total, minus=state["start"])
    state["steps"] = 0
    state["weight"] = 0.0
