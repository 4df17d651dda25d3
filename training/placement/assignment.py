"""A placement worked out for a model: how each node's layer is split, on which ranks of a replica, in which layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bitring.models.dropout import Dropout
from bitring.models.graph import INPUT, Node
from bitring.models.layers import Dense, ReLU
from bitring.training.placement.layout import Layout, lay
from bitring.training.placement.placement import Placement
from bitring.training.placement.stages import about_equal, stages_by_name

Shapes = Mapping[str, tuple[int, ...]]

_SPLITS = ("samples", "columns", "rows")

IN_TURNS = "hybrid_in_turns"
"""Hybrid, whose dense layers take each rank's samples in turn."""


class Placed(NamedTuple):
    """A node, its stage, how its layer is split, and the layouts of what it takes and gives.

    stage: of a pipeline; where there are turns, 0 for what runs all at once and 1 for what runs in turns.
    split: "samples": the layer is whole on each of the ranks; "columns", "rows": each has a part of a dense layer's
    outputs, or inputs; "rank": it is on one rank.
    """

    node: Node
    stage: int
    split: str
    takes: Layout
    gives: Layout


def assign(placement: object, nodes: Sequence[Node], shapes: Shapes, ranks: int) -> list[Placed]:
    """The nodes as ``placement`` puts them on so many ranks. Raises TypeError or ValueError where it cannot be."""
    if isinstance(placement, Placement):
        return _in_stages(placement, nodes, shapes, ranks)
    if placement == "data":
        wanted: dict[str, Any] = {}
    elif placement in ("hybrid", IN_TURNS):
        wanted = hybrid(nodes)
    elif isinstance(placement, Mapping):
        wanted = dict(placement)
        _check(wanted, nodes, ranks)
    else:
        raise ValueError(
            "ModelParallel: placement must be 'data', 'hybrid', 'hybrid_in_turns', 'auto', a Placement, or a dict of "
            f"layer -> 'samples', 'columns', 'rows' or a rank; got {placement!r}"
        )
    placed = _by_layer(wanted, nodes, ranks)
    return _with_turns(placed) if placement == IN_TURNS and ranks > 1 else placed


def layer_name(node: Node) -> str:
    """The name that the parameters begin with; the node's where there are none."""
    return next(iter(node.layer.shapes), node.name).partition(".")[0]


def hybrid(nodes: Sequence[Node]) -> dict[str, str]:
    """Dense layers by columns and rows in turn, all else by samples (Krizhevsky, "One weird trick", 2014)."""
    names = dict.fromkeys(layer_name(node) for node in nodes if isinstance(node.layer, Dense))
    return {name: ("columns", "rows")[number % 2] for number, name in enumerate(names)}


def _with_turns(placed: list[Placed]) -> list[Placed]:
    """What follows a dense layer that is split, and that layer, is of stage 1."""
    stages: dict[str, int] = {INPUT: 0}
    found: list[Placed] = []
    for each in placed:
        stage = max(stages[name] for name in each.node.inputs)
        if each.split in ("columns", "rows"):
            stage = 1
        stages[each.node.name] = stage
        found.append(each._replace(stage=stage))
    return found


def _check(wanted: Mapping[Any, Any], nodes: Sequence[Node], ranks: int) -> None:
    known = {**{layer_name(node): node for node in nodes}, **{node.name: node for node in nodes}}
    for name, split in wanted.items():
        where = f"ModelParallel: placement[{name!r}]"
        if name not in known:
            raise ValueError(f"{where}: no such layer; known: {', '.join(map(str, known))}")
        if isinstance(split, int) and not isinstance(split, bool):
            if not 0 <= split < ranks:
                raise ValueError(f"{where} must be a rank of a replica, from 0 to {ranks - 1}; got {split}")
        elif split not in _SPLITS:
            raise ValueError(f"{where} must be 'samples', 'columns', 'rows' or a rank; got {split!r}")
        elif split != "samples" and not isinstance(known[name].layer, Dense):
            kind = type(known[name].layer).__name__
            raise ValueError(f"{where}: only dense layers are split by {split}; got one of {kind}")


def _by_layer(wanted: Mapping[str, Any], nodes: Sequence[Node], ranks: int) -> list[Placed]:
    everyone = tuple(range(ranks))
    placed: list[Placed] = []
    gives = {INPUT: lay("samples", everyone)}
    for number, node in enumerate(nodes):
        split = wanted.get(node.name, wanted.get(layer_name(node), "samples" if node.layer.shapes else None))
        if split is None:
            layout = _followed(node, [gives[name] for name in node.inputs], wanted, nodes[number + 1 :])
            each = Placed(node, 0, "rank" if len(layout.ranks) == 1 else layout.kind, layout, layout)
        elif isinstance(split, int):
            each = Placed(node, 0, "rank", lay("whole", (split,)), lay("whole", (split,)))
        else:
            takes, given = {
                "samples": ("samples", "samples"),
                "columns": ("whole", "features"),
                "rows": ("features", "partial"),
            }[split]
            each = Placed(node, 0, split, lay(takes, everyone), lay(given, everyone))
        placed.append(each)
        gives[node.name] = each.gives
    return placed


def _followed(node: Node, before: list[Layout], wanted: Mapping[str, Any], later: Sequence[Node]) -> Layout:
    """The layout of a node without parameters: that of the layer before, where it can work on that.

    A sum is made whole where the next layer wants it whole, and in parts of the samples elsewhere.
    """
    layout = before[0]
    kinds = ("samples", "whole", "features") if isinstance(node.layer, (Dropout, ReLU)) else ("samples", "whole")
    if layout.kind in kinds:
        return layout
    following = next((each for each in later if each.layer.shapes), None)
    columns = following is not None and wanted.get(layer_name(following)) == "columns"
    return lay("whole" if columns else "samples", layout.ranks)


def _in_stages(placement: Placement, nodes: Sequence[Node], shapes: Shapes, ranks: int) -> list[Placed]:
    if placement.count != ranks:
        raise ValueError(
            f"ModelParallel: placement has {placement.count} stages, one rank each; a replica has {ranks} ranks"
        )
    if isinstance(placement.stages, int):
        stage_of = about_equal(nodes, shapes, placement.stages)
    else:
        stage_of = stages_by_name(placement.stages, nodes, {node.name: layer_name(node) for node in nodes})
    placed: list[Placed] = []
    for node in nodes:
        stage = stage_of[node.name]
        layout = lay("whole", (stage,))
        for name in node.inputs:
            if stage_of.get(name, 0) > stage:
                raise ValueError(
                    f"ModelParallel: placement: {node.name} in stage {stage} takes {name} of a later one, "
                    f"stage {stage_of[name]}"
                )
        placed.append(Placed(node, stage, "rank", layout, layout))
    if placed[-1].stage != placement.count - 1:
        raise ValueError("ModelParallel: placement: the last stage must have the last layer")
    return placed
