"""Seconds of the owner exchange, against the cost of a schedule with the same messages where encoding is free."""

from collections.abc import Iterator

import pytest

from bitring.collectives.schedules.check import check
from bitring.collectives.schedules.cost import cost
from bitring.collectives.schedules.schedule import Algorithm, Receive, Round, Send
from bitring.compression.exchange.owner_schedule import owner_seconds

pytestmark = pytest.mark.single

ALPHA, BETA = 2e-5, 1e-9


class OwnerSchedule(Algorithm):
    """To the owners in p−1 rounds, and back in p−1: 2(p−1)α + 2(p−1)/p·mβ for payloads of m bytes."""

    def chunks(self, size: int) -> int:
        """One chunk a rank."""
        return size

    def reduce_scatter(self, rank: int, size: int) -> Iterator[Round]:
        """Rank r sends chunk r+k to its owner in round k, and takes in what rank r−k has for chunk r."""
        for k in range(1, size):
            owner = (rank + k) % size
            yield Send(owner, owner, owner + 1), Receive((rank - k) % size, rank, rank + 1, reduce=True)

    def allgather(self, rank: int, size: int) -> Iterator[Round]:
        """Rank r sends its encoded sum to rank r+k in round k."""
        for k in range(1, size):
            source = (rank - k) % size
            yield Send((rank + k) % size, rank, rank + 1), Receive(source, source, source + 1, reduce=False)


@pytest.mark.parametrize("size", [*range(1, 9), 16, 33])
def test_it_is_an_allreduce_and_sends_what_the_ring_sends(size: int):
    for collective in OwnerSchedule.collectives():
        traffic = check(OwnerSchedule(), collective, size)
    traffic = check(OwnerSchedule(), "allreduce", size)
    assert set(traffic.sent) == set(traffic.messages) == {2 * (size - 1)}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("nbytes", [64 << 10, 8 << 20])
def test_free_encoding_leaves_the_schedule_s_cost(size: int, nbytes: int):
    wire = cost(OwnerSchedule(), "allreduce", size, nbytes, alpha=ALPHA, beta=BETA, gamma=0)
    assert owner_seconds(size, 0, 0, nbytes, alpha=ALPHA, beta=BETA).total == pytest.approx(wire, rel=1e-3)
    assert wire == pytest.approx(2 * (size - 1) * (ALPHA + nbytes / size * BETA), rel=1e-3)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_free_wire_leaves_the_kernels(size: int):
    times = owner_seconds(size, 3.0, 2.0, 1, alpha=0, beta=0)
    assert times.total == pytest.approx(times.encode + times.decode) == pytest.approx((size + 1) / size * 3 + 2 * 2)


def test_two_ranks_by_hand():
    """Encode 1 s, a message 5 s, encode and decode the own part, decode; encode the sum; a message; decode both."""
    times = owner_seconds(2, 2.0, 4.0, 2, alpha=4, beta=1)
    assert times.total == (1 + 5) + 2 + 1 + 5 + 2
    assert times.wire == 10


def test_decoding_hides_behind_the_wire_piece_by_piece():
    """Where the wire is slow, only the first encoding, the sums' and the last decoding are not hidden."""
    whole, cut = (owner_seconds(4, 1.0, 1.0, 1000, alpha=0, beta=0.1, pieces=k) for k in (1, 8))
    assert whole.total == pytest.approx(whole.wire + 1 / 4 + 1 / 4 + 1 / 4 + 1 / 4)
    assert cut.wire < cut.total < whole.total < cut.wire + 1.01
    assert cut.total == pytest.approx(cut.wire + 1 / 32 + 1 / 32)  # the first sums are whole before the last arrive
