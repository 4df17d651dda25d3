"""What a step did when, on this rank: computing, packing, travelling, waiting, updating."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

KINDS = ("compute", "pack", "encode", "wire", "decode", "wait", "apply")
"""What a span may be of."""


class Span(NamedTuple):
    """Seconds ``start`` to ``end`` of a step, from its beginning; ``bucket``: the number of the one concerned."""

    kind: str
    bucket: int | None
    start: float
    end: float


class Timeline:
    """The last step's spans, and how much of exchanges was hidden behind other work.

    A trainer tells when it ``enter``s from the caller's code and ``leave``s to it: what is in between is ``compute``.
    """

    def __init__(self) -> None:
        self._began = self._left = time.perf_counter()
        self._noted: list[tuple[str, int | None, float, float]] = []  # spans by the clock, put in order when asked for
        self._travels: dict[int, tuple[float, float, Any]] = {}  # bucket -> when it started and arrived, its telemetry
        self._arrived: dict[int, tuple[float, float, Any]] = {}  # those of an exchange that has ended
        self._beside = False  # whether any began to travel beside other work
        self._waited = 0.0
        self._hidden_from = self._not_hidden = 0.0

    def restart(self, computed: bool) -> None:
        """A step begins; ``computed``: its gradients are there, from when this rank left the last one on."""
        now = time.perf_counter()
        self._began = self._left if computed else now
        self._noted = [("compute", None, self._began, now)] if computed else []
        self._arrived = {}
        self._left = now

    def enter(self) -> None:
        """From the caller's code, where gradients are computed."""
        self._add("compute", None, self._left)

    def leave(self) -> None:
        """To the caller's code."""
        self._left = time.perf_counter()

    def opened(self) -> None:
        """Buckets are to travel."""
        self._travels = {}
        self._beside, self._waited = False, 0.0

    def packed(self, bucket: int, since: float) -> None:
        """A bucket has been filled."""
        self._add("pack", bucket, since)

    def started(self, bucket: int) -> Callable[[BaseException | None], None]:
        """A bucket begins to travel beside other work; returns what is to be called when it has arrived."""
        self._beside = True
        travels, now = self._travels, time.perf_counter()
        travels[bucket] = now, now, None

        def arrived(error: BaseException | None) -> None:
            travels[bucket] = now, time.perf_counter(), None

        return arrived

    def came(self, bucket: int, since: float, telemetry: Any) -> None:
        """This rank has what it waited for ``since`` then; ``telemetry``: of the bucket's compressed run, or None."""
        now = time.perf_counter()
        start, end, _ = self._travels.get(bucket, (since, now, None))
        self._travels[bucket] = start, end, telemetry
        self._waited += now - since
        self._add("wait", bucket, since)

    def ended(self) -> None:
        """All buckets have come."""
        self._arrived, self._travels = self._travels, {}
        if self._beside and self._arrived:
            travels = self._arrived.values()
            self._hidden_from += max(end for _, end, _ in travels) - min(start for start, _, _ in travels)
            self._not_hidden += self._waited

    def applied(self, since: float) -> None:
        """The optimizer has updated parameters."""
        self._add("apply", None, since)

    def _add(self, kind: str, bucket: int | None, since: float) -> None:
        self._noted.append((kind, bucket, since, time.perf_counter()))

    def _on_the_way(self) -> Iterator[tuple[str, int | None, float, float]]:
        last = self._began  # what goes on between steps began to travel before
        for bucket, (start, end, telemetry) in self._arrived.items():
            start = max(start, last)  # those before it were on the wire until then
            last = max(end, start)
            encode, decode = (0.0, 0.0) if telemetry is None else (telemetry.encode_seconds, telemetry.decode_seconds)
            sent = min(start + encode, last)
            came = max(last - decode, sent)
            for kind, first, then in (("encode", start, sent), ("wire", sent, came), ("decode", came, last)):
                if then > first:
                    yield kind, bucket, first, then

    @property
    def spans(self) -> list[Span]:
        """Of the last step, in the order of their beginnings."""
        spans = (
            Span(kind, bucket, start - self._began, end - self._began)
            for kind, bucket, start, end in [*self._noted, *self._on_the_way()]
        )
        return sorted(spans, key=lambda span: (span.start, span.end))

    def taken(self) -> dict[str, float]:
        """``hidden_share``, from 0 to 1, since the last call; empty where no exchange travelled beside other work."""
        if not self._hidden_from:
            return {}
        share = max(0.0, 1.0 - self._not_hidden / self._hidden_from)
        self._hidden_from = self._not_hidden = 0.0
        return {"hidden_share": share}
