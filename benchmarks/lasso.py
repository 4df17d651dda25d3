"""Strads' Lasso against scikit-learn's: objective, seconds, updates with and without priority, and dependent columns.

    mpirun -n 4 python benchmarks/lasso.py --json FILE --plot FILE

1,000 rows, 500 features, 40 of them at work. Both fit the same objective; scikit-learn's, on one core, is compiled
coordinate descent one after the other, and has the data in one place. Updates are counted to within 1e-6, relatively,
of the least objective. The dependent columns are groups of ten with a cosine of 0.9 among them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.commands._fit import draw_objective
from bitring.nodes import describe

WIDTHS = (8, 16, 32)


def problem(rows: int, features: int, common: float = 0.0) -> tuple[Any, Any, float]:
    """x, y and the penalty."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, features)) * np.sqrt(1 - common)
    x += np.sqrt(common) * np.repeat(rng.standard_normal((rows, features // 10)), 10, axis=1)
    w = np.zeros(features)
    w[:40] = rng.standard_normal(40)
    y = x @ w + 0.5 * rng.standard_normal(rows)
    return x, y, 0.05 * float(np.abs(x.T @ y).max())


def sklearn_fit(x: Any, y: Any, penalty: float) -> tuple[float, float]:
    """Objective and seconds."""
    from sklearn.linear_model import Lasso

    begin = time.perf_counter()
    w = Lasso(alpha=penalty / len(y), fit_intercept=False, tol=1e-8, max_iter=10_000).fit(x, y).coef_
    took = time.perf_counter() - begin
    return float(0.5 * ((y - x @ w) ** 2).sum() + penalty * np.abs(w).sum()), took


def main() -> None:
    """Measure, and print; rank 0 writes the files."""
    parser = argparse.ArgumentParser(description="Strads' Lasso.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    comm = MPI.COMM_WORLD
    machine = describe(comm)
    x, y, penalty = problem(1000, 500)
    best, theirs = sklearn_fit(x, y, penalty) if comm.rank == 0 else (0.0, 0.0)
    best = float(comm.bcast(best))
    found: dict[str, Any] = {
        "benchmark": "lasso",
        "machine": machine,
        "objective": {"scikit-learn": best},
        "seconds": {"scikit-learn": theirs},
        "updates": {},
    }
    fits: dict[str, Any] = {}
    for priority in (True, False):
        for width in WIDTHS:
            begin = time.perf_counter()
            job = bitring.Strads(bitring.Lasso(penalty), comm=comm, width=width, priority=priority)
            fit = job.fit(x, y)
            took = time.perf_counter() - begin
            if abs(fit.objective - best) > 1e-6 * best:
                raise SystemExit(f"width {width}: the objective is {fit.objective}, scikit-learn's {best}")
            name = f"{'priority' if priority else 'uniform'}, width {width}"
            found["objective"][name] = fit.objective
            found["seconds"][name] = took
            found["updates"][name] = next(each.updates for each in fit.history if each.objective <= best * (1 + 1e-6))
            fits[name] = fit
            if comm.rank == 0:
                print(
                    f"{name}: {fit.objective - best:+.1e}, {found['updates'][name]} updates, {took:.2f} s", flush=True
                )
    least = {kind: min((n, name) for name, n in found["updates"].items() if kind in name) for kind in ("prio", "unif")}
    found["updates_priority_to_uniform"] = least["prio"][0] / least["unif"][0]
    x, y, penalty = problem(300, 200, common=0.9)
    best_dependent = sklearn_fit(x, y, penalty)[0] if comm.rank == 0 else 0.0
    found["dependent_columns"] = {"scikit-learn": best_dependent}
    for independence in (0.4, 1.0):
        for width in WIDTHS:
            try:
                text: Any = (
                    bitring.Strads(bitring.Lasso(penalty), comm=comm, width=width, independence=independence)
                    .fit(x, y)
                    .objective
                )
            except FloatingPointError:
                text = "diverges"
            found["dependent_columns"][f"independence {independence}, width {width}"] = text
            if comm.rank == 0:
                print(f"independence {independence}, width {width}: {text} ({best_dependent})", flush=True)
    if comm.rank == 0:
        print(f"scikit-learn: {theirs:.3f} s; updates, priority to uniform: {found['updates_priority_to_uniform']:.2f}")
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if asked.plot:
            shown = {name: fits[name] for name in (least["prio"][1], least["unif"][1])}
            draw_objective(shown, asked.plot, f"Lasso, 1,000 rows, 500 features, {comm.size} ranks")


if __name__ == "__main__":
    main()
