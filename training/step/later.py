"""An exchange that goes on between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bitring.collectives.runtime.interrupts import HeldBack
from bitring.training.step.gradient_exchange import GradientExchange


class Later(NamedTuple):
    """What it sums, and where the sums go."""

    arrays: Mapping[str, Any]
    scale: float
    into: Mapping[str, Any]

    def begin(self, exchange: GradientExchange, exact: bool) -> None:
        """Begin it; see ``GradientExchange.open`` for ``exact``."""
        exchange.begin()
        exchange.open(exact)
        for number in range(len(exchange.buckets)):
            exchange.load(number, self.arrays, self.scale, None, start=True)

    def come(self, exchange: GradientExchange) -> None:
        """Wait for the sums of ``exchange``, and put each there once. Interrupted, it can be called again."""
        exchange.wait()
        with HeldBack():
            for sums in exchange.results():
                for name, each in sums.items():
                    self.into[name][...] = each
