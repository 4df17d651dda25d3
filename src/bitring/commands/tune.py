"""Measure this machine, so that "auto" chooses well: tune.

Run it under mpirun or srun.
"""

from __future__ import annotations

import click

from bitring.commands.bench import Names, Sizes


@click.command("tune")
@click.option(
    "--sizes",
    type=Sizes(),
    default="4,256,4KiB,32KiB,256KiB,1MiB,4MiB,16MiB,64MiB",
    show_default=True,
    help="Buffer sizes.",
)
@click.option(
    "--dtype", "dtypes", type=Names(), default="float32,float64", show_default=True, help="Types, for their widths."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="How long to measure at a size, at least: 3 samples of each algorithm are always taken.",
)
def command(sizes: list[int], dtypes: list[str], seconds: float) -> None:
    """Find the best algorithm by size for this many ranks where they are now, on ordinary and on shared memory.

    The result is kept in $BITRING_TABLE, or else in bitring/table.json in $XDG_CONFIG_HOME (~/.config), beside what
    was measured with other numbers of ranks; there bitring finds it. Of the ranks of a program, rank 0's file counts.
    """
    from bitring.commands import _tune  # initialises MPI

    _tune.run(sizes, dtypes, seconds)
