"""Binomial tree: the sum climbs to rank 0 in ⌈lg p⌉ rounds, and the result comes down the same tree.

In round k of reduce, every rank whose lowest set bit is 2ᵏ sends its whole buffer to the rank with that bit cleared.
With n bytes on p ranks reduce takes ⌈lg p⌉(α + nβ + nγ), broadcast ⌈lg p⌉(α + nβ), AllReduce both: few messages (p−1
each way), so it suits small buffers and a single root; the whole buffer crosses every level, so it does not suit large
ones. See Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005).
"""

from __future__ import annotations

from collections.abc import Iterator

from bitring.collectives.schedules.schedule import Algorithm, Receive, Round, Send


class BinomialTree(Algorithm):
    """Binomial-tree reduce and broadcast, and AllReduce as one after the other."""

    def chunks(self, size: int) -> int:
        """The whole buffer travels as one."""
        return 1

    def allreduce(self, rank: int, size: int) -> Iterator[Round]:
        """Reduce to rank 0, then broadcast: rank 0 alone makes the result, so all ranks hold the same bits."""
        yield from self.reduce(rank, size)
        yield from self.broadcast(rank, size)

    def reduce(self, rank: int, size: int) -> Iterator[Round]:
        """Receive from the children rank+1, rank+2, rank+4, …, smallest subtree first, then send to the parent."""
        bit = 1
        while bit < size:
            if rank & bit:
                yield (Send(rank - bit, 0, 1),)
                return
            if rank + bit < size:
                yield (Receive(rank + bit, 0, 1, reduce=True),)
            bit *= 2

    def broadcast(self, rank: int, size: int) -> Iterator[Round]:
        """Receive from the parent, then send to the children, largest subtree first: it has the longest way to go."""
        bit = 1
        while bit < size and not rank & bit:
            bit *= 2
        if rank:
            yield (Receive(rank - bit, 0, 1, reduce=False),)
        while bit > 1:
            bit //= 2
            if rank + bit < size:
                yield (Send(rank + bit, 0, 1),)
