"""The base of programs that fit linear models: a loss of every row, an l1 penalty, and a ridge.

The objective is the sum of the losses of the rows + penalty·‖w‖₁ + ridge/2·‖w‖².
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bitring.settings import setting
from bitring.training.program import Program


@dataclass(frozen=True)
class Penalised(Program):
    """Settings: ``penalty`` ≥ 0, ``ridge`` ≥ 0. No intercept; columns as they are, neither centred nor scaled.

    A program's ``push`` sums x times how far each row's loss pulls. Of its two measures the first is the sum of the
    losses.
    """

    penalty: float = setting(1.0, least=0)
    ridge: float = setting(0.0, least=0)

    bend: ClassVar[float] = 1.0
    """A row's loss curves no more than this, by the row's prediction."""

    def pull(self, sums: Any, values: Any, squares: Any) -> Any:
        """The minimum along each coordinate, of what bounds the objective there: soft-thresholded."""
        curved = self.bend * squares
        pulls = sums + curved * values
        new = np.sign(pulls) * np.maximum(np.abs(pulls) - self.penalty, 0)
        below = curved + self.ridge
        return np.divide(new, below, out=np.zeros_like(new), where=below > 0)

    def objective(self, measured: Any, values: Any) -> float:
        """See Program."""
        penalties = self.penalty * np.abs(values).sum() + 0.5 * self.ridge * (values**2).sum()
        return float(measured[0] + penalties)

    def gap(self, measured: Any, sums: Any, values: Any) -> float:
        """The duality gap at the rows' pulls, scaled down to where they are feasible; the ridge counts as rows, too.

        With a ridge everything is feasible, at a price: where that is less, as they are.
        """
        most = float(np.abs(sums - self.ridge * values).max(initial=0.0))
        scale = 1.0 if most <= self.penalty else self.penalty / most
        dual = self.dual(measured, scale) - 0.5 * scale**2 * self.ridge * (values**2).sum()
        if self.ridge > 0:
            beyond = np.maximum(np.abs(sums) - self.penalty, 0)
            dual = max(dual, self.dual(measured, 1.0) - (beyond**2).sum() / (2 * self.ridge))
        return self.objective(measured, values) - float(dual)

    @abstractmethod
    def dual(self, measured: Any, scale: float) -> Any:
        """The dual objective of the rows, or less, at their pulls times ``scale``, 0 to 1."""

    @abstractmethod
    def zeroing(self, x: Any, y: Any) -> float:
        """The least penalty at which all coefficients are zero."""
