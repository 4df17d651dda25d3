"""The measured network: all leaders take part, the others wait, and one node has none."""

import math

from bitring.commands import _wire
from bitring.machine import node_map


def test_each_node_s_first_rank_sends_to_the_next(comm, agree, monkeypatch):
    nodes = [[0, *range(2, comm.size)], [1]] if comm.size > 1 else [[0]]
    monkeypatch.setattr(_wire, "node_map", lambda comm: nodes)
    found = _wire.wire(comm)
    if comm.size == 1:
        agree(comm, found is None)
        return
    assert found is not None
    agree(comm, all(math.isfinite(each) and each > 0 for each in found) and comm.bcast(found) == found)


def test_one_node_has_no_network(comm, agree):
    agree(comm, (_wire.wire(comm) is None) == (len(node_map(comm)) == 1))
