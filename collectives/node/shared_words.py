"""Whole numbers that the ranks of a node change together, and a bell for those who wait for a change."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bitring.collectives.node.held import Holders
from bitring.native import address_of, extension


class SharedWords:
    """``count`` int64 numbers, 0 at first, at the beginning of ``memory``, bytes that all ranks have mapped."""

    def __init__(self, memory: Any, count: int, rank: int, size: int, holders: Holders, what: str) -> None:
        nbytes = extension.SharedWords.nbytes(count)
        self._words = extension.SharedWords(rank, size, address_of(memory), memory)
        self._values = memory[nbytes - 8 * count : nbytes].view(np.int64)
        self._rank = rank
        self._holders = holders
        self._what = what

    @staticmethod
    def nbytes(count: int) -> int:
        """Bytes of memory that ``count`` words take."""
        return int(extension.SharedWords.nbytes(count))

    @property
    def values(self) -> Any:
        """The words, which other ranks may change at any moment; one by one they are read whole."""
        return self._values

    @contextmanager
    def held(self) -> Generator[Any]:
        """The words, int64, to be read and changed by this rank alone. For a short while: others wait."""
        mine = False
        try:
            self._holders.until_over(self._words.acquire, self._words.bury, self._what)
            mine = True
            yield self._values
        finally:
            # A Ctrl-C may come when the lock has just been taken.
            if mine or self._words.acquire(0.0) in (-1, self._rank):
                self._words.release()

    @property
    def bell(self) -> int:
        """How often the bell was rung, for ``wait``."""
        return int(self._words.bell)

    def ring(self) -> None:
        """Wake those who wait for a change."""
        self._words.ring()

    def wait(self, seen: int, seconds: float) -> bool:
        """Sleep until the bell has been rung since ``bell`` was ``seen``, or for so long. Returns whether it was."""
        return bool(self._words.wait(seen, seconds))
