"""Every schedule is right for every size, and the check finds what is wrong with a broken one."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitring.collectives.schedules.check import MatchedTransfer, ScheduleError, check, walk
from bitring.collectives.schedules.schedule import (
    Algorithm,
    Receive,
    Round,
    Send,
    Transfer,
    algorithms,
    chunk_start,
    rounds,
)

pytestmark = pytest.mark.single

CASES = [(name, collective) for name in algorithms.names() for collective in algorithms.get(name).collectives()]


def get(name: str) -> Algorithm:
    return algorithms.get(name)()


class Written(Algorithm):
    """A schedule written down: ``programs[rank]`` is a list of rounds, for any collective."""

    def __init__(self, chunks: int, programs: list[list[Round]]) -> None:
        self.count = chunks
        self.programs = programs

    def chunks(self, size: int) -> int:
        return self.count

    def allreduce(self, rank: int, size: int) -> Iterator[Round]:
        yield from self.programs[rank]

    reduce_scatter = allgather = reduce = broadcast = allreduce


def fails(chunks: int, programs: list[list[Round]], collective: str = "allreduce") -> str:
    with pytest.raises(ScheduleError) as caught:
        check(Written(chunks, programs), collective, len(programs))
    return str(caught.value)


# right ones


@pytest.mark.parametrize(("name", "collective"), CASES)
def test_every_schedule_is_right(name: str, collective: str):
    algorithm = get(name)
    for size in range(1, 65):
        roots = {0, 1 % size, size // 2, size - 1} if collective in ("reduce", "broadcast") else {0}
        for root in roots:
            traffic = check(algorithm, collective, size, root)
            assert (traffic.rounds == 0) == (size == 1)
            assert sum(traffic.sent) == sum(traffic.received)


def test_a_thousand_ranks_are_checked():
    for name in ("binomial_tree", "double_binary_tree", "recursive_doubling", "rabenseifner"):
        assert check(get(name), "allreduce", 1000).rounds <= 4 * 10


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 32, 61])
def test_rounds_and_traffic_are_those_of_the_docstrings(size: int):
    log = ceil(log2(size))
    power = size & (size - 1) == 0

    ring = check(get("ring"), "allreduce", size)
    assert ring.rounds == 2 * (size - 1)
    assert {ring.share(sent) for sent in ring.sent} == {Fraction(2 * (size - 1), size)}
    assert {ring.share(reduced) for reduced in ring.reduced} == {Fraction(size - 1, size)}

    tree = check(get("binomial_tree"), "allreduce", size)
    assert tree.rounds == 2 * log
    assert sum(tree.messages) == 2 * (size - 1)

    doubling = check(get("recursive_doubling"), "allreduce", size)
    assert doubling.rounds == (log if power else log - 1 + 2)

    rabenseifner = check(get("rabenseifner"), "allreduce", size)
    assert rabenseifner.rounds == (2 * log if power else 2 * (log - 1) + 3)
    if power:
        assert rabenseifner.sent == ring.sent
        assert rabenseifner.reduced == ring.reduced

    double = check(get("double_binary_tree"), "allreduce", size)
    assert double.rounds <= 4 * (size.bit_length() - 1)
    assert max(double.sent) <= 4
    assert sum(double.messages) == 2 * 2 * (size - 1)


@pytest.mark.parametrize("collective", ["allreduce", "reduce", "broadcast"])
def test_double_binary_tree_sends_and_receives_one_at_a_time(collective: str):
    algorithm = get("double_binary_tree")
    for size in range(1, 65):
        for rank in range(size):
            sends: list[Send] = []
            receives: list[Receive] = []
            for transfers in rounds(algorithm, collective, rank, size):
                sending = [t for t in transfers if isinstance(t, Send)]
                receiving = [t for t in transfers if isinstance(t, Receive)]
                assert len(sending) <= 1
                assert len(receiving) <= 1
                sends += sending
                receives += receiving
            below = sends if collective == "broadcast" else [t for t in receives if t.reduce]
            inner = {transfer.first for transfer in below}
            # The root of a reduce or broadcast is above both trees; everyone else is inner in one at most.
            assert len(inner) <= (1 if rank or collective == "allreduce" else 2)


def test_the_root_is_renumbered():
    traffic = check(get("binomial_tree"), "reduce", 6, root=4)
    assert traffic.sent[4] == 0
    assert traffic.received[4] == 3


def test_chunks_cover_the_buffer():
    for n in (0, 1, 2, 7, 12, 100):
        for chunks in (1, 2, 5, 12):
            starts = [chunk_start(n, chunks, c) for c in range(chunks + 1)]
            assert starts[0] == 0 and starts[-1] == n
            lengths = {b - a for a, b in pairwise(starts)}
            assert max(lengths) - min(lengths) <= 1


def test_walk_is_in_a_possible_order():
    """A rank's messages come round by round, and its clock never runs backwards."""
    current = [(-1, -1)] * 13
    for event in walk(get("rabenseifner"), "allreduce", 13):
        if isinstance(event, MatchedTransfer):
            for rank, number in ((event.sender, event.sender_round), (event.receiver, event.receiver_round)):
                last_round, last_step = current[rank]
                assert number >= last_round
                assert event.step > last_step or number == last_round
                current[rank] = (number, max(event.step, last_step))


