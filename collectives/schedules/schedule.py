"""A collective algorithm as data: who sends which chunk to whom, in which round. No MPI and no arrays in it.

A buffer is cut into ``algorithm.chunks(size)`` chunks; chunk c of n values holds the values from n·c//C to n·(c+1)//C.
A schedule is what one rank does: an iterable of rounds, made lazily. A round is a tuple of transfers, each a
:class:`Send` or a :class:`Receive` of a range of consecutive chunks. The meaning of a round:

* every send reads its chunks as they are when the round begins, before any receive of the same round is applied;
* a receive either replaces its chunks or reduces into them; receives of one round are applied in the order written;
* a reduction puts the lower rank's operand first, so that two ranks which add each other's values get the same bits;
* rounds order the data and are no barriers: a rank may be several rounds ahead where the data allows.

The k-th send from a to b meets the k-th receive at b from a, and both name the same chunks; no rank sends to itself.
One global order must exist: if a transfer is in round i of the sender and round j of the receiver, both may be taken
at once without any rank waiting for a later round of its own (``check.py`` proves it, with sends
that complete only when they are received). The same schedule is run by an executor, checked, costed, and drawn.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Literal, NamedTuple, Protocol

from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.topology import Topology
from bitring.registry import Registry


class Send(NamedTuple):
    """Send chunks ``first`` to ``last``-1 to rank ``peer``."""

    peer: int
    first: int
    last: int


class Receive(NamedTuple):
    """Receive chunks ``first`` to ``last``-1 from rank ``peer``; ``reduce`` adds to what is there, else replaces it."""

    peer: int
    first: int
    last: int
    reduce: bool


Transfer = Send | Receive
Round = tuple[Transfer, ...]
Schedule = Iterable[Round]


class Estimate(NamedTuple):
    """Estimated ``seconds`` of an AllReduce. ``how``: a description where that is more than the algorithm's name.

    It begins with the name of an algorithm that sends as many bytes, and a comma.
    """

    seconds: float
    how: str = ""


class Network(Protocol):
    """The network that an algorithm's estimate is made from.

    A message of m bytes takes ``alpha`` + m·``beta`` seconds, reducing m bytes ``gamma``·m.
    """

    topology: Topology
    alpha: float
    beta: float
    gamma: float

    def clock(self, algorithm: Algorithm, size: int, nbytes: int) -> float:
        """Seconds of the schedule of an AllReduce of ``nbytes`` among ``size`` ranks, one per node."""
        ...

    def node_seconds(self, nbytes: int) -> float:
        """Seconds of a sum of ``nbytes`` of each of a node's ranks through the memory they share."""
        ...


