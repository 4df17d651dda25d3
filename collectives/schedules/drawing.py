"""A space-time picture of a schedule: ranks downwards, steps to the right, an arrow for each message.

Needs matplotlib (the extra ``demo``), which is imported when a picture is drawn; its global state stays untouched.
"""

from __future__ import annotations

from math import hypot
from pathlib import Path
from typing import Any

from bitring.collectives.schedules.check import MatchedTransfer, walk
from bitring.collectives.schedules.schedule import Algorithm, algorithms

DETAILED_RANKS = 32
"""Up to so many ranks a picture has arrow heads, and labels where there is room; above, thin lines."""

_DASHED = (0, (3.5, 1.8))


def draw(algorithm: Algorithm, collective: str, size: int, path: str | Path, root: int = 0) -> None:
    """Draw the schedule of ``size`` ranks to the file ``path``, in the format of its suffix (.png, .svg, .pdf, ...).

    A solid arrow reduces where it arrives, a dashed one replaces; its colour is that of the chunk, or of the middle of
    the range of chunks, that it carries, and its width grows with the share of the buffer. Raises
    ScheduleError for a wrong schedule, ImportError without matplotlib, ValueError for an unknown format, OSError when
    the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image  # matplotlib depends on it
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib, which is not installed: pip install 'bitring[demo]'", name="matplotlib"
        ) from error

    messages = [event for event in walk(algorithm, collective, size, root) if isinstance(event, MatchedTransfer)]
    steps = max((message.step + 1 for message in messages), default=0)
    chunks = algorithm.chunks(size)
    detailed = size <= DETAILED_RANKS

    width = min(max(6.0, 1.5 + (0.95 if size <= 8 else 0.6) * steps), 16.0)
    height = min(max(2.6, 1.5 + (0.5 if size <= 8 else 0.28) * size), 10.0)
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes: Any = figure.add_subplot()

    colors = _colors(chunks)
    if detailed:
        _arrows(axes, messages, chunks, colors, labelled=chunks > 1 and size <= 8 and steps <= 16)
    else:
        _lines(axes, messages, colors)
    _frame(axes, size, steps, detailed)
    what = f"{algorithms.name_of(type(algorithm))}: {collective.replace('_', '-')}, {size} rank{'s' * (size != 1)}"
    axes.set_title(f"{what}, {chunks} chunk{'s' * (chunks != 1)}", loc="left", fontsize=11)
    _legend(figure, messages, chunks, colors)
    if Path(path).suffix.lower() != ".png" or chunks > 8:
        figure.savefig(path)
        return
    # Few colours are in use: a palette makes the file three times smaller.
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


def _colors(chunks: int) -> list[Any]:
    """One colour per chunk: told apart easily while they are few, a gradient when they are many."""
    from matplotlib import colormaps

    if chunks <= 8:
        return [colormaps["Dark2"](c) for c in range(chunks)]
    # Darkened: the bright middle of the map is hard to see on white.
    gradient = [colormaps["turbo"](0.05 + 0.9 * c / (chunks - 1)) for c in range(chunks)]
    return [(0.85 * red, 0.75 * green, 0.85 * blue) for red, green, blue, _ in gradient]


def _color(message: MatchedTransfer, colors: list[Any]) -> Any:
    return colors[(message.first + message.last - 1) // 2]


def _arrows(axes: Any, messages: list[MatchedTransfer], chunks: int, colors: list[Any], *, labelled: bool) -> None:
    from matplotlib.patches import FancyArrowPatch

    for message in messages:
        share = (message.last - message.first) / chunks
        color = _color(message, colors)
        distance = abs(message.receiver - message.sender)
        start, end = _point(message, 0.0), _point(message, 1.0)
        # The head is drawn by itself: a dashed line would dash its outline too.
        for begin, style, dashes in (
            (start, "-", "-" if message.reduce else _DASHED),
            (_point(message, 1 - 0.12 / hypot(1, distance / 2)), "-|>,head_length=4.5,head_width=2.2", "-"),
        ):
            axes.add_patch(
                FancyArrowPatch(
                    begin,
                    end,
                    arrowstyle=style,
                    shrinkA=0,
                    shrinkB=2 if begin != start else 8,
                    linewidth=1.0 + 1.6 * share,
                    linestyle=dashes,
                    color=color,
                    capstyle="butt",
                    zorder=2,
                )
            )
        if labelled:
            text = str(message.first) if message.last == message.first + 1 else f"{message.first}-{message.last - 1}"
            # A third of a rank from the tail: arrows of one step that cross in the middle are still apart there.
            axes.text(
                *_point(message, 0.33 / distance),
                text,
                color=color,
                fontsize=7.5,
                ha="center",
                va="center",
                zorder=3,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"},
            )


def _point(message: MatchedTransfer, along: float) -> tuple[float, float]:
    """The point of a message's arrow after a fraction ``along`` of its way."""
    return message.step + 0.06 + 0.88 * along, message.sender + along * (message.receiver - message.sender)


def _lines(axes: Any, messages: list[MatchedTransfer], colors: list[Any]) -> None:
    from matplotlib.collections import LineCollection

    for reduce in (True, False):
        some = [message for message in messages if message.reduce is reduce]
        lines = LineCollection(
            [[_point(m, 0.0), _point(m, 1.0)] for m in some],
            colors=[_color(m, colors) for m in some],
            linewidths=0.6,
            linestyles="-" if reduce else _DASHED,
            rasterized=True,
        )
        axes.add_collection(lines)


def _frame(axes: Any, size: int, steps: int, detailed: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.15, max(steps, 1) + 0.15)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_xlabel("round")
    axes.set_ylabel("rank")
    if detailed:
        axes.hlines(range(size), 0, max(steps, 1), color="0.82", linewidth=0.9, zorder=1)
        axes.vlines(range(steps + 1), -0.5, size - 0.5, color="0.93", linewidth=0.8, zorder=0)
        axes.set_yticks(range(size))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    # A round's number stands in its middle.
    shown = range(0, steps, max(1, -(-steps // 24)))
    axes.set_xticks([i + 0.5 for i in shown], [str(i) for i in shown])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _legend(figure: Any, messages: list[MatchedTransfer], chunks: int, colors: list[Any]) -> None:
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color="0.25", linestyle="-" if reduce else _DASHED, label=label)
        for reduce, label in ((True, "reduces"), (False, "replaces"))
        if any(message.reduce is reduce for message in messages)
    ]
    shown = range(chunks) if chunks <= 8 else [round(i * (chunks - 1) / 5) for i in range(6)]
    entries += [Line2D([], [], color=colors[c], linewidth=3, label=f"chunk {c}") for c in shown]
    columns = int(figure.get_figwidth() // 1.0)
    figure.legend(
        handles=entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=1.8
    )
