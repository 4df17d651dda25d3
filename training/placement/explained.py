"""A placement in words: which rank has what, what travels, and how long it was waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitring.training.placement.assignment import Placed
from bitring.training.placement.parts import Part
from bitring.training.placement.predicted import Traffic


def explained(
    what: str, placed: Sequence[Placed], parts: Mapping[str, Part], traffic: Traffic, waits: Mapping[int, float]
) -> str:
    """Several lines. ``waits``: seconds a step, by the number of the edge."""
    lines = [f"placement {what}"]
    for each in placed:
        names = [name for name in each.node.layer.shapes if name in parts]
        cut = f", {' and '.join(names)}" if names else ""
        lines.append(f"  {each.node.name}: {each.split}, takes {each.takes}, gives {each.gives}{cut}")
    lines.append("bytes a step out of the rank that sends most:")
    for edge, there, back in traffic.edges:
        seconds = waits.get(edge.number, 0.0)
        lines.append(
            f"  {edge.value} to {', '.join(edge.takers)} ({edge.takes}): {max(there):,} forward, {max(back):,} back; "
            f"waited {seconds:.2g} s"
        )
    for words, nbytes in (("gradients inside a replica", traffic.sums), ("between replicas", traffic.replicas)):
        if max(nbytes):
            lines.append(f"  {words}: {max(nbytes):,}")
    lines.append(f"  in all: {max(traffic.total):,}")
    return "\n".join(lines)
