"""Which part of each parameter a rank of a replica has, and with whom it shares it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitring.models.layers import Dense
from bitring.training.placement.assignment import Placed
from bitring.training.placement.layout import part


class Part(NamedTuple):
    """``axis``: the one that is cut, a part for each of ``ranks``; None: each of them has the whole parameter."""

    axis: int | None
    ranks: tuple[int, ...]

    def of(self, whole: Any, rank: int) -> Any:
        """The part of ``rank``, a view."""
        if self.axis is None:
            return whole
        mine = part(whole.shape[self.axis], len(self.ranks), self.ranks.index(rank))
        return whole[mine] if self.axis == 0 else whole[:, mine]

    @property
    def keepers(self) -> tuple[int, ...]:
        """The ranks whose parts make up the whole."""
        return self.ranks[:1] if self.axis is None else self.ranks

    def join(self, parts: Sequence[Any]) -> Any:
        """The whole, of the keepers' parts."""
        return parts[0] if self.axis is None else np.concatenate(parts, axis=self.axis)


def parts_of(placed: Sequence[Placed]) -> dict[str, Part]:
    """Parameter -> its part. Raises ValueError where one layer is split in two ways."""
    found: dict[str, Part] = {}
    for each in placed:
        layer, ranks = each.node.layer, each.takes.ranks
        for name in layer.shapes:
            if each.split == "columns":
                mine = Part(0, ranks)
            elif each.split == "rows":
                assert isinstance(layer, Dense)
                mine = Part(1, ranks) if name == layer.weight else Part(None, ranks[:1])  # who has the bias adds it
            else:
                mine = Part(None, ranks)
            other = found.get(name)
            if other is not None and other != mine:
                if other.axis is not None or mine.axis is not None:
                    raise ValueError(
                        f"ModelParallel: placement: {each.node.name} shares {name}, which is split elsewhere"
                    )
                mine = Part(None, tuple(sorted({*other.ranks, *mine.ranks})))
            found[name] = mine
    return found


def joined(
    everyone: Sequence[tuple[int, Mapping[str, Any]]], parts: Mapping[str, Part], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """New arrays like the whole ``parameters``, of ranks' numbers and what they have; empty parts may be missing."""
    by_rank: dict[int, dict[str, Any]] = {}
    for rank, theirs in everyone:
        by_rank.setdefault(rank, {}).update(theirs)
    whole: dict[str, Any] = {}
    for name, w in parameters.items():
        each = parts[name]
        kept = [by_rank[rank].get(name, np.empty_like(each.of(w, rank))) for rank in each.keepers]
        whole[name] = np.array(each.join(kept))
    return whole


def local_parameters(
    placed: Sequence[Placed], parts: Mapping[str, Any], model: Mapping[str, Any], rank: int
) -> dict[str, Any]:
    """The arrays that the layers on ``rank`` work with: its ``parts``; zeros for a bias that another rank adds."""
    local = dict(parts)
    for each in placed:
        if rank in each.takes.ranks:
            for name, shape in each.node.layer.shapes.items():
                if name not in local:
                    local[name] = np.zeros(shape, model[name].dtype)
    return local
