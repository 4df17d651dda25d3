"""Nothing is sent to a rank that may be known to be dead: what has come is read before, and a new communicator asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.contact import Contact
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.pieces import transfer
from bitring.collectives.runtime.ports import Ports, ports


def messages(world: Communicator, x: Any) -> Callable[[], None]:
    return bitring.plan_allreduce(x, comm=world, algorithm="ring")


def encoded(world: Communicator, x: Any) -> Callable[[], None]:
    return bitring.plan_allreduce(x, comm=world, compression="onebit", hierarchical=False)


def pieces(world: Communicator, x: Any) -> Callable[[], None]:
    return lambda: transfer(world, x.view(np.uint8), "a test", source=0)


@pytest.mark.parametrize("kind", [messages, encoded, pieces])
def test_nothing_is_sent_before_what_has_come_is_read(comm, agree, monkeypatch, kind):
    """Every rank is told something that it cannot read at first: until then it sends nothing, and does so then."""
    if comm.size == 1:
        pytest.skip("nobody to send to")
    world, x = Communicator(comm.Dup()), np.ones(5000, np.float32)
    call = kind(world, x)
    call()
    comm.Barrier()
    read, vain = Ports.read, 0
    calls = False

    def read_later(self: Ports) -> None:
        nonlocal vain
        vain += calls
        if vain > 20:
            read(self)

    monkeypatch.setattr(Ports, "read", read_later)
    ports().say(b"what nobody understands", [("127.0.0.1", ports().card().words)])
    told = ports().unread()
    calls = True
    call()
    agree(comm, told and vain > 20 and not ports().unread(), "was sent without having read")
    world.Free()


def test_no_communicator_is_made_with_a_rank_that_is_known_dead(comm, agree, monkeypatch):
    """Rank 1 only passes for dead: it would take part, and see what is sent."""
    if comm.size == 1:
        pytest.skip("nobody to be dead")
    world, plain = Communicator(comm.Dup()), comm.Dup()
    x = np.ones(3)
    world.Allreduce(MPI.IN_PLACE, x)
    contact = context_of(world).queue.contact
    assert contact is not None
    said: list[tuple[str, tuple[int, ...]]] = []
    if comm.rank != 1:
        monkeypatch.setattr(ports(), "dead", {contact._cards[1].process})
        allreduce, plan = lambda: bitring.allreduce(x, comm=plain), lambda: bitring.plan_allreduce(x, comm=plain)
        for call in (allreduce, world.Dup, world.Split, plan):
            with pytest.raises(bitring.DeadRankError) as caught:
                call()
            said.append((str(caught.value), caught.value.ranks))
        monkeypatch.undo()
        engine.bereaved = False
    gone = "rank 1 is gone: the process has ended or left the job"
    first = (f"the first collective of a communicator: {gone}", (1,))
    expected = [first, (f"Dup: {gone}", (1,)), (f"Split: {gone}", (1,)), first]
    agree(comm, comm.rank == 1 or said == expected, str(said))
    y = bitring.allreduce(np.ones(3), comm=plain)
    agree(comm, bool((y == comm.size).all()), str(y))
    world.Free()
    plain.Free()


@pytest.mark.parametrize("kind", [messages, encoded])
def test_a_death_heard_of_elsewhere_is_heeded_in_every_communicator(apart, agree, monkeypatch, kind):
    """By whoever read of it, and with nothing sent: rank 1 only passes for dead, and would see what is sent to it."""
    call = kind(apart, np.ones(5000, np.float32))
    for _ in range(3):
        call()
    apart.Barrier()
    context = context_of(apart)
    contact = context.queue.contact
    assert contact is not None
    said = None
    if apart.rank != 1:
        with monkeypatch.context() as for_now:
            for_now.setattr(ports(), "dead", set())
            for_now.setattr(Contact, "tell_gone", lambda self, gone: None)  # it might be heard after this test
            ports().bury(contact._cards[1].process)
            with pytest.raises(bitring.DeadRankError) as caught:
                call()
            said = caught.value.ranks
        engine.bereaved = False
    comm = context.comm
    comm.Barrier()
    sent = comm.Iprobe()
    comm.Barrier()
    agree(comm, (said == (1,) or comm.rank == 1) and not sent, f"{said}, {sent}")
