"""Check this machine and this MPI: threads, device memory, limits, and whether the sums are right."""

from __future__ import annotations

import click


@click.command("doctor")
def command() -> None:
    """Check this machine and this MPI.

    Run it as training will be run: mpirun -n 4 bitring doctor, or srun bitring doctor. One line per check, with what to
    do where something is wrong; the exit status is 1 when a check failed.
    """
    from bitring.commands import _doctor  # initialises MPI

    _doctor.run()
