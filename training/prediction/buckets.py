"""Dealing out parameters to buckets, by their sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class BucketSizes(NamedTuple):
    """The parameters of a bucket, in the order of the buffer; ``compressed``: they are large enough for that."""

    names: tuple[str, ...]
    compressed: bool


def bucket_sizes(values: Mapping[str, int], itemsize: int, block: int | None, bucket_bytes: int) -> list[BucketSizes]:
    """The buckets that ``DataParallel`` makes of parameters of one dtype with so many ``values``, first to last.

    ``block``: parameters of fewer values travel exactly; None: all do. Buckets are filled from the last parameter
    backwards, and one is closed when the next parameter would take it beyond ``bucket_bytes``.
    """
    filling: dict[bool, list[str]] = {}
    buckets: list[BucketSizes] = []
    for name in reversed(list(values)):
        count = values[name]
        if not count:
            continue
        kind = block is not None and count >= block
        held = itemsize * sum(values[other] for other in filling.get(kind, []))
        if held and held + itemsize * count > bucket_bytes:
            buckets.append(BucketSizes(tuple(filling.pop(kind)), kind))
        filling.setdefault(kind, []).append(name)
    return [*buckets, *(BucketSizes(tuple(names), kind) for kind, names in filling.items())]
