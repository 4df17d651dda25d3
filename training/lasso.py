"""Linear regression with an l1 penalty, by coordinate descent: 1/2·‖Xw − y‖² + penalty·‖w‖₁."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitring.settings import setting
from bitring.training.columns import Columns
from bitring.training.program import Program


@dataclass
class Rows:
    """A worker: its rows, what they are to give, and by how much they miss it, r = y − Xw."""

    columns: Columns
    y: Any
    residual: Any


@dataclass(frozen=True)
class Lasso(Program):
    """Settings: ``penalty`` ≥ 0. No intercept; columns as they are given, neither centred nor scaled.

    scikit-learn's ``Lasso(alpha, fit_intercept=False)`` minimises this divided by the number of rows: penalty is alpha
    times the rows. ``ridge`` ≥ 0 adds ridge/2·‖w‖² (the elastic net).
    """

    penalty: float = setting(1.0, least=0)
    ridge: float = setting(0.0, least=0)

    def worker(self, columns: Columns, y: Any) -> Rows:
        """See Program."""
        return Rows(columns, y, y.copy())

    def push(self, worker: Rows, coordinates: Any) -> Any:
        """Σ x·r over the worker's rows."""
        return worker.columns.dots(coordinates, worker.residual)

    def measure(self, worker: Rows) -> Any:
        """r·r and r·y."""
        r = worker.residual
        return np.array([np.einsum("i,i->", r, r), np.einsum("i,i->", r, worker.y)])

    def pull(self, sums: Any, values: Any, squares: Any) -> Any:
        """The minimum along each coordinate: soft-thresholded."""
        pulls = sums + squares * values
        new = np.sign(pulls) * np.maximum(np.abs(pulls) - self.penalty, 0)
        below = squares + self.ridge
        return np.divide(new, below, out=np.zeros_like(new), where=below > 0)

    def apply(self, worker: Rows, coordinates: Any, changes: Any) -> None:
        """Subtract from r what the columns add."""
        worker.residual -= worker.columns.combine(coordinates, changes)

    def objective(self, measured: Any, values: Any) -> float:
        """See Program."""
        lasso = 0.5 * measured[0] + self.penalty * np.abs(values).sum()
        return float(lasso + 0.5 * self.ridge * (values**2).sum())

    def gap(self, measured: Any, sums: Any, values: Any) -> float:
        """The duality gap, at r scaled down to where it is feasible."""
        squares = measured[0] + self.ridge * (values**2).sum()
        most = float(np.abs(sums - self.ridge * values).max(initial=0.0))
        scale = 1.0 if most <= self.penalty else self.penalty / most
        dual = scale * measured[1] - 0.5 * scale**2 * squares
        return self.objective(measured, values) - float(dual)
