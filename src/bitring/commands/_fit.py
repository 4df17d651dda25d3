"""The work of ``bitring fit``. Importing this initialises MPI."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from bitring.commands._folder import make_writable, named, write_text
from bitring.commands._pictures import COLORS, figure, plain
from bitring.commands._ranks import ending_together, limit_threads, refuse_if_alone, together
from bitring.commands._units import count
from bitring.machine import versions
from bitring.training.lasso import Lasso
from bitring.training.logistic_regression import LogisticRegression
from bitring.training.penalised import Penalised
from bitring.training.strads import Fit, Strads

PROGRAMS: dict[str, type[Penalised]] = {"lasso": Lasso, "logistic_regression": LogisticRegression}

_SHARE = 0.1


@dataclass(frozen=True)
class FitOptions:
    """The options of ``bitring fit``, unchecked."""

    program: str
    data: Path
    penalty: float | None
    ridge: float
    width: int
    independence: float
    priority: bool
    seed: int
    tolerance: float
    output: Path | None


def run(options: FitOptions) -> None:
    """Fit as the options say, on MPI.COMM_WORLD. Collective."""
    refuse_if_alone()
    comm = MPI.COMM_WORLD
    with ending_together(comm):
        limit_threads(comm)
        if options.output is not None:
            together(comm, lambda: _require_writable(comm, options.output))
        x, y = together(comm, lambda: load_rows(options.data))
        program = PROGRAMS[options.program]
        penalty = options.penalty
        if penalty is None:
            penalty = together(comm, lambda: _default_penalty(program(), x, y))
        job = together(
            comm,
            lambda: Strads(
                program(penalty, options.ridge),
                comm=comm,
                width=options.width,
                independence=options.independence,
                priority=options.priority,
                seed=options.seed,
                tolerance=options.tolerance,
            ),
        )
        begin = time.perf_counter()
        fit = together(comm, lambda: _fit(job, x, y))
        seconds = time.perf_counter() - begin
        together(comm, lambda: _conclude(options, penalty, fit, seconds, comm.size, x.shape))


def _require_writable(comm: MPI.Intracomm, folder: Path | None) -> None:
    if comm.rank == 0 and folder is not None:
        make_writable(folder)


def load_rows(path: Path) -> tuple[Any, Any]:
    """x and y of a file. Raises OSError, ValueError, and ImportError where svmlight's format cannot be read."""
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    try:
        return _read(path)
    except (ImportError, OSError):
        raise
    except Exception as error:  # a damaged file fails in whatever its bytes happen to say
        raise ValueError(f"--data {path} cannot be used: {error}") from error


def _read(path: Path) -> tuple[Any, Any]:
    if path.suffix == ".npz":
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [name for name in ("x", "y") if name not in arrays]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}, only {', '.join(arrays) or 'nothing'}")
            x, y = arrays["x"], arrays["y"]
        for name, array in (("x", x), ("y", y)):
            if array.dtype.kind not in "fiub":
                raise ValueError(f"{name} must be real numbers; got {array.dtype}")
        y = y.astype(np.float64)
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise ValueError(f"x must be (rows, features) and y (rows,); got {x.shape} and {y.shape}")
        return x, y
    try:
        from sklearn.datasets import load_svmlight_file
    except ImportError as error:
        raise ImportError(
            "svmlight's format needs scikit-learn, which is not installed: pip install 'bitring[demo]'", name="sklearn"
        ) from error
    x, y = load_svmlight_file(str(path))[:2]
    return x, y


def _default_penalty(program: Penalised, x: Any, y: Any) -> float:
    with np.errstate(all="ignore"):
        penalty = _SHARE * program.zeroing(x, y)
    if not np.isfinite(penalty):
        raise ValueError("x and y must be finite, and so must x's products with y: there is NaN or Inf")
    return penalty


def _fit(job: Strads, x: Any, y: Any) -> Fit:
    try:
        return job.fit(x, y)
    except FloatingPointError as error:  # raised on all ranks alike
        raise ValueError(str(error)) from None


def _conclude(
    options: FitOptions, penalty: float, fit: Fit, seconds: float, ranks: int, shape: tuple[int, ...]
) -> None:
    """Write the results, and say how it went; on rank 0."""
    if MPI.COMM_WORLD.rank:
        return
    used = int(np.count_nonzero(fit.coefficients))
    summary = {
        **{key: str(x) if isinstance(x, Path) else x for key, x in dataclasses.asdict(options).items()},
        "penalty": penalty,
        "rows": shape[0],
        "features": shape[1],
        "ranks": ranks,
        "objective": fit.objective,
        "gap": fit.gap,
        "nonzero": used,
        "updates": fit.updates,
        "rounds": len(fit.chosen),
        "seconds": seconds,
        "versions": versions(),
    }
    click.echo(f"objective      {fit.objective:.6g}, at most {fit.gap:.1e} above its minimum")
    click.echo(f"coefficients   {used} of {count(shape[1], 'feature')} are not zero")
    click.echo(f"updates        {fit.updates} in {count(len(fit.chosen), 'round')}, {seconds:.2f} s")
    if options.output is None:
        return
    coefficients = options.output / "coefficients.npy"
    with named(coefficients):
        np.save(coefficients, fit.coefficients)
    write_text(options.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    picture = options.output / "objective.png"
    try:
        draw_objective(
            {"": fit}, picture, f"{options.program}, {shape[0]} rows, {shape[1]} features, {count(ranks, 'rank')}"
        )
    except ImportError as error:
        click.echo(f"picture        not drawn: {error}")
    else:
        click.echo(f"picture        {picture}")


def draw_objective(fits: dict[str, Fit], path: Path, title: str) -> None:
    """Draw how far each fit's objective is above the least, by seconds and by updates. Raises ImportError, OSError."""
    drawing = figure(9, 3.6)
    drawing.suptitle(title)
    least = min(fit.objective - fit.gap for fit in fits.values())
    for place, (of, label) in enumerate((("seconds", "seconds"), ("updates", "updates of coordinates")), 1):
        axes = drawing.add_subplot(1, 2, place)
        plain(axes)
        for color, (name, fit) in zip(COLORS, fits.items(), strict=False):
            above = [max(each.objective - least, 1e-12) for each in fit.history]
            axes.plot([getattr(each, of) for each in fit.history], above, color=color, label=name)
        axes.set_yscale("log")
        axes.set_xlabel(label)
        if place == 1:
            axes.set_ylabel("objective above its minimum")
        elif len(fits) > 1:
            axes.legend(frameon=False)
    drawing.savefig(path)
