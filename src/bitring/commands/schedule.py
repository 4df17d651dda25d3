"""Show and check the schedule of an algorithm; draw its picture.

Needs no MPI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import click

from bitring.collectives.schedules.check import MatchedTransfer, ScheduleError, Traffic, check, walk
from bitring.collectives.schedules.drawing import draw
from bitring.collectives.schedules.schedule import COLLECTIVES, Algorithm, algorithms
from bitring.commands._units import count

_MESSAGES_SHOWN = 8  # a round
_ROUNDS_SHOWN = 40


@click.command("schedule")
@click.argument("algorithm")
@click.option("--ranks", type=click.IntRange(min=1), default=8, show_default=True, help="Number of ranks.")
@click.option(
    "--collective",
    type=click.Choice(COLLECTIVES),
    help="What to show; by default allreduce, or the first that the algorithm has.",
)
@click.option("--root", type=click.IntRange(min=0), default=0, show_default=True, help="Root of reduce and broadcast.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw a space-time picture to this file.")
def command(algorithm: str, ranks: int, collective: str | None, root: int, plot: Path | None) -> None:
    """Show and check the schedule of ALGORITHM: a line per round, then the verdict and the traffic.

    A round is a step in which every message takes one unit of time. "0->1:+2" is a message from rank 0 to rank 1 that
    is added to chunk 2 there; "0->1:=2-3" replaces chunks 2 and 3.
    """
    try:
        made = algorithms.get(algorithm)()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ALGORITHM") from error
    own = made.collectives()
    if not own:
        raise click.ClickException(
            f"{algorithm} has no schedule to show: it hands every call to the MPI library, which chooses by itself"
        )
    collective = collective or own[0]
    if collective not in own:
        raise click.BadParameter(
            f"{algorithm} has no {collective}; it has: {', '.join(own)}", param_hint="--collective"
        )
    if root >= ranks:
        raise click.BadParameter(f"expected a root below {ranks} (--ranks), got {root}", param_hint="--root")
    rooted = collective in ("reduce", "broadcast")
    if root and not rooted:
        raise click.BadParameter(f"{collective} has no root; it is for reduce and broadcast", param_hint="--root")

    click.echo(f"{algorithm} {collective}, {count(ranks, 'rank')}{f', root {root}' * rooted}")
    try:
        traffic = check(made, collective, ranks, root)
    except ScheduleError as error:
        raise click.ClickException(f"the schedule is wrong: {error}") from error
    for line in _table(made, collective, ranks, root, traffic.rounds):
        click.echo(line)
    for line in _summary(collective, traffic):
        click.echo(line)
    if plot is not None:
        try:
            draw(made, collective, ranks, plot, root)
        except (ImportError, OSError, ValueError) as error:
            raise click.ClickException(f"--plot {plot}: {error}") from error
        click.echo(f"picture  {plot}")


def _table(algorithm: Algorithm, collective: str, ranks: int, root: int, steps: int) -> Iterator[str]:
    """A line per round; of many rounds the first and the last, of many messages the first."""
    by_step: list[list[MatchedTransfer]] = [[] for _ in range(steps)]
    for event in walk(algorithm, collective, ranks, root):
        if isinstance(event, MatchedTransfer):
            by_step[event.step].append(event)
    for step, messages in enumerate(by_step):
        if steps > _ROUNDS_SHOWN and _ROUNDS_SHOWN // 2 <= step < steps - _ROUNDS_SHOWN // 2:
            if step == _ROUNDS_SHOWN // 2:
                yield f"  ... {count(steps - _ROUNDS_SHOWN, 'more round')}"
            continue
        messages.sort(key=lambda message: (message.sender, message.receiver, message.first))
        shown = [
            f"{m.sender}->{m.receiver}:{'+' if m.reduce else '='}{m.first}{f'-{m.last - 1}' * (m.last - m.first > 1)}"
            for m in messages[:_MESSAGES_SHOWN]
        ]
        if len(messages) > _MESSAGES_SHOWN:
            shown.append(f"... {len(messages) - _MESSAGES_SHOWN} more")
        yield f"round {step:<3} {'  '.join(shown)}"


def _summary(collective: str, traffic: Traffic) -> Iterator[str]:
    proved = {
        "allreduce": "each contribution exactly once in every chunk, added in the same order on all ranks",
        "reduce_scatter": "each contribution exactly once in every rank's own chunk",
        "allgather": "every chunk on every rank",
        "reduce": "each contribution exactly once in every chunk of the root",
        "broadcast": "the root's chunks on every rank",
    }
    yield f"check    passed: {proved[collective]}; no deadlock"
    yield f"rounds   {traffic.rounds}"
    yield f"chunks   {traffic.chunks}"
    yield f"messages {_spread(traffic.messages, str)} sent by a rank"
    for verb, counts in (("sent", traffic.sent), ("received", traffic.received), ("reduced", traffic.reduced)):
        yield f"{verb:<8} {_spread(counts, lambda count: _share(traffic.share(count)))} by a rank"
    yield "         n: the bytes of the buffer"


def _spread(counts: tuple[int, ...], text: Callable[[int], str]) -> str:
    low, high = min(counts), max(counts)
    return text(high) if low == high else f"{text(low)} to {text(high)}"


def _share(share: Fraction) -> str:
    """A fraction of n, exact."""
    if share == 0:
        return "0"
    top = "" if share.numerator == 1 else str(share.numerator)
    return f"{top}n" if share.denominator == 1 else f"{share.numerator}/{share.denominator} n"
