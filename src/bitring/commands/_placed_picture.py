"""A picture of a placement: which rank has what of each layer, and what travels."""

from __future__ import annotations

from pathlib import Path

from bitring.commands._pictures import COLORS, figure
from bitring.training.placement.assignment import Placed
from bitring.training.placement.layout import part
from bitring.training.placement.predicted import Picture


def _words(placed: Placed, rank: int, samples: int, width: int) -> str:
    """What the rank works on."""
    ranks = placed.takes.ranks
    number, count = ranks.index(rank), len(ranks)
    if placed.split == "rows":
        return f"inputs, part {number + 1} of {count}"
    words = {"samples": "samples", "columns": "outputs", "features": "features"}
    if placed.split not in words:
        return "all"
    mine = part(samples if placed.split == "samples" else width, count, number)
    return f"{words[placed.split]} {mine.start} to {mine.stop}"


def draw(picture: Picture, path: Path, title: str) -> None:
    """Draw it. Raises ImportError without matplotlib, OSError."""
    placed, widths, samples, traffic, words = picture
    ranks = len(traffic.sums)
    drawing = figure(2.5 + 1.6 * ranks + 4.0, 1.2 + 0.42 * len(placed))
    axes = drawing.add_subplot()
    sent = {}
    for edge, there, back in traffic.edges:
        for name in edge.takers:
            sent[name] = f"{(max(there) + max(back)) / 1e3:,.1f} kB a step: {words[edge.number]}"
    colors = {"samples": COLORS[0], "columns": COLORS[1], "features": COLORS[1], "rows": COLORS[2]}
    for row, (each, width) in enumerate(zip(placed, widths, strict=True)):
        bold = "bold" if each.node.layer.shapes else "normal"
        axes.text(-0.1, row, each.node.name, ha="right", va="center", fontsize=9, fontweight=bold)
        for rank in each.takes.ranks:
            box = {"height": 0.8, "align": "center", "alpha": 0.35 if each.node.layer.shapes else 0.15}
            axes.barh(row, 0.94, left=rank, color=colors.get(each.split, "0.5"), **box)
            axes.text(rank + 0.47, row, _words(each, rank, samples, width), ha="center", va="center", fontsize=8)
        if each.node.name in sent:
            axes.text(ranks + 0.1, row - 0.5, f"← {sent[each.node.name]}", va="center", fontsize=8)
    if "loss" in sent:
        axes.text(ranks + 0.1, len(placed) - 0.5, f"← {sent['loss']}", va="center", fontsize=8)
    axes.set_xlim(-0.8, ranks + 2.2)
    axes.set_ylim(len(placed), -1)
    axes.set_xticks([rank + 0.47 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    shared = f"; gradients inside the replica {max(traffic.sums) / 1e3:,.1f} kB a step" if max(traffic.sums) else ""
    axes.set_title(f"{title}\nbetween layers: bytes out of the rank that sends most{shared}", fontsize=9)
    drawing.savefig(path)
