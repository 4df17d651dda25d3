"""Dealing out parameters to buckets, by their sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

OVERLAP_BYTES = 8 << 20
"""Of gradients on one node. Below, an exchange is over before waking the progress thread has paid."""

OVERLAP_BYTES_BETWEEN_NODES = 256 << 10
"""The same where gradients pass a network."""

_PARTS, _LEAST_BYTES = 4, 1 << 20


def overlaps(nbytes: int, nodes: int) -> bool:
    """Whether buckets of so many bytes in all travel while others are filled."""
    return nbytes >= (OVERLAP_BYTES if nodes == 1 else min(OVERLAP_BYTES, OVERLAP_BYTES_BETWEEN_NODES))


def largest_bucket(bucket_bytes: int, nbytes: int, nodes: int) -> int:
    """The largest size of a bucket, of ``nbytes`` bytes in all, where ``bucket_bytes`` are allowed.

    Between nodes a quarter of all, so that the first can travel while the others are computed; 1 MiB is enough for the
    network's speed.
    """
    return bucket_bytes if nodes == 1 else min(bucket_bytes, max(_LEAST_BYTES, nbytes // _PARTS))


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
