"""Compiled programs: the two ends of every message agree, and what waits for what makes sense."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitring.collectives.schedules.check import check
from bitring.collectives.schedules.program import SHARED_SLOTS, WINDOW, Program, cells, compile_program
from bitring.collectives.schedules.schedule import Algorithm, Receive, Send, algorithms, chunk_start, rounds

pytestmark = pytest.mark.single

CASES = [(name, collective) for name in algorithms.names() for collective in algorithms.get(name).collectives()]


def programs(name: str, collective: str, size: int, n: int, segment: int) -> list[Program]:
    made = algorithms.get(name)()
    return [
        compile_program(rounds(made, collective, rank, size), made.chunks(size), n, segment) for rank in range(size)
    ]


@given(n=st.integers(0, 300), chunks=st.integers(1, 20), segment=st.integers(1, 50))
def test_cells_tile_the_chunks(n, chunks, segment):
    starts, first = cells(n, chunks, segment)
    assert starts[-1] == n
    assert first[-1] == len(starts) - 1
    for c in range(chunks):
        begin, end = chunk_start(n, chunks, c), chunk_start(n, chunks, c + 1)
        inside = starts[first[c] : first[c + 1]]
        ends = [*inside[1:], end] if inside else []
        assert inside == sorted(set(inside))
        assert not inside or inside[0] == begin
        assert bool(inside) == (begin < end)
        assert all(0 < stop - start <= segment for start, stop in zip(inside, ends, strict=True))


@pytest.mark.parametrize(("name", "collective"), CASES)
@settings(max_examples=8)
@given(size=st.integers(1, 9), n=st.integers(0, 80), segment=st.integers(1, 30))
def test_both_ends_of_every_message_agree(name, collective, size, n, segment):
    ends: dict[tuple[int, int], list[list[tuple[int, int, int]]]] = defaultdict(lambda: [[], []])
    for rank, program in enumerate(programs(name, collective, size, n, segment)):
        for m in program.messages:
            pair = (rank, m.peer) if m.sends else (m.peer, rank)
            ends[pair][m.sends].append((m.sequence, m.start, m.stop))
            assert 0 < m.stop - m.start <= segment
            assert m.peer != rank
        assert program.values_sent == sum(m.stop - m.start for m in program.messages if m.sends)
    for pair, (received, sent) in ends.items():
        assert received == sent, pair
        assert [sequence for sequence, _, _ in sent] == list(range(len(sent)))


@pytest.mark.parametrize(("name", "collective"), CASES)
@settings(max_examples=8)
@given(size=st.integers(1, 9), per_chunk=st.integers(1, 20), segment=st.integers(1, 30))
def test_traffic_is_what_the_check_counts(name, collective, size, per_chunk, segment):
    chunks = algorithms.get(name)().chunks(size)
    sent = check(algorithms.get(name)(), collective, size).sent
    compiled = programs(name, collective, size, per_chunk * chunks, segment)
    assert [program.values_sent for program in compiled] == [per_chunk * chunk for chunk in sent]


@pytest.mark.parametrize(("name", "collective"), CASES)
@settings(max_examples=8)
@given(size=st.integers(1, 9), n=st.integers(0, 80), segment=st.integers(1, 30))
def test_waits_and_streams_and_slots(name, collective, size, n, segment):
    for program in programs(name, collective, size, n, segment):
        waits = [0] * len(program.messages)
        for earlier, later in enumerate(program.unblocks):
            assert len(set(later)) == len(later)
            for index in later:
                assert index > earlier, "a message waits for a later one"
                waits[index] += 1
        assert waits == [m.waits for m in program.messages]
        assert [index for stream in program.streams for index in stream] == list(range(len(program.messages)))
        for stream in program.streams:
            members = [program.messages[index] for index in stream]
            assert len({(m.sends, m.reduces, m.peer, m.early) for m in members}) == 1
            assert all(a.stop == b.start for a, b in itertools.pairwise(members))
        for m in program.messages:
            assert (m.slot >= 0) == m.reduces  # no registered algorithm swaps values within a round
            assert not m.sends or m.slot < 0
            assert m.slot < SHARED_SLOTS or m.early
        assert set(program.slots) == {m.slot for m in program.messages} - {-1}
        assert program.slot_values == max((m.stop - m.start for m in program.messages if m.slot >= 0), default=0)


@pytest.mark.parametrize(("name", "collective"), CASES)
def test_scratch_is_bounded(name, collective):
    for size in (2, 5, 16):
        for program in programs(name, collective, size, 600, 5):
            levels = size.bit_length()
            assert len(program.slots) <= SHARED_SLOTS + WINDOW * (2 * levels + 2), f"{size} ranks"


def test_nothing_to_send_makes_no_message():
    assert programs("ring", "allreduce", 1, 100, 10)[0].messages == ()
    for program in programs("ring", "allreduce", 4, 0, 10):
        assert program.messages == ()
    # One value among four ranks: three chunks are empty, and only the messages of the last travel.
    assert sum(len(program.messages) for program in programs("ring", "allreduce", 4, 1, 10)) == 2 * 6


def test_a_swap_within_a_round_is_received_aside():
    swap = [(Send(1, 0, 1), Receive(1, 0, 1, reduce=False))]
    program = compile_program(swap, 1, 25, 10)
    assert [m.slot >= 0 for m in program.messages] == [False] * 3 + [True] * 3
    assert [m.waits for m in program.messages] == [0, 0, 0, 1, 1, 1]


def test_a_new_algorithm_needs_nothing_but_rounds():
    class Pair(Algorithm):
        def chunks(self, size):
            return 1

        def allreduce(self, rank, size):
            yield Send(1 - rank, 0, 1), Receive(1 - rank, 0, 1, reduce=True)

    program = compile_program(rounds(Pair(), "allreduce", 0, 2), 1, 25, 10)
    assert [(m.sends, m.start, m.stop) for m in program.messages] == [
        (sends, start, stop) for sends in (True, False) for start, stop in ((0, 10), (10, 20), (20, 25))
    ]
