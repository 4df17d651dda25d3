"""A wait is as long as this process has seen it: where it was stopped meanwhile, nobody is silent for that."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

import bitring.waited as module
from bitring.collectives.communicator import Communicator
from bitring.collectives.node.held import Holders
from bitring.collectives.runtime import job, watch
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.mailbox import Mailbox
from bitring.errors import DeadRankError, PeerError
from bitring.waited import AWAY_SECONDS, Waited

pytestmark = pytest.mark.single


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for each in (module, job):
        monkeypatch.setattr(each, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(engine, "bereaved", False)
    return clock


def test_what_counts(clock):
    waited = Waited()
    for seconds in (0.1, 0.2, 5000.0, 0.1):
        clock.now += seconds
        waited.look()
    assert math.isclose(waited.seconds, 0.4 + AWAY_SECONDS)


@pytest.mark.parametrize("away", [True, False])
def test_a_job_times_out_by_what_was_seen_of_it(comm, clock, monkeypatch, away):
    world = Communicator(comm.Dup())
    world.Allreduce(None, np.ones(3))
    monkeypatch.setattr(watch, "timeout", lambda: 60.0)

    def steps(progress):
        for turn in range(1000):
            clock.now += 10_000.0 if away and turn % 50 == 7 else 0.05 if away else 0.1
            yield

    run = context_of(world).queue.submit(steps, "a test")
    if away:  # 20 times; half a second each, and the rest, are 60 s all but a little
        run.wait()
    else:
        with pytest.raises(TimeoutError, match="has waited 60 s in a test"):
            run.wait()
    world.Free()


def test_nobody_is_complained_of_who_had_no_time_to_answer(comm, clock, monkeypatch):
    world = Communicator(comm.Dup())
    world.Allreduce(None, np.ones(3))
    queue = context_of(world).queue
    asked: list[float] = []
    monkeypatch.setattr(watch, "timeout", lambda: 6.0)
    monkeypatch.setattr(queue, "ask", lambda _: asked.append(clock.now))

    def steps(progress):
        while True:
            clock.now += 0.1 if not asked or clock.now > asked[0] + 1000 else 2000.0
            yield

    with pytest.raises(TimeoutError):
        queue.submit(steps, "a test").wait()
    seconds = clock.now - asked[0] - (2000.0 - AWAY_SECONDS)
    assert len(asked) == 1 and math.isclose(seconds, 2.0, abs_tol=0.3)
    world.Free()


def test_a_lock_is_waited_for_by_what_was_seen_of_it(clock):
    group = SimpleNamespace(dead=lambda member: False, ranks=[0, 1])
    holders = Holders(group, 0, 60.0)  # type: ignore[arg-type]
    tries = 0

    def attempt(seconds: float) -> int:
        nonlocal tries
        tries += 1
        clock.now += 10_000.0 if tries % 20 == 7 else 0.05
        return -1 if tries == 800 else 1

    holders.until_over(attempt, lambda holder: None, "a test")
    assert tries == 800
    with pytest.raises(TimeoutError, match="a test has waited 60 s for rank 1, which holds a lock"):
        holders.until_over(lambda seconds: [attempt(seconds), 1][1], lambda holder: None, "a test")


def test_a_rank_whose_message_failed_has_its_time_to_be_said_to_have_died(comm, clock):
    box = Mailbox(comm, keeps=True)
    failed = MPI.Exception(MPI.ERR_OTHER)
    box._note(7, failed)
    clock.now += 5000.0  # this rank was away, and has read no news
    assert box.advance() == []
    for _ in range(3):
        clock.now += 0.4
        box.advance()
    clock.now += 0.4
    with pytest.raises(MPI.Exception) as raised:
        box.advance()
    assert raised.value is failed
    box.dead.add(7)
    assert box.advance() == []


@pytest.mark.parametrize("died", [True, False])
def test_an_error_of_the_library_has_its_time_to_be_explained_by_a_death(comm, clock, monkeypatch, died):
    world = Communicator(comm.Dup())
    world.Allreduce(None, np.ones(3))
    queue, naps = context_of(world).queue, list[float]()

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        clock.now += 0.4 if len(naps) > 1 else 5000.0  # this rank was away, and has read no news

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep, monotonic=clock.monotonic))
    monkeypatch.setattr(queue, "gone", lambda *_: [0] if died and len(naps) == 4 else [])

    def steps(progress):
        raise MPI.Exception(MPI.ERR_OTHER)
        yield

    with pytest.raises(DeadRankError if died else MPI.Exception, match="rank 0 is gone" if died else None):
        queue.submit(steps, "a test").wait()
    assert len(naps) == (4 if died else 5)
    world.Free()


@pytest.mark.parametrize("did", [True, False])
@pytest.mark.parametrize("end", ["left", "failed"])
def test_who_does_nothing_any_more_may_have_done_its_part_just_before(comm, clock, monkeypatch, end, did):
    world = Communicator(comm.Dup())
    world.Allreduce(None, np.ones(3))
    queue, looks = context_of(world).queue, list[bool]()

    def look(awaited: frozenset[int] = frozenset(), seconds: float = 0.0) -> list[int]:
        looks.extend([did] if awaited else [])
        return [0] if awaited else []

    if end == "left":
        monkeypatch.setattr(queue, "gone", look)
    else:
        monkeypatch.setattr(type(queue), "failed", property(lambda _: set(look(frozenset({0})))))

    def steps(progress):
        progress.peers = frozenset({0})
        while True not in looks:
            clock.now += 0.1
            yield

    run = queue.submit(steps, "a test")
    if did:
        run.wait()
    else:
        with pytest.raises(PeerError, match=r"a test: rank 0 (is gone|has failed)"):
            run.wait()
    assert set(looks) == {did}
    monkeypatch.undo()
    world.Free()