class Algorithm(ABC):
    """Base of every collective algorithm. A subclass in ``collectives/algorithms/NAME.py`` is registered as ``NAME``.

    A subclass defines those of the collectives below that the algorithm has; each is a generator of the rounds of
    ``rank`` among ``size`` ranks. What each must achieve, for C = ``chunks(size)`` chunks:

    * ``allreduce``: every chunk on every rank ends as the reduction over all ranks, each contribution exactly once;
    * ``reduce_scatter``: as above for chunk r on rank r (C = size; other chunks end undefined);
    * ``allgather``: chunk r starts on rank r; every rank ends with every chunk (C = size);
    * ``reduce``: every chunk on rank 0 ends reduced (others undefined);
    * ``broadcast``: every chunk ends as rank 0's.

    Roots other than 0 are served by renumbering ranks. ``tests/test_schedule.py`` checks every registered algorithm
    for 1 to 64 ranks the moment its file exists.

    That is all that most algorithms need. What else a choice, a run and a prediction ask of each is below, with the
    answers of one that has a schedule; one that is run in another way gives its own.
    """

    runner: ClassVar[str | None] = None
    """The runner, ``"module:name"``, called as ``execution.runner.MakeRunner``; None: an executor, its schedule."""

    library: ClassVar[bool] = False
    """Whether it hands calls on to the MPI library, which reads the caller's own arguments."""

    self_checking: ClassVar[bool] = False
    """Whether ranks find out in a run itself that all mean the same, so that nothing need come before it."""

    fusion: ClassVar[Literal["values", "pieces"] | None] = "values"
    """Fusion of small plans that are started together. ``"values"``: copied together; ``"pieces"``: in place, by a
    runner that has ``operands``; None: each runs by itself."""

    sets_up: ClassVar[bool] = False
    """Whether all ranks take part in making its runner."""

    alike: ClassVar[bool] = False
    """Whether all ranks do the same in each round, at least if they are a power of two: it is quick to clock then."""

    pipelined: ClassVar[bool] = True
    """Whether it gains from cutting messages into segments; without, a round waits for whole messages anyway."""

    @abstractmethod
    def chunks(self, size: int) -> int:
        """Number of chunks that a buffer is cut into among ``size`` ranks."""

    def allreduce(self, rank: int, size: int) -> Iterator[Round]:
        """Rounds of AllReduce; by default the algorithm's reduce-scatter followed by its allgather."""
        yield from self.reduce_scatter(rank, size)
        yield from self.allgather(rank, size)

    def reduce_scatter(self, rank: int, size: int) -> Iterator[Round]:
        """Rounds of reduce-scatter."""
        raise NotImplementedError

    def allgather(self, rank: int, size: int) -> Iterator[Round]:
        """Rounds of allgather."""
        raise NotImplementedError

    def reduce(self, rank: int, size: int) -> Iterator[Round]:
        """Rounds of reduce to rank 0."""
        raise NotImplementedError

    def broadcast(self, rank: int, size: int) -> Iterator[Round]:
        """Rounds of broadcast from rank 0."""
        raise NotImplementedError

    @classmethod
    @functools.cache
    def collectives(cls) -> tuple[str, ...]:
        """Names of the collectives that this algorithm has a schedule for; empty where something else runs it."""
        own = {name for name in COLLECTIVES if getattr(cls, name) is not getattr(Algorithm, name)}
        if {"reduce_scatter", "allgather"} <= own:
            own.add("allreduce")
        return tuple(name for name in COLLECTIVES if name in own)

    @classmethod
    def serves(cls) -> tuple[str, ...]:
        """Names of the collectives that it can run, by a schedule or otherwise."""
        return cls.collectives()

    @classmethod
    def missing(cls, query: Query) -> str | None:
        """The reason why it cannot run there, in words that follow its name and "but"; None: it can."""
        if not query.own:
            return "only the MPI library serves this operation on this dtype"
        if query.collective not in cls.serves():
            return f"has no {query.collective}"
        return None

    def estimate(self, network: Network, nbytes: int) -> Estimate | None:
        """The estimate of an AllReduce of ``nbytes`` there.

        None where that is not known: of schedules where nodes have several ranks, as no messages inside a node are.
        """
        if network.topology.lanes > 1:
            return None
        return Estimate(network.clock(self, network.topology.size, nbytes))

    def sent(self, size: int) -> float | None:
        """Bytes that the busiest of ``size`` ranks sends in an AllReduce, over the buffer's; None: see its schedule.

        Of an algorithm that sums inside the nodes first, ``size`` is the number of nodes.
        """
        return None


COLLECTIVES = ("allreduce", "reduce_scatter", "allgather", "reduce", "broadcast")

algorithms: Registry[Algorithm] = Registry("algorithm", Algorithm, "collectives/algorithms", group="bitring.algorithms")


def rounds(algorithm: Algorithm, collective: str, rank: int, size: int, root: int = 0) -> Iterator[Round]:
    """The rounds of ``rank``, renumbered so that ``root`` plays rank 0."""
    make: Callable[[int, int], Iterator[Round]] = getattr(algorithm, collective)
    if root == 0:
        yield from make(rank, size)
        return
    for transfers in make((rank - root) % size, size):
        yield tuple(transfer._replace(peer=(transfer.peer + root) % size) for transfer in transfers)


def chunk_start(n: int, chunks: int, c: int) -> int:
    """First value of chunk ``c`` when ``n`` values are cut into ``chunks``; chunk c ends where c + 1 starts."""
    return n * c // chunks
