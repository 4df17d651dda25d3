"""Train a model on all ranks: mpirun -n 2 bitring train --output DIR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitring.collectives.schedules.schedule import algorithms
from bitring.commands._compression import how
from bitring.commands._device import DEVICES
from bitring.commands._settings import Settings
from bitring.commands._units import INTERVAL
from bitring.compression.compressor import compressors
from bitring.exit_codes import ExitCode
from bitring.models.dataset import datasets
from bitring.models.model import models
from bitring.registry import Registry
from bitring.training.choice import choices
from bitring.training.mode import modes
from bitring.training.optimizer import optimizers


def _names(registry: Registry[Any]) -> str:
    return ", ".join(registry.names())


@click.command("train", epilog="Exit codes: " + "; ".join(f"{code:d} {code.meaning}" for code in ExitCode) + ".")
@click.option("--model", default="cnn", show_default=True, help=f"One of: {_names(models)}.")
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="host",
    show_default=True,
    help="Where ranks compute: in host memory with NumPy, or each on a card with CuPy.",
)
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help=f"One of: {_names(datasets)}; or a path ending in .npz.",
)
@click.option("--data-directory", type=click.Path(path_type=Path), help="Where the data set's files are.")
@click.option(
    "--mode",
    default="sync",
    show_default=True,
    help=f"{how('block_momentum:tau=20,zeta=1')}. One of: {_names(modes)}; or "
    "sandblaster, with --optimizer lbfgs: an epoch is then one iteration over all training samples.",
)
@click.option(
    "--tau", type=int, help="Steps between two exchanges, for the modes local and block_momentum.  [default: 50]"
)
@click.option(
    "--compression",
    default="none",
    show_default=True,
    help=f"{how('topk:density=0.001')}. One of: none, {_names(compressors)}; or, for each parameter the quickest, "
    f"{_names(choices)}.",
)
@click.option("--warmup-steps", type=int, help="Exact steps before compression begins.  [default: 1/64 of all]")
@click.option(
    "--algorithm", default="auto", show_default=True, help=f"Of the exact exchange. One of: auto, {_names(algorithms)}."
)
@click.option(
    "--optimizer",
    default="sgd",
    show_default=True,
    help=f"{how('adagrad:eps=1e-6')}. One of: {_names(optimizers)}; or lbfgs.",
)
@click.option(
    "--lr",
    type=float,
    help="Learning rate at the start; it falls to 0 at the end.  [default: 0.02 for sgd, else the optimizer's own]",
)
@click.option("--momentum", type=float, help="For sgd.  [default: 0.9]")
@click.option(
    "--placement",
    help="Split the model between ranks: auto, data, hybrid, pipeline:stages=2,microbatches=8, or "
    "LAYER=samples|columns|rows|RANK, separated by commas.",
)
@click.option(
    "--replicas",
    type=int,
    default=1,
    show_default=True,
    help="With --placement: groups that each have the whole model.",
)
@click.option("--batch", type=int, default=64, show_default=True, help="Samples in a step, of all ranks together.")
@click.option("--epochs", type=int, default=15, show_default=True, help="Passes through the training samples.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the initial parameters and the data's order.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for metrics.jsonl, summary.json, curve.png and checkpoint.npz. With another run's checkpoint in it, "
    "--resume or --fresh must say what is meant.",
)
@click.option(
    "--checkpoint-every",
    type=INTERVAL,
    default="1epoch",
    show_default=True,
    metavar="INTERVAL",
    help="Between two checkpoints: such as 2epochs, 500steps, 10min; a number alone counts epochs.",
)
@click.option(
    "--keep", type=int, default=2, show_default=True, help="Checkpoints that are kept: the last and those before it."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the checkpoint in the output folder; from the beginning where there is none.",
)
@click.option(
    "--timeline",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw what rank 0 did when in the last step to this .png, .svg or .pdf.",
)
@click.option("--fresh", is_flag=True, help="Delete the checkpoints in the output folder, and begin anew.")
def command(**options: object) -> None:
    """Train a model on all ranks, for example:

    mpirun -n 2 bitring train --model cnn --data digits --compression onebit --output runs/first

    One seed gives one result, to the bit, on the same number of ranks.
    """
    settings = Settings(**options)  # type: ignore[arg-type]
    if settings.is_sandblaster():
        from bitring.commands._sandblaster import run
    elif settings.placement is not None:
        from bitring.commands._placed import run
    else:
        from bitring.commands._train import run  # all three initialise MPI
    run(settings)
