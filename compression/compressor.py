"""Compressors, which ``compression=`` asks for: an encoder or a reducer, by name or as an instance.

Settings may follow the name: ``topk``, or ``topk:density=0.001,sampled=true``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from bitring.registry import Registry
from bitring.settings import Settings, make, name_of


class Compressor(Settings):
    """Base of Encoder and Reducer: settings, a frozen dataclass. State belongs to the plan."""

    takes_factors: ClassVar[bool] = False
    """Whether gradients given as ``bitring.Factors`` travel as such."""

    most_left: ClassVar[float] = math.inf
    """The ``residual_ratio`` above which trainings have lost accuracy, as measured; rank 0 says when it stays there."""


compressors: Registry[Compressor] = Registry(
    "compressor", Compressor, "compression/encoders", "compression/reducers", group="bitring.compressors"
)


def parsed(compression: object, function: str) -> Any:
    """A name, settings behind it or not, as the compressor that it asks for; anything else as it is.

    Raises ValueError as ``make`` does, naming ``function``.
    """
    if not isinstance(compression, str):
        return compression
    if name_of(compression) == "none":
        known = ", ".join(compressors.names())
        raise ValueError(f"{function}: {compression!r} is no compressor: compression=None is exact; known: {known}")
    try:
        return make(compression, compressors)
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from None
