"""The clock of a schedule agrees with the closed formulas where there are any."""

from math import log2

import pytest

from bitring.collectives.schedules.cost import cost
from bitring.collectives.schedules.schedule import algorithms

pytestmark = pytest.mark.single

ALPHA, BETA, GAMMA = 2e-6, 1e-9, 3e-10
N = 1 << 20


def seconds(name: str, size: int, nbytes: int = N, collective: str = "allreduce", **options: int) -> float:
    algorithm = algorithms.get(name)()
    return cost(algorithm, collective, size, nbytes, alpha=ALPHA, beta=BETA, gamma=GAMMA, **options)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64])
def test_closed_formulas_at_powers_of_two(size: int):
    log, n = log2(size), N
    moved = 2 * (size - 1) / size * n * BETA + (size - 1) / size * n * GAMMA
    assert seconds("ring", size) == pytest.approx(2 * (size - 1) * ALPHA + moved)
    assert seconds("recursive_doubling", size) == pytest.approx(log * (ALPHA + n * BETA + n * GAMMA))
    assert seconds("rabenseifner", size) == pytest.approx(2 * log * ALPHA + moved)
    assert seconds("binomial_tree", size) == pytest.approx(2 * log * (ALPHA + n * BETA) + log * n * GAMMA)
    assert seconds("binomial_tree", size, collective="broadcast") == pytest.approx(log * (ALPHA + n * BETA))


@pytest.mark.parametrize("size", [3, 5, 7, 12])
def test_ring_at_other_sizes(size: int):
    """Chunks differ by a byte, no more: the formula holds to that rounding."""
    moved = 2 * (size - 1) / size * N * BETA + (size - 1) / size * N * GAMMA
    assert seconds("ring", size) == pytest.approx(2 * (size - 1) * ALPHA + moved, rel=1e-4)


def test_folding_costs_what_the_docstrings_say():
    for_four = seconds("recursive_doubling", 4)
    folded = 2 * (ALPHA + N * BETA) + N * GAMMA
    # A rank that is never folded may be ahead, and its message comes while another's is being added.
    assert for_four + folded - N * GAMMA <= 1.0001 * seconds("recursive_doubling", 6) <= 1.0002 * (for_four + folded)
    folded = 3 * ALPHA + 2 * N * BETA + N / 2 * GAMMA
    # Six chunks over four virtual ranks: the smallest exchange is of a third of the buffer instead of a quarter.
    uneven = N / 12 * (2 * BETA + GAMMA)
    alone = seconds("rabenseifner", 4) + folded + uneven
    # The first exchange's message from a rank that is never folded may be in the way of the fold.
    assert alone <= seconds("rabenseifner", 6) * 1.0001 <= alone + N / 2 * BETA


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("name", ["ring", "recursive_doubling", "rabenseifner", "double_binary_tree"])
@pytest.mark.parametrize("segment_nbytes", [N, 20_000])
def test_one_clock_for_all_ranks_is_every_rank_s(name: str, size: int, segment_nbytes: int, monkeypatch):
    def cuts() -> list[float]:
        return [seconds(name, size), seconds(name, size, segment_nbytes=segment_nbytes)]

    quick = cuts()
    monkeypatch.setattr("bitring.collectives.schedules.cost._one_for_all", lambda *_: None)
    assert quick == pytest.approx(cuts(), rel=1e-4)


def test_a_large_ring_is_quick():
    """With 200 clocks it would run into the time limit. A rank's port is never idle but for the last segment's sum."""
    size, n, segments = 200, 200 << 19, 32
    port = 2 * (size - 1) * (segments * ALPHA + n / size * BETA)
    assert port < seconds("ring", size, n, segment_nbytes=1 << 14) < port + (size - 1) * (n / size) * GAMMA


@pytest.mark.parametrize("size", [4, 7, 16, 33])
def test_trees_pipeline(size: int):
    """With many segments, a double binary tree approaches 2nβ and a chain nβ, whatever the number of ranks."""
    n = 64 << 20
    assert seconds("double_binary_tree", size, n, segment_nbytes=256 << 10) < 2.6 * n * BETA
    assert seconds("double_binary_tree", size, n) > 2.9 * n * BETA
    assert seconds("ring", size, n, "broadcast", segment_nbytes=256 << 10) < 1.2 * n * BETA
    assert seconds("ring", size, n, "broadcast") == pytest.approx((size - 1) * (ALPHA + n * BETA))


def test_segments_overlap_adding_with_sending():
    """Two ranks, one message each way and half of the buffer added: all but one segment's addition is hidden."""
    n, segment = 1 << 20, 1 << 14
    pieces = n // 2 // segment
    exposed = seconds("ring", 2, n, segment_nbytes=segment, collective="reduce_scatter")
    assert exposed == pytest.approx(pieces * (ALPHA + segment * BETA) + segment * GAMMA)


@pytest.mark.parametrize("name", [name for name in algorithms.names() if algorithms.get(name).collectives()])
def test_every_algorithm_has_a_cost(name: str):
    for collective in algorithms.get(name).collectives():
        for size in (1, 2, 3, 5, 9):
            assert seconds(name, size, 0, collective) == 0
            assert (seconds(name, size, 1, collective) > 0) == (size > 1)
            whole = seconds(name, size, 1000, collective)
            assert (whole > 0) == (size > 1)
            assert seconds(name, size, 1000, collective, segment_nbytes=1000) == whole
            # Each rank but one gives or gets n bytes at least once, all but its own share.
            assert seconds(name, size, 1000, collective, segment_nbytes=7) >= (size - 1) / size * 990 * BETA


def test_users_mistakes():
    with pytest.raises(ValueError, match=r"cost: expected nbytes, .* >= 0 and segment_nbytes >= 1, got nbytes -1"):
        seconds("ring", 4, -1)
    with pytest.raises(ValueError, match=r"segment_nbytes 0"):
        seconds("ring", 4, segment_nbytes=0)
    with pytest.raises(ValueError, match=r"Mpi has no schedule for allreduce"):
        seconds("mpi", 4)
