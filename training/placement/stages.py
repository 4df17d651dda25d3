"""The stages of a pipeline: which layers each has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from bitring.models.graph import Node
from bitring.models.recurrent import LSTM


def stages_by_name(
    stages: Sequence[Sequence[str]], nodes: Sequence[Node], layer_of: Mapping[str, str]
) -> dict[str, int]:
    """Node -> stage, from the layers' names. Nodes without parameters follow the layer before; the first, the next."""
    given: dict[str, int] = {}
    for number, names in enumerate(stages):
        for name in names:
            if name in given:
                raise ValueError(f"ModelParallel: placement: layer {name!r} is in two stages")
            given[name] = number
    known = {*layer_of, *layer_of.values()}
    for name in given:
        if name not in known:
            learned = [layer_of[node.name] for node in nodes if node.layer.shapes]
            raise ValueError(f"ModelParallel: placement: no layer {name!r}; known: {', '.join(dict.fromkeys(learned))}")
    stage_of: dict[str, int] = {}
    for node in nodes:
        stage = given.get(node.name, given.get(layer_of[node.name]))
        if stage is None:
            if node.layer.shapes:
                raise ValueError(f"ModelParallel: placement: layer {layer_of[node.name]!r} is in no stage")
            stage = max((stage_of[name] for name in node.inputs if name in stage_of), default=0)
        stage_of[node.name] = stage
    return stage_of


def computing(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Multiplications of a sample in the layer's matrix products, about: weights times the places they are used at."""
    weights = sum(math.prod(shape) for shape in node.layer.shapes.values() if len(shape) > 1)
    places = shapes[node.inputs[0]][0] if isinstance(node.layer, LSTM) else math.prod(shapes[node.name][:-1])
    return weights * places


def about_equal(nodes: Sequence[Node], shapes: Mapping[str, tuple[int, ...]], stages: int) -> dict[str, int]:
    """Node -> stage: runs of nodes in their order, of which the one with the most computing has as little as can be."""
    starts = [i for i, node in enumerate(nodes) if node.layer.shapes]  # a stage begins with a layer with parameters
    if stages > len(starts):
        raise ValueError(
            f"ModelParallel: placement: {stages} stages of {len(starts)} layers with parameters; each must have one"
        )
    starts[0] = 0
    runs = itertools.pairwise([*starts, len(nodes)])
    work = [sum(computing(node, shapes) for node in nodes[first:last]) for first, last in runs]
    # best[k][i]: the least largest work of the first i runs in k stages, and where the last of them begins
    best: dict[tuple[int, int], tuple[float, int]] = {(1, i): (sum(work[:i]), 0) for i in range(1, len(work) + 1)}
    for count in range(2, stages + 1):
        for i in range(count, len(work) + 1):
            best[count, i] = min((max(best[count - 1, j][0], sum(work[j:i])), j) for j in range(count - 1, i))
    cuts: list[int] = []
    end = len(work)
    for count in range(stages, 1, -1):
        end = best[count, end][1]
        cuts.insert(0, starts[end])
    return {node.name: sum(cut <= i for cut in cuts) for i, node in enumerate(nodes)}
