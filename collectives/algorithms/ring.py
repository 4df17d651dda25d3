"""Ring: every rank talks to its two neighbours only, and every link carries data in every round.

With n bytes on p ranks (Patarasu and Yuan, 2009): reduce-scatter in p−1 rounds, chunk c travelling once round the ring
and growing by one contribution per hop, then allgather in p−1 rounds. AllReduce takes
2(p−1)α + 2(p−1)/p·nβ + (p−1)/p·nγ: bandwidth-optimal for every p, with a latency that grows with p. Broadcast and
reduce run along the chain 0, 1, …, p−1, pipelined by segments.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitring.collectives.schedules.schedule import Algorithm, Receive, Round, Send


class Ring(Algorithm):
    """Ring AllReduce, reduce-scatter and allgather; chain broadcast and reduce."""

    alike = True

    def chunks(self, size: int) -> int:
        """One chunk per rank."""
        return size

    def reduce_scatter(self, rank: int, size: int) -> Iterator[Round]:
        """Rank r passes on chunk r−1−i in round i and ends with chunk r whole."""
        for i in range(size - 1):
            out, into = (rank - 1 - i) % size, (rank - 2 - i) % size
            yield (
                Send((rank + 1) % size, out, out + 1),
                Receive((rank - 1) % size, into, into + 1, reduce=True),
            )

    def allgather(self, rank: int, size: int) -> Iterator[Round]:
        """Rank r passes on chunk r−i in round i."""
        for i in range(size - 1):
            out, into = (rank - i) % size, (rank - 1 - i) % size
            yield (
                Send((rank + 1) % size, out, out + 1),
                Receive((rank - 1) % size, into, into + 1, reduce=False),
            )

    def reduce(self, rank: int, size: int) -> Iterator[Round]:
        """The chain towards rank 0."""
        if rank < size - 1:
            yield (Receive(rank + 1, 0, size, reduce=True),)
        if rank > 0:
            yield (Send(rank - 1, 0, size),)

    def broadcast(self, rank: int, size: int) -> Iterator[Round]:
        """The chain away from rank 0."""
        if rank > 0:
            yield (Receive(rank - 1, 0, size, reduce=False),)
        if rank < size - 1:
            yield (Send(rank + 1, 0, size),)

    def sent(self, size: int) -> float:
        """Two chunks of each ``size`` but one."""
        return 2 * (size - 1) / size
