"""What can be asked for as ``compression=``: an encoder or a reducer, by name or as an instance."""

from __future__ import annotations

from bitring.collectives.registry import Registry


class Compressor:
    """Base of Encoder and Reducer: settings, a frozen dataclass. State belongs to the plan."""


compressors: Registry[Compressor] = Registry("compressor", "compression", "(?:Encoder|Reducer)")
