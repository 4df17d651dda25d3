"""A placement in words: which rank has what, what travels, and how long it was waited for."""

from __future__ import annotations

from collections.abc import Mapping

from bitring.training.placement.parts import Part
from bitring.training.placement.predicted import Traffic
from bitring.training.placement.wiring import Wiring


def explained(
    what: str,
    wiring: Wiring,
    parts: Mapping[str, Part],
    traffic: Traffic,
    waits: Mapping[int, float],
    by: str,
    exchange: str,
) -> str:
    """Several lines. ``waits``: seconds a step, by the number of the edge; ``by``: how values travel.

    ``exchange``: how gradients do between replicas, in words; none where that is exactly, in every step.
    """
    lines = [f"placement {what}"]
    for each in wiring.placed:
        names = [name for name in each.node.layer.shapes if name in parts]
        cut = f", {' and '.join(names)}" if names else ""
        lines.append(f"  {each.node.name}: {each.split}, takes {each.takes}, gives {each.gives}{cut}")
    lines.append(f"bytes a step out of the rank that sends most ({by}):")
    for edge, there, back in traffic.edges:
        seconds = waits.get(edge.number, 0.0)
        lines.append(
            f"  {edge.value} to {', '.join(edge.takers)} ({edge.takes}): {wiring.in_words(edge)}, {max(there):,} "
            f"forward, {max(back):,} back; waited {seconds:.2g} s"
        )
    between = "between replicas" + (f", were it exact and in every step, not by {exchange}" if exchange else "")
    for words, nbytes in (("gradients inside a replica", traffic.sums), (between, traffic.replicas)):
        if max(nbytes):
            lines.append(f"  {words}: {max(nbytes):,}")
    lines.append(f"  in all: {max(traffic.total):,}")
    return "\n".join(lines)
