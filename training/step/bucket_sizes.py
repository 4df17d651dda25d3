"""Dealing out parameters to buckets, by their sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

OVERLAP_BYTES = 8 << 20
"""Below this size an exchange is over before waking the progress thread has paid."""


class Size(NamedTuple):
    """A parameter's; those of different ``dtype`` share no bucket."""

    dtype: Any
    values: int
    nbytes: int


class BucketSizes(NamedTuple):
    """The parameters of a bucket, in the order of the buffer; ``compressed``: they are large enough for that."""

    names: tuple[str, ...]
    compressed: bool


def bucket_sizes(sizes: Mapping[str, Size], block: int | None, bucket_bytes: int) -> list[BucketSizes]:
    """The buckets of parameters of these sizes, first to last. Those without values are in none.

    ``block``: parameters of fewer values travel exactly; None: all do. Buckets are filled from the last parameter
    backwards, and one is closed when the next parameter would take it beyond ``bucket_bytes``.
    """
    filling: dict[Any, list[str]] = {}
    held: dict[Any, int] = {}
    buckets: list[BucketSizes] = []
    for name, size in reversed(list(sizes.items())):
        if not size.values:
            continue
        kind = size.dtype, block is not None and size.values >= block
        if held.get(kind, 0) and held[kind] + size.nbytes > bucket_bytes:
            buckets.append(BucketSizes(tuple(filling.pop(kind)), kind[1]))
            held[kind] = 0
        filling.setdefault(kind, []).append(name)
        held[kind] = held.get(kind, 0) + size.nbytes
    return [*buckets, *(BucketSizes(tuple(names), kind[1]) for kind, names in filling.items())]
