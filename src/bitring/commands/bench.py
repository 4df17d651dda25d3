"""Measure side by side: bench allreduce, bench compress, bench train."""

from __future__ import annotations

import re
from pathlib import Path

import click

from bitring.commands._compression import how, split

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
    """Names separated by commas, of compressors maybe with settings."""

    name = "names"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """See click."""
        return split(str(value))


@click.group("bench")
def command() -> None:
    """Measure side by side. Run it under mpirun or srun."""


@command.command("allreduce")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the results here.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw them to this .png, .svg or .pdf.")
@click.option(
    "--sizes",
    type=Sizes(),
    default=",".join(map(str, (4**k for k in range(1, 15)))),
    help="Buffer sizes in bytes, such as 4,64KiB,1MiB.  [default: the powers of four from 4 B to 256 MiB]",
)
@click.option("--dtype", "dtypes", type=Names(), default="float32", show_default=True, help="Types of the values.")
@click.option("--algorithms", type=Names(), help="Some of the registered algorithms.  [default: all]")
@click.option(
    "--samples", type=click.IntRange(min=1), default=15, show_default=True, help="Times each one is timed at each size."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=4.0,
    show_default=True,
    help="At a size that takes longer, 5 samples of each are enough.",
)
def allreduce(
    json_path: Path | None,
    plot: Path | None,
    sizes: list[int],
    algorithms: list[str] | None,
    dtypes: list[str],
    samples: int,
    seconds: float,
) -> None:
    """Sums by every algorithm, by the chosen one, by the MPI library's own call, and by gloo if PyTorch is installed.

    "auto" is chosen for ordinary arrays, "auto, resident" for arrays of Communicator.empty, "plain call" is
    Communicator.Allreduce. The library is measured in place and out of place, at this process's thread level and, by a
    second job on the same node that sleeps in between, at another. "limit" is what the memory allows: the ranks
    together read and write all buffers in place, without waiting for each other.

    Each sum is checked before it is timed. The contenders take turns; a time is the median of its samples, each the
    slowest rank's. algbw is bytes/time, busbw algbw·2(p-1)/p; the last column compares with the library's best call.
    """
    from bitring.commands import _bench_allreduce  # initialises MPI

    _bench_allreduce.run(json_path, plot, sizes, algorithms, dtypes, samples, seconds)


@command.command("compress")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the results here.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw them to this .png, .svg or .pdf.")
@click.option(
    "--compressors",
    type=Names(),
    help=f"Some of the registered encoders, separated by commas: {how('topk:density=0.001')}.  [default: all]",
)
@click.option(
    "--dtype",
    "dtypes",
    type=Names(),
    default="float32,float16,bfloat16",
    show_default=True,
    help="Types of the values.",
)
@click.option("--values", type=click.IntRange(min=1), default=1 << 24, show_default=True, help="Values in an array.")
@click.option("--samples", type=click.IntRange(min=1), default=9, show_default=True, help="Times each kernel is timed.")
def compress(
    json_path: Path | None,
    plot: Path | None,
    compressors: list[str] | None,
    dtypes: list[str],
    values: int,
    samples: int,
) -> None:
    """Encoding, and decoding-and-adding, by every encoder, against the memory's own speed.

    The roofline is the bandwidth of np.add, to a third array and in place (12 bytes per value), or of a copy (8), the
    largest, as measured in the same run; a kernel's bandwidth counts what its algorithm has to move, once. First one
    rank is timed, while the others sleep, then all at once, each the slowest rank's. Each kernel is checked before it
    is timed; they take turns, and a time is the median of its samples. The file is for predict --machine, too.
    """
    from bitring.commands import _bench_compress  # initialises MPI

    _bench_compress.run(json_path, plot, compressors, dtypes, values, samples)


@command.command("train")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the results here.")
@click.option("--model", default="mlp", show_default=True, help="A model that predict knows, for its layers.")
@click.option(
    "--exchanges",
    type=Names(),
    help=f"Some of exact, mpi, and the compressors: {how('topk:density=0.001')}.  [default: all]",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=9, show_default=True, help="Steps that are timed with each."
)
def train(json_path: Path | None, model: str, exchanges: list[str] | None, samples: int) -> None:
    """A step of DataParallel with each exchange, from gradients that are there to updated parameters.

    Gradients are random and take no time: what is measured is what predict calls a step, less its computing. The
    exchanges take turns; a time is the median of its samples, each the slowest rank's. All have their buffers at once.
    """
    from bitring.commands import _bench_train  # initialises MPI

    _bench_train.run(json_path, model, exchanges, samples)
