"""Will compression pay, and which exchange is the best? A prediction of seconds per step.

Needs no MPI.
"""

from __future__ import annotations

from pathlib import Path

import click

from bitring.commands._units import BANDWIDTH, DURATION, FLOPS
from bitring.models.architecture import layer_tables


@click.command("predict")
@click.option("--model", required=True, help=f"One of: {', '.join(layer_tables())}.")
@click.option("--ranks", type=click.IntRange(min=1), required=True, help="Number of ranks.")
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes that they are spread over.  [default: one per rank]")
@click.option("--bandwidth", type=BANDWIDTH, help="Of a node's network, each way, such as 10Gbit.  [default: measured]")
@click.option("--latency", type=DURATION, help="Of a message between nodes.  [default: measured, or 50us]")
@click.option(
    "--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Samples in a step, of each rank."
)
@click.option("--flops", type=FLOPS, help="Of a rank, as reached, such as 10Tflops.  [default: the machine's]")
@click.option("--compute", type=DURATION, help="A rank's time for its gradients, such as 80ms, instead of --flops.")
@click.option("--overlap", is_flag=True, help="Exchange gradients while back-propagation makes others.")
@click.option(
    "--machine",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file that bench compress --json wrote.  [default: the machine on which bitring is developed]",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the results here.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw seconds per step by bandwidth to this .png, .svg or .pdf.",
)
def command(
    model: str,
    ranks: int,
    nodes: int | None,
    bandwidth: float | None,
    latency: float | None,
    batch: int,
    flops: float | None,
    compute: float | None,
    overlap: bool,
    machine: Path | None,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Predict seconds per step of synchronous training for each way to exchange the gradients, for example:

    bitring predict --model vgg16 --ranks 64 --bandwidth 10Gbit --flops 10Tflops

    "exact" is the best of bitring's algorithms, by the schedules that would run; "mpi" is what textbooks say of the
    library's; the others send less. "exposed" is the part of a step in which a rank does nothing but exchange. By
    default all exchanges begin when all gradients are there, as those of DataParallel.step do.
    """
    from bitring.commands._predict import Asked, run

    asked = Asked(model, ranks, nodes or ranks, bandwidth, latency, batch, flops, compute, overlap, machine)
    try:
        run(asked, json_path, plot)
    except BrokenPipeError:  # whoever reads the table has seen enough
        raise
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
