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
    return nbytes >= (OVERLAP_BYTES if nodes <= 1 else min(OVERLAP_BYTES, OVERLAP_BYTES_BETWEEN_NODES))


def largest_bucket(bucket_bytes: int, nbytes: int, nodes: int) -> int:
    """The largest size of a bucket, of ``nbytes`` bytes in all, where ``bucket_bytes`` are allowed.

    Between nodes a quarter of all, so that the first can travel while the others are computed; 1 MiB is enough for the
    network's speed.
    """
    return bucket_bytes if nodes <= 1 else min(bucket_bytes, max(_LEAST_BYTES, nbytes // _PARTS))


class Size(NamedTuple):
    """A parameter's; those of different ``dtype`` share no bucket."""

    dtype: Any
    values: int
    nbytes: int


class BucketSizes(NamedTuple):
    """The parameters of a bucket, in the order of the buffer; ``kind``: what they travel by, None for exact sums."""

    names: tuple[str, ...]
    kind: Any

    @property
    def compressed(self) -> bool:
        """Whether they do not travel exactly."""
        return self.kind is not None


def bucket_sizes(sizes: Mapping[str, Size], kinds: Mapping[str, Any], bucket_bytes: int) -> list[BucketSizes]:
    """The buckets of parameters of these sizes, first to last. Those without values are in none.

    ``kinds``: what each parameter travels by, None for exact sums; those of different kinds share no bucket. Buckets
    are filled from the last parameter backwards, and one is closed when the next parameter would take it beyond
    ``bucket_bytes``.
    """
    filling: dict[Any, list[str]] = {}
    held: dict[Any, int] = {}
    buckets: list[BucketSizes] = []
    for name, size in reversed(list(sizes.items())):
        if not size.values:
            continue
        key = size.dtype, kinds[name]
        if held.get(key, 0) and held[key] + size.nbytes > bucket_bytes:
            buckets.append(BucketSizes(tuple(filling.pop(key)), key[1]))
            held[key] = 0
        filling.setdefault(key, []).append(name)
        held[key] = held.get(key, 0) + size.nbytes
    return [*buckets, *(BucketSizes(tuple(names), key[1]) for key, names in filling.items())]


def kind_of(compressor: Any, values: int) -> Any:
    """What a parameter of so many values travels by: fewer than a block of an encoder's travel exactly."""
    return compressor if compressor is not None and values >= getattr(compressor, "block", 1) else None
