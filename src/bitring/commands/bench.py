"""Measure collectives side by side: bench allreduce."""

from __future__ import annotations

import re
from pathlib import Path

import click

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Sizes(click.ParamType[list[int]]):
    """Sizes in bytes, separated by commas, such as 4,64KiB,1MiB."""

    name = "sizes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """See click."""
        sizes: list[int] = []
        for text in str(value).split(","):
            found = re.fullmatch(r"(\d+) ?([KMG]?)(?:iB|B)?", text.strip())
            if not found or int(found[1]) == 0:
                self.fail(f"expected sizes in bytes, such as 4,64KiB,1MiB; got {text!r}", param, ctx)
            sizes.append(int(found[1]) * _UNITS[found[2]])
        return sizes


class Names(click.ParamType[list[str]]):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """See click."""
        return [text.strip() for text in str(value).split(",")]


@click.group("bench")
def command() -> None:
    """Measure collectives side by side. Run it under mpirun or srun."""


@command.command("allreduce")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the results here.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw them to this .png, .svg or .pdf.")
@click.option(
    "--sizes",
    type=Sizes(),
    default="4,1KiB,16KiB,64KiB,256KiB,1MiB,4MiB,16MiB,64MiB",
    show_default=True,
    help="Buffer sizes.",
)
@click.option("--algorithms", type=Names(), help="Some of the registered algorithms.  [default: all]")
@click.option(
    "--samples", type=click.IntRange(min=1), default=15, show_default=True, help="Times each one is timed at each size."
)
def allreduce(
    json_path: Path | None, plot: Path | None, sizes: list[int], algorithms: list[str] | None, samples: int
) -> None:
    """AllReduce of float32 sums: every algorithm, and the MPI library's own call, in place and out of place.

    Each sum is checked before it is timed. The contenders take turns; a time is the median of its samples, each the
    slowest rank's. algbw is bytes/time, busbw algbw·2(p-1)/p; the last column compares with the library's better call.
    MPI libraries may be quicker at another thread level: MPI4PY_RC_THREAD_LEVEL=single measures there.
    """
    from bitring.commands import _bench_allreduce  # initialises MPI

    _bench_allreduce.run(json_path, plot, sizes, algorithms, samples)
