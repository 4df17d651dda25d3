"""Fit a linear model on all ranks: mpirun -n 2 bitring fit lasso --data FILE."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("fit")
@click.argument("program", type=click.Choice(["lasso", "logistic_regression"]))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="An .npz file with arrays x (rows, features) and y (rows,), or a file in svmlight's format, which gives a "
    "sparse matrix.",
)
@click.option(
    "--penalty", type=float, help="Of the coefficients' absolute values.  [default: 1/10 of what makes all 0]"
)
@click.option("--ridge", type=float, default=0.0, show_default=True, help="Half of it times the squares is added, too.")
@click.option("--width", type=int, default=32, show_default=True, help="Coordinates in a round.")
@click.option(
    "--independence",
    type=float,
    default=0.1,
    show_default=True,
    help="Columns whose cosine is larger are not changed in one round.",
)
@click.option(
    "--priority/--no-priority", default=True, show_default=True, help="Whether what changed most comes again soonest."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--tolerance", type=float, default=1e-8, show_default=True, help="Share of the objective at zero.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for coefficients.npy, summary.json and objective.png, the objective by seconds and by updates.",
)
def command(**options: object) -> None:
    """Fit a linear model, PROGRAM, by coordinate descent on all ranks, for example:

    mpirun -n 2 bitring fit lasso --data rows.npz --penalty 0.5 --output runs/lasso

    The rows are spread over the ranks. One seed gives one result, to the bit, on any number of ranks.
    """
    from bitring.commands._fit import FitOptions, run  # initialises MPI

    run(FitOptions(**options))  # type: ignore[arg-type]
