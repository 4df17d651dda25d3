"""L-BFGS that sees no vector: its direction from dot products alone (Chen, Wang and Zhou, NIPS 2014).

The two-loop recursion gives a direction that is a combination of the last steps s, the changes of the gradient y, and
the gradient g. Its coefficients follow from the Gram matrix of these 2k + 1 vectors, the *basis*. So whoever has the
vectors, in shards, computes dot products and combinations, and what decides needs to keep numbers only.

An iteration is a generator (``iteration``): it yields the commands below, and is sent what they measure.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from bitring.errors import NonFiniteError
from bitring.settings import Settings, setting
from bitring.training.line_search import LineSearch

EVALUATIONS = 20
"""So many steps along one direction are tried at most."""


MOST_PAIRS = 150
"""What a shard answers must fit into a message: 6·pairs + 1 products, of two nodes at most, of 2,048 numbers."""


@dataclass(frozen=True)
class LBFGS(Settings):
    """Settings of L-BFGS: ``memory``, 0 to 150, is how many pairs (s, y) it keeps; without any it is steepest descent.

    It needs the loss and the gradient of a whole batch, several times in an iteration: it is for
    ``bitring.Sandblaster``, and no optimizer of the modes of ``DataParallel``.
    """

    memory: int = setting(10, least=0, most=MOST_PAIRS)

    is_for: ClassVar[str] = "bitring.Sandblaster"


@dataclass(frozen=True)
class Evaluate:
    """Measure the loss at w + step·d, its gradient there, and the gradient's product with d: (loss, slope)."""

    step: float


@dataclass(frozen=True)
class Measure:
    """Take the evaluated gradient for g. Answered by its products with the basis: s oldest first, y, g itself."""


@dataclass(frozen=True)
class Combine:
    """Make d the combination of the basis with these coefficients, in the basis' order."""

    coefficients: Any


@dataclass(frozen=True)
class Accept:
    """Go to the point that was evaluated last. ``keep``: store (s, y), in the oldest pair's place where all are taken.

    Answered by the products that ``History.accepted`` or, without ``keep``, ``History.measured`` takes.
    """

    keep: bool


@dataclass(frozen=True)
class Forget:
    """Drop all pairs."""


Command = Evaluate | Measure | Combine | Accept | Forget

NUMBERS = ("pairs", "loss", "step", "slope", "iterations", "evaluations", "restarts")
"""Of a history, beside the Gram matrix."""


@dataclass
class History:
    """What L-BFGS knows between two iterations, in numbers.

    ``gram``: products of the basis, (2m + 1)², with s at 0 … m − 1, y at m … 2m − 1, g at 2m; the first ``pairs`` of
    each are in use, oldest first. ``loss``: at the present parameters; NaN before the first evaluation. ``step`` and
    ``slope``: of the last line search; step 0 where no step lowered the loss. ``iterations``, ``evaluations``,
    ``restarts``: so many there were.
    """

    memory: int
    pairs: int = 0
    loss: float = math.nan
    step: float = 0.0
    slope: float = 0.0
    iterations: int = 0
    evaluations: int = 0
    restarts: int = 0
    gram: Any = field(default_factory=lambda: np.zeros((0, 0)))

    def __post_init__(self) -> None:
        if self.gram.shape != (2 * self.memory + 1,) * 2:
            self.gram = np.zeros((2 * self.memory + 1,) * 2)

    @classmethod
    def of(cls, memory: int, numbers: Iterable[float]) -> History:
        """The history with these ``numbers``, but without their Gram matrix."""
        pairs, loss, step, slope, *counts = numbers
        return cls(memory, int(pairs), loss, step, slope, *map(int, counts))

    @property
    def numbers(self) -> tuple[float, ...]:
        """``NUMBERS``."""
        return tuple(getattr(self, name) for name in NUMBERS)

    @property
    def basis(self) -> list[int]:
        """Rows of ``gram`` in use."""
        return [*range(self.pairs), *range(self.memory, self.memory + self.pairs), 2 * self.memory]

    def measured(self, products: Any) -> None:
        """Take g's products with the basis."""
        self._set(2 * self.memory, self.basis, products)

    def accepted(self, products: Any) -> None:
        """Take the products that a new pair brings: 6k of them, of k pairs.

        They are s·{s}, s·{y}, y·{s but its own}, y·{y}, g·{s}, g·{y}, g·g: s and y the new ones, {…} oldest first.
        """
        m = self.memory
        if self.pairs == m:
            for first in (0, m):
                self.gram[first : first + m - 1] = self.gram[first + 1 : first + m].copy()
                self.gram[:, first : first + m - 1] = self.gram[:, first + 1 : first + m].copy()
        else:
            self.pairs += 1
        k = self.pairs
        of_s, of_y, g = [*range(k)], [*range(m, m + k)], 2 * m
        at = iter(np.split(np.asarray(products), np.cumsum([k, k, k - 1, k, k, k])))
        for row, columns in ((k - 1, of_s), (k - 1, of_y), (m + k - 1, of_s[:-1]), (m + k - 1, of_y), (g, of_s)):
            self._set(row, columns, next(at))
        self._set(g, [*of_y, g], np.concatenate(list(at)))

    def remeasured(self, products: Any) -> None:
        """Take all products of the basis, in the order of ``np.triu_indices``."""
        basis = np.array(self.basis)
        rows, columns = (basis[at] for at in np.triu_indices(len(basis)))
        self.gram[rows, columns] = self.gram[columns, rows] = products

    def forgotten(self) -> None:
        """Drop the pairs."""
        self.pairs = 0
        self.restarts += 1

    def _set(self, row: int, columns: list[int], values: Any) -> None:
        self.gram[row, columns] = values
        self.gram[columns, row] = values


