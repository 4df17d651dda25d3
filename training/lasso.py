"""Linear regression with an l1 penalty, by coordinate descent: 1/2·‖Xw − y‖² + penalty·‖w‖₁."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitring.training.columns import Columns
from bitring.training.penalised import Penalised


@dataclass
class Rows:
    """A worker: its rows, what they are to give, and by how much they miss it, r = y − Xw."""

    columns: Columns
    y: Any
    residual: Any


@dataclass(frozen=True)
class Lasso(Penalised):
    """Settings: ``penalty`` ≥ 0. No intercept; columns as they are given, neither centred nor scaled.

    scikit-learn's ``Lasso(alpha, fit_intercept=False)`` minimises this divided by the number of rows: penalty is alpha
    times the rows. ``ridge`` ≥ 0 adds ridge/2·‖w‖² (the elastic net).
    """

    def worker(self, columns: Columns, y: Any) -> Rows:
        """See Program."""
        return Rows(columns, y, y.copy())

    def push(self, worker: Rows, coordinates: Any) -> Any:
        """Σ x·r over the worker's rows."""
        return worker.columns.dots(coordinates, worker.residual)

    def measure(self, worker: Rows) -> Any:
        """r·r / 2 and r·y."""
        r = worker.residual
        return np.array([0.5 * np.einsum("i,i->", r, r), np.einsum("i,i->", r, worker.y)])

    def apply(self, worker: Rows, coordinates: Any, changes: Any) -> None:
        """Subtract from r what the columns add."""
        worker.residual -= worker.columns.combine(coordinates, changes)

    def dual(self, measured: Any, scale: float) -> Any:
        """See Penalised."""
        return scale * measured[1] - scale**2 * measured[0]

    def zeroing(self, x: Any, y: Any) -> float:
        """See Penalised."""
        return float(np.abs(x.T @ y).max())