# broken ones, by hand

SEND = Send(1, 0, 1)
ADD = Receive(0, 0, 1, reduce=True)


def test_missing_contribution():
    text = fails(1, [[], []])
    assert text == "rank 0, after the last round: chunk 0 lacks the contribution of rank 1"
    text = fails(1, [[(Receive(1, 0, 1, True),)], [(Send(0, 0, 1),)], []], "reduce")
    assert text == "rank 0, after the last round: chunk 0 lacks the contribution of rank 2"


def test_contribution_twice():
    text = fails(1, [[(SEND,), (SEND,)], [(ADD,), (ADD,)]])
    assert text == "rank 1, round 1: reduces chunk 0 from rank 0: the contribution of rank 0 would count twice"


def test_foreign_contribution():
    text = fails(1, [[(Receive(1, 0, 1, False),)], [(Send(0, 0, 1),)]], "broadcast")
    assert "rank 1, round 0: sends chunk 0 to rank 0 before anything is in it" in text
    programs: list[list[Round]] = [[(Send(1, 0, 1),)], [(Receive(0, 0, 1, True),)]]
    assert fails(2, programs, "allgather") == "rank 1, round 0: reduces chunk 0 from rank 0 before anything is in it"
    exchange: list[list[Round]] = [
        [(Send(1, 0, 1), Receive(1, 0, 1, False))],
        [(Send(0, 0, 1), Receive(0, 0, 1, False))],
    ]
    text = fails(1, exchange, "reduce")
    assert text == "rank 0, after the last round: chunk 0 lacks the contribution of rank 0"


def test_no_counterpart():
    assert fails(1, [[(SEND,)], []]) == (
        "rank 0, round 0: sends chunk 0 to rank 1, which has finished: the transfer has no counterpart"
    )
    assert fails(1, [[], [(ADD,)]]) == (
        "rank 1, round 0: receives chunk 0 from rank 0, which has finished: the transfer has no counterpart"
    )


def test_different_ranges():
    text = fails(4, [[(Send(1, 0, 2),)], [(Receive(0, 0, 1, True),)]])
    assert "sends chunks 0 to 1 to rank 1" in text
    assert "meets" in text
    assert "receives chunk 0 from rank 0" in text


@pytest.mark.parametrize("transfer", [Send(2, 0, 1), Send(-1, 0, 1), Send(0, 0, 1), Send(1, 0, 3), Send(1, 1, 1)])
def test_impossible_transfers(transfer: Transfer):
    assert "is impossible among 2 ranks and 2 chunks" in fails(2, [[(transfer,)], [(Receive(0, 0, 2, True),)]])


def test_deadlock_names_the_circle():
    """Three ranks that each send before they receive would run with buffered sends only."""
    text = fails(1, [[(Send((r + 1) % 3, 0, 1),), (Receive((r - 1) % 3, 0, 1, True),)] for r in range(3)])
    assert text.startswith("deadlock: ")
    for rank in range(3):
        assert f"rank {rank}, round 0: sends chunk 0 to rank {(rank + 1) % 3}" in text


def test_swapped_rounds():
    """Rank 1 takes two rounds of the ring in the wrong order."""
    programs = [list(get("ring").allreduce(rank, 4)) for rank in range(4)]
    programs[1][0], programs[1][1] = programs[1][1], programs[1][0]
    assert "meets" in fails(4, programs)


