"""Re-sharding: the parts of a checkpoint of p ranks that each rank takes, also where there are q now; pure functions.

New rank r takes what old rank r mod p kept: parameters, which are equal on all, its optimizer's state, its mode's. Old
rank r's residual, a mode's too, is added to new rank r mod q's, so that their sum, what all owe, stays; the owners'
residuals are put together and cut again where the new owners' parts are. All else that a compressed plan keeps is
identical on all ranks, and stays so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bitring.training.tree import Path

Table = Mapping[Path, str]
"""Places of a rank's arrays: path -> the name of an array in the file."""


class Part(NamedTuple):
    """Values ``begin`` to ``end`` of the sum of ``members``, arrays of the file; zeros when there are none."""

    members: tuple[str, ...]
    begin: int
    end: int


Share = tuple[Part, ...]
"""The parts, one after the other, that make up an array."""


class Owned(NamedTuple):
    """A rank's part of a bucket: the parameters' names and sizes in order, and the first value and the one after."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    first: int
    last: int


def shares(
    tables: Sequence[Table],
    owner_residuals: Mapping[str, str],
    shapes: Mapping[Path, tuple[int, ...]],
    owned: Mapping[str, Owned],
    rank: int,
    size: int,
) -> dict[Path, Share]:
    """The parts that make up each array of rank ``rank`` of ``size``.

    ``tables``: of all old ranks; ``owner_residuals``: parameter -> array; ``shapes``: of what a rank keeps, by path;
    ``owned``: of each bucket with owners, by a name. The result has ("owner_residual", that name) for each of them.
    """
    result: dict[Path, Share] = {}
    for path, shape in shapes.items():
        if path[0] == "residual" or path[:2] == ("mode", "residual"):
            members = tuple(table[path] for table in tables[rank::size])
        elif path[0] == "compression":
            members = (tables[0][path],)
        else:
            members = (tables[rank % len(tables)][path],)
        result[path] = (Part(members, 0, math.prod(shape)),)
    for bucket, (names, sizes, first, last) in owned.items():
        parts: list[Part] = []
        start = 0
        for name, n in zip(names, sizes, strict=True):
            begin, end = max(first, start), min(last, start + n)
            if begin < end:
                parts.append(Part((owner_residuals[name],), begin - start, end - start))
            start += n
        result["owner_residual", bucket] = tuple(parts)
    return result
