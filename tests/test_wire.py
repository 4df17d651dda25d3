"""The measured network: all leaders take part, the others wait, and one node has none."""

import math

from bitring.collectives.communicator import Communicator
from bitring.commands import _wire
from bitring.nodes import node_map


def test_each_node_s_first_rank_sends_to_the_next(comm, agree, monkeypatch):
    nodes = [[0, *range(2, comm.size)], [1]] if comm.size > 1 else [[0]]
    monkeypatch.setattr(_wire, "node_map", lambda comm: nodes)
    found = _wire.wire(comm)
    if comm.size == 1:
        agree(comm, found is None)
        return
    assert found is not None
    agree(comm, all(math.isfinite(each) and each > 0 for each in found) and comm.bcast(found) == found)


def test_what_is_timed_is_a_communicator_s_own_call(comm, agree, monkeypatch):
    """Once to get going, then once a sample; mpi4py's call of that name would be the library's."""
    began: list[int] = []
    right = Communicator.__dict__["Iallgather"]

    def counted(self, sendbuf, recvbuf):
        request = right(self, sendbuf, recvbuf)
        began.append(sendbuf.size)
        return request

    monkeypatch.setattr(Communicator, "Iallgather", counted)
    monkeypatch.setattr(_wire, "_LONG", 64 << 10)
    if comm.size == 1:
        return
    work = _wire._work(comm)
    agree(comm, began == [(64 << 10) // comm.size] * (1 + _wire._SAMPLES) and work >= 0, f"{began} {work}")


def test_one_node_has_no_network(comm, agree):
    agree(comm, (_wire.wire(comm) is None) == (len(node_map(comm)) == 1))
