"""Which rank holds which values of vectors that are cut into shards, and whose copy it has beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitring.training.shard import Shard, held_by, parts_of
from bitring.training.sum_tree import Node, nodes_of


@dataclass(frozen=True)
class Cut:
    """Vectors of ``size`` in ``parts`` parts, cut into a shard for each of ``members``, ranks in ascending order.

    ``copies``: a copy of each shard is with another rank, its keeper. That is half of the ranks further: on another
    node, where ranks are numbered node by node, so that a node's end takes no shard with its copy.
    """

    members: tuple[int, ...]
    size: int
    parts: int
    copies: bool

    def at(self, rank: int) -> slice:
        """The values of the rank's shard."""
        return held_by(self.members.index(rank), len(self.members), self.size, self.parts)

    def nodes(self, rank: int) -> list[Node]:
        """Those of the tree of parts in which the rank's shard answers."""
        return list(nodes_of(*parts_of(self.members.index(rank), len(self.members), self.parts), self.parts))

    def keeper(self, rank: int) -> int | None:
        """The rank that has the copy of this one's shard."""
        return self._further(rank, len(self.members) // 2)

    def kept_by(self, rank: int) -> int | None:
        """The rank of whose shard this one has the copy."""
        return self._further(rank, -(len(self.members) // 2))

    def _further(self, rank: int, distance: int) -> int | None:
        if not self.copies or len(self.members) == 1:
            return None
        return self.members[(self.members.index(rank) + distance) % len(self.members)]

    def shard(self, rank: int, w: Any, memory: int) -> Shard:
        """The rank's shard, with these values of the parameters."""
        return Shard(w, memory, self.members.index(rank), len(self.members), self.size, self.parts)


@dataclass
class Holding:
    """A rank's shard, and the copy that it keeps of another's. ``era``: the number of ranks that had died before."""

    era: int
    cut: Cut
    shard: Shard
    copy: Shard | None

    @classmethod
    def of(cls, era: int, cut: Cut, rank: int, whole: Any, memory: int) -> Holding:
        """Where the parameters are ``whole``, and there are no pairs yet."""
        kept = cut.kept_by(rank)
        copy = None if kept is None else cut.shard(kept, whole[cut.at(kept)], memory)
        return cls(era, cut, cut.shard(rank, whole[cut.at(rank)], memory), copy)

    def load(self, rank: int, rows: Any, step: int) -> None:
        """Take the vectors after a step, given whole: w, g, s, y, in rows."""
        self.shard.load(rows[:, self.cut.at(rank)], step)
        kept = self.cut.kept_by(rank)
        if self.copy is not None and kept is not None:
            self.copy.load(rows[:, self.cut.at(kept)], step)
