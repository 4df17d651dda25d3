"""Tables for people: rich's where it is installed, else plain columns."""

from __future__ import annotations

from collections.abc import Sequence

import click

from bitring.commands._terminal import terminal_width

_PLAIN_WIDTH = 200


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], emphasis: int | None = None) -> None:
    """Print ``rows`` under ``columns``, the first column to the left and the others to the right.

    ``emphasis``: a row in bold, where the terminal has that.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        for row in (columns, *rows):
            cells = [row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))]
            click.echo("  ".join(cells).rstrip())
        return
    width = terminal_width()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for i, row in enumerate(rows):
        table.add_row(*row, style="bold" if i == emphasis else None)
    console = Console(width=width or _PLAIN_WIDTH, force_terminal=width is not None)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())
