"""Findings of ``bitring doctor``, as lines of a report and as words."""

from __future__ import annotations

from typing import NamedTuple

import click

from bitring.commands._terminal import terminal_width
from bitring.commands._units import count
from bitring.machine import processor

OK, NOTE, FAIL = "ok", "note", "FAIL"


class Finding(NamedTuple):
    """One line of the report. ``advice`` says what to do when the status is not "ok"."""

    what: str
    status: str
    text: str
    advice: str = ""


def show(findings: list[Finding]) -> None:
    """Print the report: a table where rich is installed."""
    bad = sum(finding.status == FAIL for finding in findings)
    width = terminal_width()
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        show_plainly(findings)
    else:
        console = Console(force_terminal=width is not None, width=width or 140, highlight=False)
        table = Table(title=f"bitring doctor: {processor()}", title_justify="left", show_lines=False)
        for heading in ("check", "", "found"):
            table.add_column(heading)
        colors = {OK: "green", NOTE: "yellow", FAIL: "bold red"}
        for finding in findings:
            text = finding.text + (f"\n→ {finding.advice}" if finding.advice else "")
            table.add_row(finding.what, f"[{colors[finding.status]}]{finding.status}[/]", escape(text))
        console.print(table)
    click.echo("all checks passed" if not bad else f"{count(bad, 'check')} failed")


def show_plainly(findings: list[Finding]) -> None:
    """Print the report in lines, without rich."""
    for finding in findings:
        click.echo(f"{finding.what:<28} {finding.status:<5} {finding.text}")
        if finding.advice:
            click.echo(f"{'':<34} → {finding.advice}")


def ranks_text(ranks: list[int], size: int) -> str:
    """Such as "ranks 0-3, 8", of ``size``."""
    if size == 1:
        return "rank 0"
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"


def spans(numbers: list[int]) -> str:
    """Such as "0-3, 8"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
