"""The picture of a training run: test accuracy by epochs and by seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLORS = ("#1f5fa8", "#c8551b", "#2f7d4f", "#7a4fa0", "#8a6d1f", "#a83252", "#3a8a94", "#6b6b6b")
"""Told apart on white, by the colour-blind as well for the first four."""


def figure(width: float, height: float) -> Any:
    """A new matplotlib Figure. Raises ImportError, naming the extra, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib, which is not installed: pip install 'bitring[demo]'", name="matplotlib"
        ) from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def plain(axes: Any) -> None:
    """A light grid, and no frame above and right."""
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the records of ``metrics.jsonl`` to ``path``. Raises ImportError without matplotlib, OSError."""
    last = history[-1]
    draw_curves({"": history}, path, f"{title}: {last['test_accuracy']:.2%} after {last['epoch']} epochs")


def draw_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str, by: str = "seconds"
) -> None:
    """Draw several runs, by label, as ``draw_curve`` does one; the right half by ``"seconds"`` or ``"bytes_sent"``."""
    picture = figure(9, 3.6)
    left, right = picture.subplots(1, 2, sharey=True)
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    labels = {"epoch": "epoch", "seconds": "seconds of training", "bytes_sent": "bytes sent by a rank"}
    for axes, field in ((left, "epoch"), (right, by)):
        plain(axes)
        axes.set_xlabel(labels[field])
        for color, (name, history) in zip(COLORS, histories.items(), strict=False):
            x, y = ([record[key] for record in history] for key in (field, "test_accuracy"))
            axes.plot(x, y, "o-", color=color, markersize=4, linewidth=1.6, label=name or None, clip_on=False)
        if field == "bytes_sent":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(EngFormatter("B"))
        else:
            axes.set_xlim(left=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    left.set_ylabel("test accuracy")
    if len(histories) > 1:
        left.legend(frameon=False, loc="lower right")
    picture.suptitle(title, fontsize=11)
    picture.savefig(path)


def size_text(nbytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    raise AssertionError
