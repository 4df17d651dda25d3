"""Seconds of the owner exchange: encoding, wire and decoding overlap chunk by chunk."""

from __future__ import annotations

from typing import NamedTuple

from bitring.compression.encoder import Encoder
from bitring.registry import Registry

encoders: Registry[Encoder] = Registry("encoder", Encoder, "compression/encoders")
"""The compressors that use the owner exchange. Naming them imports nothing."""


def flat_name(name: str, encoder: Encoder) -> str:
    """The name under which kernels for flat values are measured: ``name`` is that of those for matrices."""
    return name if encoder.for_shape((1024, 1024)) is encoder else f"{name}, flat"


class Times(NamedTuple):
    """Seconds of an exchange: what a rank encodes, what its wire carries, what it decodes, and from start to end."""

    encode: float
    wire: float
    decode: float
    total: float


def owner_seconds(
    size: int, encode: float, decode: float, nbytes: float, *, alpha: float, beta: float, pieces: int = 1
) -> Times:
    """Seconds of an owner exchange among ``size`` ranks.

    ``encode``, ``decode``: seconds of encoding and of decoding a whole buffer. ``nbytes``: of its payload. ``alpha``:
    seconds per message; ``beta``: seconds per byte. Chunks are sent in ``pieces``. All ranks do the same at the same
    time, so what a rank sends in a round arrives, at the same moment, from another. With E, D, w for encoding, decoding
    and sending one of the P = p·pieces pieces, a rank's processor and its wire are two clocks:

    1. it encodes the p−1 others' chunks: piece i ends at iE and is with its owner at A_i = max(A_{i−1}, iE) + w;
    2. it encodes and decodes its own, then decodes those that arrive: C_i = max(C_{i−1}, A_i) + D;
    3. with the last rank's pieces it encodes the sum's, piece by piece, and sends each to p−1 ranks, w each;
    4. it decodes its own sum and those that arrive, as in 2. The last decoding ends the exchange.

    So the exchange takes at least (p+1)/p·encode + 2·decode, and at least 2(p−1)·pieces·w.
    """
    if size == 1 or not nbytes:
        return Times(0.0, 0.0, 0.0, 0.0)
    parts = size * pieces
    e, d, w = encode / parts, decode / parts, alpha + beta * nbytes / parts
    processor = wire = 0.0
    arrivals: list[float] = []
    for _ in range((size - 1) * pieces):
        processor += e
        wire = max(wire, processor) + w
        arrivals.append(wire)
    processor += pieces * (e + d)
    sums: list[float] = []
    for i, arrival in enumerate(arrivals):
        processor = max(processor, arrival) + d
        if i >= (size - 2) * pieces:
            processor += e
            for _ in range(size - 1):
                wire = max(wire, processor) + w
                sums.append(wire)
    processor += pieces * d
    for arrival in sums:
        processor = max(processor, arrival) + d
    return Times((size + 1) / size * encode, 2 * (size - 1) * pieces * w, 2 * decode, processor)
