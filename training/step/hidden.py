"""How much of an exchange was hidden behind other work: it went on, and this rank did not wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Hidden:
    """Times of exchanges that began to travel before they were waited for."""

    def __init__(self) -> None:
        self._under_way = self._waited = 0.0
        self._began: float | None = None
        self._ended = self._waiting = 0.0

    def restart(self) -> None:
        """Another exchange is opened."""
        self._count()
        self._began = None
        self._waiting = 0.0

    def started(self) -> Callable[[BaseException | None], None]:
        """A bucket begins to travel; to be called when it has arrived."""
        if self._began is None:
            self._began = time.perf_counter()
        return self._arrived

    def _arrived(self, error: BaseException | None) -> None:
        self._ended = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """This rank has waited so long for a bucket."""
        self._waiting += seconds

    def _count(self) -> None:
        if self._began is not None and self._ended > self._began:
            self._under_way += self._ended - self._began
            self._waited += self._waiting

    def taken(self) -> dict[str, float]:
        """``hidden_share``, from 0 to 1, since the last call; empty where no exchange travelled beside other work."""
        self._count()
        self._began = None
        if not self._under_way:
            return {}
        share = max(0.0, 1.0 - self._waited / self._under_way)
        self._under_way = self._waited = 0.0
        return {"hidden_share": share}