def test_sends_read_what_was_there_when_the_round_began():
    """Both partners exchange in one round: that is the sum on both; the same in two rounds adds one value twice."""
    once: list[list[Round]] = [[(Send(1 - r, 0, 1), Receive(1 - r, 0, 1, True))] for r in range(2)]
    assert check(Written(1, once), "allreduce", 2).rounds == 1
    twice: list[list[Round]] = [
        [(Send(1, 0, 1),), (Receive(1, 0, 1, True),)],
        [(Receive(0, 0, 1, True),), (Send(0, 0, 1),)],
    ]
    assert "would count twice" in fails(1, twice)


def test_receives_of_a_round_are_applied_as_written():
    """The replacing receive wipes out what was added before it, not what is added after it."""
    senders: list[list[Round]] = [[(Send(0, 0, 1),)], [(Send(0, 0, 1),)]]
    add, replace = Receive(1, 0, 1, True), Receive(2, 0, 1, False)
    assert fails(1, [[(add, replace)], *senders], "reduce").endswith("lacks the contribution of ranks 0, 1")
    assert fails(1, [[(replace, add)], *senders], "reduce").endswith("lacks the contribution of rank 0")


def test_different_orders_of_addition():
    """Everyone sends to everyone: each sum is whole, but rank r starts to add at r."""
    programs: list[list[Round]] = []
    for rank in range(3):
        peers = [(rank + 1) % 3, (rank + 2) % 3]
        programs.append([(*(Send(p, 0, 1) for p in peers), *(Receive(p, 0, 1, True) for p in peers))])
    assert fails(1, programs) == (
        "rank 1, after the last round: chunk 0 was added in another order than on rank 0, so bits may differ"
    )


def test_users_mistakes():
    with pytest.raises(ValueError, match=r"unknown collective 'alreduce'; known: allreduce, "):
        check(get("ring"), "alreduce", 4)
    with pytest.raises(ValueError, match=r"BinomialTree has no schedule for allgather; it has: allreduce, reduce"):
        check(get("binomial_tree"), "allgather", 4)
    with pytest.raises(ValueError, match=r"Mpi has no schedule for allreduce; it has: none"):
        check(get("mpi"), "allreduce", 4)
    with pytest.raises(ValueError, match=r"expected size >= 1 and 0 <= root < size, got size 4, root 4"):
        check(get("ring"), "reduce", 4, root=4)
    with pytest.raises(ScheduleError, match=r"allgather needs one chunk per rank; among 2 ranks the algorithm has 1"):
        check(Written(1, [[], []]), "allgather", 2)


# broken ones, by chance


@st.composite
def broken(draw: st.DrawFn) -> tuple[Written, str]:
    """A right schedule with one message lost, half lost, repeated, or applied the wrong way."""
    name, collective = draw(st.sampled_from(CASES))
    size = draw(st.integers(2, 12))
    algorithm = get(name)
    messages = [event for event in walk(algorithm, collective, size) if isinstance(event, MatchedTransfer)]
    message = draw(st.sampled_from(messages))
    programs = [[list(transfers) for transfers in rounds(algorithm, collective, rank, size)] for rank in range(size)]
    sending = programs[message.sender][message.sender_round]
    receiving = programs[message.receiver][message.receiver_round]
    send = Send(message.receiver, message.first, message.last)
    receive = Receive(message.sender, message.first, message.last, message.reduce)
    how = draw(st.sampled_from(["lost", "not sent", "not received", "wrong way", *["twice"] * message.reduce]))
    if how in ("lost", "not sent"):
        sending.remove(send)
    if how in ("lost", "not received"):
        receiving.remove(receive)
    if how == "wrong way":
        receiving[message.position] = receive._replace(reduce=not receive.reduce)
    if how == "twice":
        programs[message.sender].insert(message.sender_round + 1, [send])
        programs[message.receiver].insert(message.receiver_round + 1, [receive])
    written = Written(algorithm.chunks(size), [[tuple(transfers) for transfers in program] for program in programs])
    return written, collective


@settings(max_examples=300, deadline=None)
@given(broken())
def test_every_broken_schedule_is_caught(case: tuple[Written, str]):
    algorithm, collective = case
    with pytest.raises(ScheduleError):
        check(algorithm, collective, len(algorithm.programs))
