"""Waiting times: how long ranks wait for each other, and for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Waits:
    """Seconds that this rank waited, and which rank was the slowest how often."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._slowest: Counter[int] = Counter()

    def add(self, seconds: float, everyone: Sequence[float]) -> None:
        """Ranks have met: this one waited ``seconds``, ``everyone`` so many each. Who waited least came last."""
        self._seconds += seconds
        self._slowest[everyone.index(min(everyone))] += 1

    def taken(self) -> dict[str, float | int | None]:
        """``wait_seconds`` and ``slowest_rank`` since the last call; empty where ranks have not met."""
        if not self._slowest:
            return {}
        result: dict[str, float | int | None] = {
            "wait_seconds": self._seconds,
            "slowest_rank": self._slowest.most_common(1)[0][0],
        }
        self._seconds = 0.0
        self._slowest.clear()
        return result
