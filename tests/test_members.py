"""The members of a store in shared memory: clocks, rests, claims and texts. The store's own tests have the rest."""

from __future__ import annotations

import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitring.collectives.node.held import Holders
from bitring.collectives.node.shared_words import SharedWords
from bitring.collectives.runtime.engine import engine
from bitring.errors import DeadRankError
from bitring.native import address_of, native
from bitring.training.store import members
from bitring.training.store.members import Members

pytestmark = [pytest.mark.single, pytest.mark.skipif(native() is None, reason="there is no native engine")]


@pytest.fixture(autouse=True)
def alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is gone at the process's end, whatever timed out in a test."""
    monkeypatch.setattr(engine, "bereaved", False)


def made(size: int, limit: float = math.inf) -> list[Members]:
    """All of one process, each for a thread."""
    count = Members.count(size)
    room = np.zeros(SharedWords.nbytes(count) + 128, np.uint8)
    memory = room[-address_of(room) % 128 :][: SharedWords.nbytes(count)]
    return [
        Members(SharedWords(memory, count, r, size, Holders(None, r, limit), "a test"), r, size, None, limit, "a test")
        for r in range(size)
    ]


def later(call: Any) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def meanwhile(member: Members, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``call`` made when the member has begun to wait."""
    wait, calls = member._words.wait, [call]

    def after_call(*arguments: Any) -> Any:
        while calls:
            calls.pop()()
        return wait(*arguments)

    monkeypatch.setattr(member._words, "wait", after_call)


def test_only_members_that_hold_somebody_back_are_waited_for(monkeypatch):
    a, b, c = made(3)
    a.tick()
    for release in (b.tick, b.leave, b.end):
        a, b, c = made(3, limit=60)
        c.leave()
        meanwhile(a, getattr(b, release.__name__), monkeypatch)
        a.wait_for_clocks(1, "get")
        assert a.waited > 0 and a.waited_for.keys() == {1}
    assert a.clocks == [0.0, math.inf, math.inf] and a.ended == [1]


def test_who_gives_up_its_wait_for_all_holds_back_again_and_meets_them_later():
    a, b = made(2, limit=0.1)
    b._limit = math.inf  # until it was seen to rest

    def in_vain() -> None:
        with pytest.raises(TimeoutError):
            b.meet("synchronize", lambda: None)

    resting = later(in_vain)
    while not b._part("states")[1]:
        time.sleep(0.001)
    a.wait_for_clocks(9, "get")
    b._limit = 0.1
    resting.join()
    with pytest.raises(
        TimeoutError, match=r"rank 0 has waited \d+ s in a test.get for ranks \[1\] \(BITRING_TIMEOUT=0.1\)"
    ):
        a.wait_for_clocks(9, "get")


@pytest.mark.parametrize("came", [True, False])
def test_who_is_gone_may_have_come_just_before(monkeypatch, came):
    a, b = made(2)
    left: list[int] = []

    def gone(awaited: Any, seconds: float) -> list[int]:
        left.append(1)
        if came:
            b.tick()
        return [1]

    monkeypatch.setattr(a, "_group", SimpleNamespace(gone=gone))
    if came:
        a.wait_for_clocks(1, "get")
    else:
        with pytest.raises(DeadRankError, match=r"a test\.get: rank 1 is gone"):
            a.wait_for_clocks(1, "get")
    assert left == [1]


def test_all_meet_at_the_furthest_clock():
    each = made(3, limit=10)
    for number, member in enumerate(each):
        for _ in range(number):
            member.tick()
    each[2].leave()
    between: list[int] = []
    threads = [later(lambda m=m: m.meet("synchronize", lambda: between.append(1))) for m in each]
    for thread in threads:
        thread.join()
    assert len(between) == 3 and each[0].clocks == [1.0, 1.0, math.inf]
    each[2].end()
    threads = [later(lambda m=m: m.meet("synchronize", lambda: None)) for m in each[:2]]
    for thread in threads:
        thread.join()
    later(each[0].end)
    later(each[1].end)
    each[0].wait_for_ends("free")


def test_numbers_of_rows_are_handed_out_once_and_room_for_rows_ends():
    a, b = made(2)
    assert [a.claim((1, 2)), b.claim((1, 2)), b.claim((2, 1)), a.claim((1, 2))] == [0, 1, 0, 2]
    for row in range(members._ROWS - 2):
        assert b.claim((row,)) == 0
    with pytest.raises(RuntimeError, match="a test: numbers of more than"):
        a.claim((members._ROWS,))


def test_texts_are_heard_once_by_all_and_by_step():
    a, b = made(2)
    assert a.told(math.inf) is None
    a.trouble("first", 3)
    b.trouble("sécond", 5)
    assert a.told(3) is None
    assert a.told(4) == "first" and a.told(5) is None and a.told(6) == "sécond" and a.told(math.inf) is None
    assert b.told(math.inf) == "first" and b.told(math.inf) is None
    for number in range(2 * members._TEXTS):
        a.trouble(str(number), number)
    assert b.told(math.inf) == str(members._TEXTS)


def test_updates_are_counted_by_their_staleness():
    a, b = made(2)
    assert a.count_update(0) == 0 and b.count_update(0) == 1 and b.count_update(2) == 0
    assert a.version == 3 and a.staleness == {0: 2, 1: 1}
    assert b.count_update(3 - 1000) == 1000 and b.staleness == {0: 2, 1: 1, 255: 1}


def test_a_wait_for_all_that_is_interrupted_is_as_if_it_had_not_begun_or_as_if_it_had_ended(monkeypatch):
    a, b = made(2, limit=5)
    between: list[int] = []
    until, with_all = a._until, False

    def interrupted(awaited: Any, call: str) -> None:
        monkeypatch.undo()
        if with_all:
            until(awaited, call)
        raise KeyboardInterrupt

    for with_all in (False, True):
        others = [later(lambda: b.meet("synchronize", lambda: None))] if with_all else []
        monkeypatch.setattr(a, "_until", interrupted)
        with pytest.raises(KeyboardInterrupt):
            a.meet("synchronize", lambda: None)
        others += [] if with_all else [later(lambda: b.meet("synchronize", lambda: None))]
        between.clear()
        a.meet("synchronize", lambda: between.append(1))
        for thread in others:
            thread.join(60)
            assert not thread.is_alive()
        assert between == [1] and not a._part("states").any()


def test_an_interrupt_of_who_has_just_got_the_words_leaves_them_free():
    a, b = made(2, limit=1)
    held: Any = a._words
    words = held._words

    class Interrupted:
        def acquire(self, seconds: float) -> int:
            got: int = words.acquire(seconds)
            if seconds:
                raise KeyboardInterrupt
            return got

        def __getattr__(self, name: str) -> Any:
            return getattr(words, name)

    held._words = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        a.claim((1,))
    assert b.claim((1,)) == 0
