"""Recursive doubling: in round k every rank exchanges its whole buffer with the rank 2ᵏ away, and both add.

With n bytes on p = 2ᵏ ranks AllReduce takes lg p·(α + nβ + nγ): the fewest rounds possible, so it is the choice for
small buffers. For other p, let q be the largest power of two below p: p−q ranks first hand their buffer to a
neighbour (α + nβ + nγ) and get the result back last (α + nβ). See Thakur, Rabenseifner and Gropp, "Optimization of
collective communication operations in MPICH" (2005).

Both partners of an exchange add the same two operands, in rank order, so all ranks end with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitring.collectives.schedules.schedule import Algorithm, Receive, Round, Send


class RecursiveDoubling(Algorithm):
    """Recursive-doubling AllReduce. (Its allgather needs a chunk per rank: ``rabenseifner`` has it.)"""

    alike = True

    def chunks(self, size: int) -> int:
        """The whole buffer travels as one."""
        return 1

    def allreduce(self, rank: int, size: int) -> Iterator[Round]:
        """Fold p−q odd ranks into their even neighbours, double among the q that are left, unfold."""
        doubling = 1 << (size.bit_length() - 1)
        extra = size - doubling
        if rank < 2 * extra and rank % 2:
            yield (Send(rank - 1, 0, 1),)
            yield (Receive(rank - 1, 0, 1, reduce=False),)
            return
        folded = rank < 2 * extra
        if folded:
            yield (Receive(rank + 1, 0, 1, reduce=True),)
        virtual = rank // 2 if folded else rank - extra
        distance = 1
        while distance < doubling:
            partner = virtual ^ distance
            peer = 2 * partner if partner < extra else partner + extra
            yield (Send(peer, 0, 1), Receive(peer, 0, 1, reduce=True))
            distance *= 2
        if folded:
            yield (Send(rank + 1, 0, 1),)
