"""Where a store's values live, and who applies an update: what a store asks of either, whatever the way.

``messages`` has the way by messages between ranks, which serves everywhere and is the reference; ``shared`` that in the
memory of a node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mpi4py import MPI

from bitring.compression.encoder import Encoder
from bitring.training.optimizer import Optimizer
from bitring.training.store.replay import NO_JOURNAL, Journal
from bitring.training.store.rule import Terms


@dataclass(frozen=True)
class Setup:
    """What a table is made of, the same on all ranks of ``comm``. ``what``: the store's name, for messages.

    ``values``: name -> NumPy array. ``servers``: so many ranks, the first ones, have shards; None: all. ``clocks``:
    those that ranks begin with; None: 0. ``encoders``: what parameters travel encoded by, both ways. ``factors``: the
    parameters whose gradients may travel as ``Factors``, which owners multiply. ``call``: what pushes and reads are
    called in messages, where they are one call. ``journal``: of what shards do. ``cache``: rows that were read
    are kept, and serve reads as long as a staleness allows it, where values are reached by messages. ``copies``: how
    many ranks beside its owner have each shard, 0 or 1.
    """

    comm: MPI.Intracomm
    what: str
    values: Mapping[str, Any]
    optimizer: Optimizer
    terms: Terms
    servers: int | None = None
    clocks: Sequence[int] | None = None
    encoders: Mapping[str, Encoder | None] = field(default_factory=dict[str, Encoder | None])
    factors: frozenset[str] = frozenset()
    call: str | None = None
    journal: Journal = NO_JOURNAL
    cache: bool = False
    copies: int = 0


class Update(NamedTuple):
    """Gradients for the store's optimizer, of ``weight`` samples.

    ``gradients``: name -> C-contiguous array, like the parameter or like its ``rows``, of which the table keeps at most
    copies; or ``Factors`` of the whole, where the table takes them.
    ``rows``: name -> 1-D int64, sorted, each once; a parameter that is not in it comes whole.
    """

    gradients: Mapping[str, Any]
    rows: Mapping[str, Any]
    weight: float = 1.0


class Table(ABC):
    """The values of a store and its optimizer's slots, as one rank uses them, in one thread at a time.

    The rank's own clock moves by ``tick``; what it pushed before is of the clock before. Every wait serves the others,
    can be interrupted by Ctrl-C, ends with DeadRankError where a rank has died, and is under BITRING_TIMEOUT.
    """

    def __init__(self, setup: Setup) -> None:
        self._what = setup.what
        self._terms = setup.terms
        self._rank, self._size = setup.comm.Get_rank(), setup.comm.Get_size()
        self.outlives = bool(setup.copies)
        """Whether it goes on without ranks that die."""

    @abstractmethod
    def wait_for_room(self) -> None:
        """Wait while this rank has too many updates under way: then ``push`` does not wait."""

    @abstractmethod
    def push(self, update: Update) -> None:
        """Hand in an update. Waits for room."""

    factors: frozenset[str] = frozenset()
    """The parameters whose gradients may be ``Factors``."""

    def push_ahead(self, gradients: Mapping[str, Any]) -> bool:
        """Hand in some of the gradients of the next update, which ``push`` completes; they are applied with it.

        Waits for room. Returns False where they are to come with the others.
        """
        return False

    def forget_ahead(self) -> None:
        """There is no update for what was pushed ahead: nothing remains of it."""

    @abstractmethod
    def tick(self) -> None:
        """This rank's clock moves on by one."""

    @abstractmethod
    def pull(self, wanted: Mapping[str, Any] | None = None, least: int | None = None) -> dict[str, Any]:
        """Values as the rule allows, in new arrays.

        ``wanted``: name -> None for a whole parameter, or rows, 1-D int64, sorted, each once; None: everything.
        ``least``: wait for these clocks of all ranks, whatever the rule says.
        """

    @abstractmethod
    def wait_for_clocks(self, least: int) -> None:
        """Wait until every rank's clock is at least this."""

    def wait_for_slowest(self) -> None:
        """Wait where this rank's next clock would be more than ``staleness`` + 1 ahead of the slowest rank's."""
        if self._terms.staleness is not None:
            self.wait_for_clocks(int(self.clocks[self._rank]) - self._terms.staleness)

    @abstractmethod
    def leave(self) -> None:
        """This rank pushes nothing more; nobody waits for it."""

    @abstractmethod
    def settle(self) -> dict[str, Any]:
        """Wait for all ranks; then everything is applied, and all have the same values, which are returned. Collective.

        Clocks are equal afterwards, but for those who have left. Meanwhile this rank holds nobody back.
        """

    @abstractmethod
    def slots(self) -> dict[str, dict[str, Any]]:
        """The optimizer's slots, whole: slot -> name -> new array. Collective, right after ``settle``."""

    @abstractmethod
    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from these, which are the same on all ranks. Collective."""

    @abstractmethod
    def use(self, optimizer: Optimizer) -> None:
        """From now on these settings hold for this rank's updates."""

    @abstractmethod
    def claim(self, row: tuple[int, ...]) -> int:
        """The next number of a row of numbers, 0, 1, 2, ..., each of which one rank gets."""

    @abstractmethod
    def trouble(self, text: str, step: int) -> None:
        """Tell all ranks what was wrong with this rank's update of this step."""

    @abstractmethod
    def told(self, step: float) -> str | None:
        """The first thing that a rank, this one included, has told by ``trouble`` of an earlier step than this.

        All others of earlier steps are forgotten with it. None when there is nothing new.
        """

    @abstractmethod
    def end(self) -> bool:
        """This rank does nothing more; nobody waits for it. Returns whether others need it all the same."""

    @abstractmethod
    def free(self, waits: bool = True) -> None:
        """The end, unless it is over. Collective. ``waits``: whether a wait for the others is one that may time out.

        After an interrupt it may be called again.
        """

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether it has ended on all ranks."""

    @property
    @abstractmethod
    def clocks(self) -> list[float]:
        """Every rank's clock, as far as this one knows; infinite for those who have left."""

    @property
    @abstractmethod
    def ended(self) -> list[int]:
        """The ranks that have freed it, or have ended, as far as this one knows."""

    @property
    @abstractmethod
    def residuals(self) -> dict[str, Any]:
        """What this rank's encoded updates have left out: name -> array like the parameter, in use."""

    @property
    @abstractmethod
    def nbytes_sent(self) -> int:
        """Bytes that this rank has sent to others so far."""

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """What this rank's part has done: ``staleness`` (of the updates applied: staleness -> how many), ``applied``,
        ``dropped``, ``wait_seconds``, ``waited_for``: rank -> seconds of these that were for it, at last, and, with a
        cache, ``cached_rows``, how many reads of a row it served."""
