"""The picture of a step's timeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitring.commands._pictures import COLORS, figure
from bitring.training.step.timeline import KINDS, Span

_ON_THE_WAY = ("encode", "wire", "decode")


def draw_timeline(spans: Sequence[Span], path: Path, title: str) -> None:
    """Draw ``spans``: above what the rank did, below its buckets on their way. Raises ImportError, OSError."""
    from matplotlib.patches import Patch

    buckets = sorted({span.bucket for span in spans if span.kind in _ON_THE_WAY and span.bucket is not None})
    rows = {bucket: len(buckets) - 1 - i for i, bucket in enumerate(buckets)}
    colors: dict[str, str] = dict(zip(KINDS, COLORS, strict=False))
    picture = figure(9, 1.6 + 0.3 * (len(rows) + 1))
    axes = picture.subplots()
    for span in spans:
        row = rows[span.bucket] if span.kind in _ON_THE_WAY and span.bucket is not None else len(rows)
        axes.barh(row, 1e3 * (span.end - span.start), left=1e3 * span.start, height=0.7, color=colors[span.kind])
    axes.set_yticks([*rows.values(), len(rows)], [*(f"bucket {bucket}" for bucket in rows), "this rank"])
    axes.set_xlabel("ms from the step's beginning")
    axes.set_xlim(left=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    there = [kind for kind in KINDS if any(span.kind == kind for span in spans)]
    axes.legend(
        handles=[Patch(color=colors[kind], label=kind) for kind in there],
        ncols=len(there),
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    picture.suptitle(title, fontsize=11)
    picture.savefig(path)
