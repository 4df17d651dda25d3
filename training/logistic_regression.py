"""Logistic regression with an l1 penalty, by coordinate descent: Σ log(1 + exp(−y·xw)) + penalty·‖w‖₁, y = ±1.

A coordinate's new value is the minimum of a parabola above the objective, since a row's loss bends by 1/4 at most; so
each change lowers the objective (Bradley et al., "Parallel coordinate descent for l1-regularized loss minimization",
ICML 2011).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bitring.training.columns import Columns
from bitring.training.penalised import Penalised


@dataclass
class Rows:
    """A worker: its rows, their signs y = ±1, and margins y·xw."""

    columns: Columns
    y: Any
    margins: Any


@dataclass(frozen=True)
class LogisticRegression(Penalised):
    """Settings: ``penalty`` ≥ 0. No intercept; columns as they are given. y has two values, the larger for x·w > 0.

    scikit-learn's ``LogisticRegression(C, l1_ratio=1, fit_intercept=False)`` minimises this times C = 1 / penalty.
    ``ridge`` ≥ 0 adds ridge/2·‖w‖².
    """

    bend: ClassVar[float] = 0.25

    def targets(self, y: Any) -> Any:
        """−1 for the smaller value of ``y``, 1 for the larger. Raises ValueError unless there are two."""
        values = np.unique(y)
        if values.size != 2:
            raise ValueError(f"LogisticRegression: y must have two different values; got {values.size}")
        return np.where(y == values[1], 1.0, -1.0)

    def worker(self, columns: Columns, y: Any) -> Rows:
        """See Program."""
        return Rows(columns, y, np.zeros_like(y))

    def push(self, worker: Rows, coordinates: Any) -> Any:
        """Σ x·y·u over the worker's rows; u = 1 / (1 + exp(margin)) is what the row gives to the other side."""
        return worker.columns.dots(coordinates, worker.y * np.exp(-np.logaddexp(0.0, worker.margins)))

    def measure(self, worker: Rows) -> Any:
        """The losses, and the entropies of the rows' (u, 1 − u)."""
        losses, others = np.logaddexp(0.0, -worker.margins), np.logaddexp(0.0, worker.margins)
        return np.array([losses.sum(), (np.exp(-others) * others + np.exp(-losses) * losses).sum()])

    def apply(self, worker: Rows, coordinates: Any, changes: Any) -> None:
        """Add to the margins what the columns add."""
        worker.margins += worker.y * worker.columns.combine(coordinates, changes)

    def dual(self, measured: Any, scale: float) -> Any:
        """See Penalised; an entropy is concave, and 0 at 0: at scale·u it is scale times the one at u, or more."""
        return scale * measured[1]

    def zeroing(self, x: Any, y: Any) -> float:
        """See Penalised."""
        return float(np.abs(x.T @ self.targets(y)).max()) / 2
