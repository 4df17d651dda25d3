"""Star: rank 0 gathers, reduces and sends back. 2(p−1) messages of n bytes through one rank, in 2 rounds."""

from __future__ import annotations

from collections.abc import Iterator

from bitring.collectives.schedules.schedule import Algorithm, Receive, Round, Send


class Star(Algorithm):
    """AllReduce through rank 0."""

    def chunks(self, size: int) -> int:
        """The buffer stays whole."""
        return 1

    def allreduce(self, rank: int, size: int) -> Iterator[Round]:
        """To rank 0, and back."""
        if rank == 0:
            yield tuple(Receive(peer, 0, 1, reduce=True) for peer in range(1, size))
            yield tuple(Send(peer, 0, 1) for peer in range(1, size))
        else:
            yield (Send(0, 0, 1),)
            yield (Receive(0, 0, 1, reduce=False),)
