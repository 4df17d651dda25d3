"""Rabenseifner's algorithm: reduce-scatter by recursive halving, allgather by recursive doubling.

With n bytes on p = 2ᵏ ranks: halving exchanges n/2, n/4, …, n/p bytes with the ranks p/2, p/4, …, 1 away, each rank
keeping the half that holds its own chunk; doubling runs backwards. AllReduce takes 2 lg p·α + 2(p−1)/p·nβ +
(p−1)/p·nγ: the ring's bandwidth with far fewer rounds. See Rabenseifner, "Optimization of collective reduction
operations" (2004).

For other p, let q be the largest power of two below p. The first 2(p−q) ranks are paired, neighbour with neighbour, and
a pair is one virtual rank. Before halving, the partners add half of the buffer each, and the odd one hands its half
over (2α + nβ + n/2·γ); after doubling the even one sends it the result (α + nβ). A virtual rank always owns one range
of chunks: in reduce-scatter and allgather a pair owns its two; AllReduce, which keeps pairs folded between its two
halves, spreads the chunks evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bitring.collectives.schedules.schedule import Algorithm, Receive, Round, Send


class Rabenseifner(Algorithm):
    """Recursive halving (reduce-scatter), recursive doubling (allgather), and both (AllReduce)."""

    alike = True
    pipelined = False

    def chunks(self, size: int) -> int:
        """One chunk per rank."""
        return size

    def allreduce(self, rank: int, size: int) -> Iterator[Round]:
        """Fold, halve, double, unfold. One rank makes a chunk, the others copy it: the same bits on all ranks."""
        paired = rank < 2 * (size - _virtual_size(size))
        if paired:
            yield from _fold(rank, size)
        if not paired or rank % 2 == 0:
            yield from _halve(rank, size, _even_share)
            yield from _double(rank, size, _even_share)
        if paired and rank % 2 == 0:
            yield (Send(rank + 1, 0, size),)
        elif paired:
            yield (Receive(rank - 1, 0, size, reduce=False),)

    def reduce_scatter(self, rank: int, size: int) -> Iterator[Round]:
        """Fold, halve, and give the odd partners their chunk."""
        paired = rank < 2 * (size - _virtual_size(size))
        if paired:
            yield from _fold(rank, size)
        if not paired or rank % 2 == 0:
            yield from _halve(rank, size, _first_rank)
        if paired and rank % 2 == 0:
            yield (Send(rank + 1, rank + 1, rank + 2),)
        elif paired:
            yield (Receive(rank - 1, rank, rank + 1, reduce=False),)

    def allgather(self, rank: int, size: int) -> Iterator[Round]:
        """Collect the odd partners' chunks, double, and give the odd partners what they lack."""
        paired = rank < 2 * (size - _virtual_size(size))
        if paired and rank % 2:
            yield (Send(rank - 1, rank, rank + 1),)
            yield tuple(Receive(rank - 1, first, last, reduce=False) for first, last in _others(rank, size))
            return
        if paired:
            yield (Receive(rank + 1, rank + 1, rank + 2, reduce=False),)
        yield from _double(rank, size, _first_rank)
        if paired:
            yield tuple(Send(rank + 1, first, last) for first, last in _others(rank + 1, size))


def _virtual_size(size: int) -> int:
    """The largest power of two not above ``size``."""
    return 1 << (size.bit_length() - 1)


def _even_share(virtual: int, size: int) -> int:
    """The first chunk of virtual rank ``virtual`` when all own the same, up to a chunk."""
    return virtual * size // _virtual_size(size)


def _first_rank(virtual: int, size: int) -> int:
    """The rank that plays virtual rank ``virtual``: also its first chunk when a pair owns its two."""
    extra = size - _virtual_size(size)
    return 2 * virtual if virtual < extra else virtual + extra


def _others(rank: int, size: int) -> list[tuple[int, int]]:
    """The ranges of all chunks but ``rank``'s."""
    return [(first, last) for first, last in ((0, rank), (rank + 1, size)) if first < last]


def _fold(rank: int, size: int) -> Iterator[Round]:
    """The even rank of a pair ends with the pair's sum; each of the two adds half of it."""
    half = size // 2
    if rank % 2 == 0:
        yield (Send(rank + 1, half, size), Receive(rank + 1, 0, half, reduce=True))
        yield (Receive(rank + 1, half, size, reduce=False),)
    else:
        yield (Send(rank - 1, 0, half), Receive(rank - 1, half, size, reduce=True))
        yield (Send(rank - 1, half, size),)


def _exchange(
    rank: int, size: int, distance: int, first: Callable[[int, int], int]
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """The peer at ``distance`` virtual ranks, and the chunks of the blocks of ``distance`` virtual ranks around both.

    ``first`` tells the first chunk that a virtual rank owns.
    """
    extra = size - _virtual_size(size)
    virtual = rank // 2 if rank < 2 * extra else rank - extra
    own = virtual & -distance
    other = own ^ distance
    return (
        _first_rank(virtual ^ distance, size),
        (first(own, size), first(own + distance, size)),
        (first(other, size), first(other + distance, size)),
    )


def _halve(rank: int, size: int, first: Callable[[int, int], int]) -> Iterator[Round]:
    distance = _virtual_size(size) // 2
    while distance:
        peer, own, other = _exchange(rank, size, distance, first)
        yield (Send(peer, *other), Receive(peer, *own, reduce=True))
        distance //= 2


def _double(rank: int, size: int, first: Callable[[int, int], int]) -> Iterator[Round]:
    distance = 1
    while distance < _virtual_size(size):
        peer, own, other = _exchange(rank, size, distance, first)
        yield (Send(peer, *own), Receive(peer, *other, reduce=False))
        distance *= 2
