"""Ranks that ask where the others are, and have the answers of those that are there, however long those were away."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from bitring.collectives.runtime.contact import Contact
from bitring.collectives.runtime.ports import ports

LIMIT_SECONDS = 60.0


def hears_from(monkeypatch: pytest.MonkeyPatch, ranks: Iterable[int]) -> None:
    """From now on, when this rank asks, it does so until it knows where each of ``ranks`` waits."""
    others, ask = list(ranks), Contact.ask

    def ask_until_told(self: Contact, number: int, what: str) -> None:
        until = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < until:
            ask(self, number, what)
            time.sleep(0.02)
            ports().read()
            silent, _ = self.silent(number)
            if not set(silent) & set(others) - {self.rank}:
                return

    monkeypatch.setattr(Contact, "ask", ask_until_told)


class Told(logging.Handler):
    """Leaves a file in ``folder``, which is the same for all ranks, when this rank has warned of something."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._folder = folder
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        """Leave it."""
        self.tell()

    def tell(self) -> None:
        """Leave the file without a warning."""
        (self._folder / f"told-{self._rank}").touch()

    def has_told(self, rank: int) -> bool:
        """Whether the rank has."""
        return (self._folder / f"told-{rank}").exists()

    def await_all(self, ranks: Iterable[int]) -> None:
        """Wait until all of ``ranks`` have."""
        until = time.monotonic() + LIMIT_SECONDS
        while not all(map(self.has_told, ranks)) and time.monotonic() < until:
            time.sleep(1e-3)