def direction(gram: Any) -> Any:
    """The coefficients of L-BFGS's direction −H·g, float64, from the Gram matrix of s, y and g, oldest pair first.

    ``gram``: (2k + 1, 2k + 1). H begins, before the pairs, as s·y / y·y of the newest times the identity. All s·y must
    be positive.
    """
    k = len(gram) // 2
    coefficients = np.zeros(2 * k + 1)
    coefficients[-1] = -1.0
    alphas = np.zeros(k)
    for i in reversed(range(k)):
        alphas[i] = coefficients @ gram[:, i] / gram[i, k + i]
        coefficients[k + i] -= alphas[i]
    if k:
        coefficients *= gram[k - 1, 2 * k - 1] / gram[2 * k - 1, 2 * k - 1]
    for i in range(k):
        beta = coefficients @ gram[:, k + i] / gram[i, k + i]
        coefficients[i] += alphas[i] - beta
    return coefficients


def iteration(history: History, new_batch: bool) -> Generator[Command, Any, float]:
    """One iteration: yields commands, is sent their answers, and returns the loss at the new parameters.

    ``new_batch``: ``history.loss`` and g are of other samples, or there are none. Where no step along the gradient
    lowers the loss, nothing changes. Raises NonFiniteError when the loss or the gradient is no number where it begins.
    """
    if new_batch:
        history.loss, _ = yield Evaluate(0.0)
        history.evaluations += 1
        history.measured((yield Measure()))
    if not (math.isfinite(history.loss) and math.isfinite(history.gram[-1, -1])):
        loss, history.loss = history.loss, math.nan
        raise NonFiniteError(f"LBFGS: the loss is {loss} at the present parameters, or their gradient has NaN or Inf")
    stuck = not new_batch and history.iterations > 0 and history.step == 0  # the last one tried in vain, here
    if stuck or history.gram[-1, -1] == 0:
        return history.loss
    moved = yield from _along(history)
    if not moved and history.pairs:
        history.forgotten()
        yield Forget()
        moved = yield from _along(history)
    if not moved:
        history.step = 0.0
    history.iterations += 1
    return history.loss


def _along(history: History) -> Generator[Command, Any, bool]:
    """Search along the direction that the history gives. Returns whether the parameters have moved."""
    gram = history.gram[np.ix_(history.basis, history.basis)]
    coefficients = direction(gram)
    slope = float(coefficients @ gram[:, -1])
    if not slope < 0:  # what is left of curvature is rounding
        return False
    yield Combine(coefficients)
    if history.pairs:
        first = 1.0
    elif history.memory == 0 and history.step > 0:
        first = history.step * history.slope / slope  # the same decrease as last time, to first order
    else:
        first = 1 / math.sqrt(-slope)
    search = LineSearch(history.loss, slope, first)
    step, loss, slope_there = first, math.nan, math.nan
    for _ in range(EVALUATIONS):
        step = search.step
        loss, slope_there = yield Evaluate(step)
        history.evaluations += 1
        if search.tell(loss, slope_there):
            break
    if not loss < history.loss:
        return False
    history.step, history.slope, history.loss = step, slope, loss
    # The same products are s·y and the slope's part of it: a pair whose curvature is rounding spoils all directions.
    keep = bool(history.memory and step * (slope_there - slope) > np.finfo(np.float64).eps * -slope * step)
    products = yield Accept(keep)
    (history.accepted if keep else history.measured)(products)
    return True
