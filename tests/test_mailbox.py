"""Messages that have no common order."""

from types import SimpleNamespace
from typing import Any

import pytest

from bitring.collectives.runtime import mailbox
from bitring.collectives.runtime.mailbox import Mailbox


def test_a_rank_hears_nothing_of_its_own_before_others_are_sent_what_it_said_earlier(comm, monkeypatch):
    """It may be its last word, after which it sends nothing more."""
    if comm.size == 1:
        pytest.skip("needs another rank")
    news = SimpleNamespace(unread=lambda: comm.rank == 0)
    monkeypatch.setattr(mailbox, "ports", lambda: news)
    between = comm.Dup()
    box = Mailbox(between)
    heard: list[Any] = []
    if comm.rank == 0:
        for rank in reversed(range(comm.size)):
            box.send(rank, 7, rank)
        heard += box.advance()
        assert heard == []
        news.unread = lambda: False
    while not heard:
        heard += box.advance()
    assert [(each.source, each.kind, each.serial) for each in heard] == [(0, 7, comm.rank)]
    box.close()
    while not box.over:
        box.advance()
    between.Free()
