"""The exact collectives' times on a cluster against the closed formulas."""

import dataclasses
import math

import pytest

from bitring.collectives.algorithms.ring import Ring
from bitring.collectives.schedules.schedule import algorithms
from bitring.training.prediction.cluster import BUILT_IN, Cluster
from bitring.training.prediction.network import Network

pytestmark = pytest.mark.single

PLAIN = dataclasses.replace(BUILT_IN, wire=1.0, add=math.inf)
N = 64 << 20


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 64])
def test_the_ring_s_wire_time_without_latency(ranks: int):
    network = Network(Cluster(ranks, ranks, bandwidth=1e9, latency=0.0), PLAIN)
    seconds = network.clock(Ring(), ranks, N)
    assert seconds == pytest.approx(2 * (ranks - 1) / ranks * N / 1e9, rel=1e-4)
    assert network.exact(N)[0] == pytest.approx(seconds, rel=1e-4)  # none is better
    assert network.library(N)[0] == pytest.approx(seconds, rel=1e-4)


@pytest.mark.parametrize("ranks", [3, 6, 16])
@pytest.mark.parametrize("nbytes", [4, 1 << 14, 1 << 20, N])
def test_the_best_is_the_best_of_all(ranks: int, nbytes: int):
    """Though not all are clocked."""
    network = Network(Cluster(ranks, ranks, bandwidth=1e9, latency=2e-5), BUILT_IN)
    ways = {
        name: network.clock(algorithms.get(name)(), ranks, nbytes)
        for name in algorithms.names()
        if "allreduce" in algorithms.get(name).collectives()
    }
    seconds, name = network.exact(nbytes)
    assert seconds == min(ways.values()) == ways[name]


def test_small_buffers_go_in_few_messages_and_large_ones_in_few_bytes():
    network = Network(Cluster(64, 64, bandwidth=1.25e9, latency=5e-5), PLAIN)
    assert network.exact(256) == (pytest.approx(6 * (5e-5 + 256 / 1.25e9)), "recursive_doubling")
    assert network.library(256)[1].startswith("recursive_doubling")
    assert network.exact(1 << 20)[1] == "rabenseifner"


def test_on_one_node_it_is_the_memory():
    machine = dataclasses.replace(PLAIN, copy_together=4e10, local_latency=0.0)
    seconds, name = Network(Cluster(4, 1), machine).exact(10**9)
    assert (seconds, name) == (pytest.approx(2 * 4 * 1e9 / 4e10), "shared_memory")
    assert Network(Cluster(1, 1), machine).exact(10**9)[0] == 0 == Network(Cluster(1, 1), machine).library(10**9)[0]


def test_lanes_share_a_node_s_network():
    """Four nodes of eight ranks send what four ranks send, and sum through the nodes' memories before and after."""
    one, eight = (Network(Cluster(4 * q, 4, bandwidth=1e9), PLAIN) for q in (1, 8))
    seconds, name = eight.exact(N)
    assert name == "multilane"
    assert seconds == pytest.approx(one.clock(Ring(), 4, N) + eight.node_seconds(N))
    assert eight.library(N)[0] == pytest.approx(one.library(N)[0] + eight.node_seconds(N))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_bytes_are_those_of_the_schedule(ranks: int):
    network = Network(Cluster(ranks, ranks), PLAIN)
    ring = 2 * (ranks - 1) / ranks
    folded = ranks & (ranks - 1) != 0  # the ranks beyond a power of two hand theirs over, and get the sum back
    halving = math.floor(math.log2(ranks)) + folded
    assert network.sent("ring", ranks) == network.sent("ring, textbook", ranks) == pytest.approx(ring)
    assert network.sent("recursive_doubling", ranks) == network.sent("recursive_doubling, textbook", ranks) == halving
    assert network.sent("rabenseifner", ranks) == pytest.approx(ring) or folded
    for how in (network.exact(N)[1], network.exact(4)[1], network.library(N)[1]):
        assert network.sent(how, ranks) >= 1
        assert network.sent(how, 1) == 0
    assert network.sent(network.exact(0)[1], ranks) == 0
