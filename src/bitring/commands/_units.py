"""Quantities with their units: as options, and as people read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import click

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


class Quantity(click.ParamType[float]):
    """A number above 0 with a unit behind it; ``units`` are their sizes, ``example`` is shown where one is wrong."""

    def __init__(self, name: str, units: Mapping[str, float], example: str) -> None:
        self.name, self._units, self._example = name, dict(units), example

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click."""
        found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(\S*)\s*", str(value))
        try:
            number = float(found[1]) if found else 0.0
        except ValueError:
            number = 0.0
        if found is None or number <= 0 or found[2] not in self._units:
            known = ", ".join(unit for unit in self._units if unit)
            self.fail(f"expected such as {self._example}; units are {known}; got {value!r}", param, ctx)
        return number * self._units[found[2]]


def _prefixed(unit: str, size: float) -> dict[str, float]:
    return {f"{prefix}{unit}": factor * size for prefix, factor in _PREFIXES.items()}


BANDWIDTH = Quantity(
    "bandwidth", {**_prefixed("bit", 1 / 8), **_prefixed("bit/s", 1 / 8), **_prefixed("B/s", 1)}, "10Gbit or 1.25GB/s"
)
"""In bytes per second."""

DURATION = Quantity("duration", {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}, "50us or 0.2s")
"""In seconds."""

FLOPS = Quantity("speed", {**_prefixed("flops", 1), **_prefixed("flop/s", 1)}, "10Tflops")
"""In operations per second."""


class Interval(NamedTuple):
    """Between two checkpoints: so many ``epochs`` or ``steps``, or ``seconds``."""

    number: float
    unit: str


class IntervalType(click.ParamType[Interval]):
    """An option such as 10min, 2epochs or 500steps; a number alone counts epochs."""

    name = "interval"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Interval:
        """See click."""
        if isinstance(value, Interval):
            return value
        found = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*([a-z]*)\s*", str(value))
        number, unit = (float(found[1]), found[2] or "epochs") if found else (0.0, "")
        if unit in _SECONDS and number > 0:
            return Interval(number * _SECONDS[unit], "seconds")
        if unit in ("epoch", "epochs", "step", "steps") and number >= 1 and number.is_integer():
            return Interval(int(number), unit.rstrip("s") + "s")
        known = ", ".join(("epochs", "steps", *_SECONDS))
        return self.fail(f"expected such as 10min, 2epochs or 500steps; units are {known}; got {value!r}", param, ctx)


_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}

INTERVAL = IntervalType()


def traffic(nbytes: float) -> str:
    """Bytes sent, in powers of ten, as networks are measured."""
    if nbytes < 1e3:
        return f"{nbytes:.0f} B"
    if nbytes < 1e5:
        return f"{nbytes / 1e3:.1f} kB"
    return f"{nbytes / 1e6:,.{1 if nbytes < 1e8 else 0}f} MB"


def count(number: int, thing: str) -> str:
    """Such as "1 rank", "2 ranks"."""
    return f"{number} {thing}{'s' * (number != 1)}"
