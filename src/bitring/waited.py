"""How long a wait has lasted, without the time in which this process was away."""

from __future__ import annotations

import time

AWAY_SECONDS = 0.5
"""No more than this counts between two looks of one who waits, which are far more frequent. In what is longer it was
stopped, or had no processor, and has not seen what the others did meanwhile: that says nothing of them."""


class Waited:
    """The seconds of a wait that begins now."""

    __slots__ = ("_looked_at", "seconds")

    def __init__(self) -> None:
        self._looked_at = time.monotonic()
        self.seconds = 0.0

    def look(self) -> float:
        """The seconds until now."""
        now = time.monotonic()
        self.seconds += min(now - self._looked_at, AWAY_SECONDS)
        self._looked_at = now
        return self.seconds
