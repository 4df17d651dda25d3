"""Line search for the strong Wolfe conditions, by Moré and Thuente (ACM TOMS 20, 1994), a step at a time.

Along a direction the loss is φ(t), its slope φ'(t). A step t is accepted when it has decreased the loss enough,
φ(t) ≤ φ(0) + 1e-3·t·φ'(0), and the slope too, abs(φ'(t)) ≤ 0.9·abs(φ'(0)). These are the constants of L-BFGS-B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DECREASE = 1e-3
CURVATURE = 0.9

_NARROW = 0.1
"""An interval that is so narrow, by its upper end, is not searched further."""

_LONGEST = 1e10
_EXTRAPOLATION = 4.0


@dataclass
class _Point:
    step: float
    loss: float
    slope: float


class LineSearch:
    """One search along a direction.

    loss, slope: φ(0) and φ'(0) < 0. step: the first to try. ``step`` is the one to evaluate next, until ``tell`` has
    returned True: then it is the result, and ``converged`` says whether it fulfils both conditions.
    """

    def __init__(self, loss: float, slope: float, step: float) -> None:
        self.step = min(step, _LONGEST)
        self.converged = False
        self._start = _Point(0.0, loss, slope)
        self._best, self._other = _Point(0.0, loss, slope), _Point(0.0, loss, slope)
        self._bracketed = False
        self._first_stage = True
        self._width, self._width_before = _LONGEST, 2 * _LONGEST
        self._least, self._most = 0.0, self.step * (1 + _EXTRAPOLATION)
        self._ceiling = _LONGEST  # beyond it the loss is no number

    def tell(self, loss: float, slope: float) -> bool:
        """Take φ and φ' at ``step``. Returns whether the search is over; else ``step`` is the next one."""
        if not (math.isfinite(loss) and math.isfinite(slope)):
            self._ceiling = self.step
            self._most = min(self._most, self.step)
            self.step = self._best.step + 0.5 * (self.step - self._best.step)
            return not self._best.step < self.step < self._ceiling
        t = self.step
        needed = DECREASE * self._start.slope
        enough = self._start.loss + t * needed
        if self._first_stage and loss <= enough and slope >= 0:
            self._first_stage = False
        if loss <= enough and abs(slope) <= -CURVATURE * self._start.slope:
            self.converged = True
            return True
        if self._bracketed and (not self._least < t < self._most or self._is_narrow()):
            return True
        if t >= self._ceiling or (t == _LONGEST and loss <= enough and slope <= needed):
            return True
        if self._first_stage and enough < loss <= self._best.loss:
            # The loss less the decrease that is asked for has its minimum where the conditions hold.
            for point in (self._best, self._other):
                point.loss -= point.step * needed
                point.slope -= needed
            self._narrow(_Point(t, loss - t * needed, slope - needed))
            for point in (self._best, self._other):
                point.loss += point.step * needed
                point.slope += needed
        else:
            self._narrow(_Point(t, loss, slope))
        self._limit()
        return False

    def _is_narrow(self) -> bool:
        return self._most - self._least <= _NARROW * self._most

    def _limit(self) -> None:
        """Keep ``step`` inside the interval that is left, which shrinks by a third in two steps at least."""
        best, other = self._best.step, self._other.step
        if self._bracketed:
            if abs(other - best) >= 0.66 * self._width_before:
                self.step = best + 0.5 * (other - best)
            self._width_before, self._width = self._width, abs(other - best)
            self._least, self._most = min(best, other), max(best, other)
        else:
            self._least = self.step + 1.1 * (self.step - best)
            self._most = self.step + _EXTRAPOLATION * (self.step - best)
        self.step = min(max(self.step, 0.0), _LONGEST)
        if self.step >= self._ceiling:
            self.step = best + 0.5 * (self._ceiling - best)
        if self._bracketed and (not self._least < self.step < self._most or self._is_narrow()):
            self.step = best

    def _narrow(self, new: _Point) -> None:
        """Choose the next step from the new point and the two that bound the minimum, and renew those."""
        best, other = self._best, self._other
        opposite = new.slope * math.copysign(1.0, best.slope) < 0
        if new.loss > best.loss:  # the minimum is between: the loss has risen
            cubic, quadratic = _cubic(best, new), _quadratic_of_losses(best, new)
            near = abs(cubic - best.step) < abs(quadratic - best.step)
            step = cubic if near else cubic + 0.5 * (quadratic - cubic)
            self._bracketed = True
        elif opposite:  # between, too: the slope has changed its sign
            cubic, secant = _cubic(new, best), _secant(new, best)
            step = cubic if abs(cubic - new.step) > abs(secant - new.step) else secant
            self._bracketed = True
        elif abs(new.slope) < abs(best.slope):  # it is flatter there: the minimum is beyond
            step = self._beyond(best, other, new)
        elif self._bracketed:  # it falls as steeply as before
            step = _cubic(new, other)
        else:
            step = self._most if new.step > best.step else self._least
        if new.loss > best.loss:
            self._other = new
        else:
            if opposite:
                self._other = best
            self._best = new
        self.step = step

    def _beyond(self, best: _Point, other: _Point, new: _Point) -> float:
        theta, gamma = _cubic_terms(best, new)
        gamma = math.copysign(gamma, best.step - new.step)
        p, q = gamma - new.slope + theta, gamma + (best.slope - new.slope) + gamma
        r = p / q if q else 0.0
        secant = _secant(new, best)
        if r < 0 and gamma != 0:
            cubic = new.step + r * (best.step - new.step)
        else:
            cubic = self._most if new.step > best.step else self._least
        if self._bracketed:
            step = cubic if abs(cubic - new.step) < abs(secant - new.step) else secant
            bound = new.step + 0.66 * (other.step - new.step)
            return min(bound, step) if new.step > best.step else max(bound, step)
        step = cubic if abs(cubic - new.step) > abs(secant - new.step) else secant
        return max(self._least, min(self._most, step))


def _cubic_terms(a: _Point, b: _Point) -> tuple[float, float]:
    """θ, and γ ≥ 0, of the cubic through both points with both slopes."""
    theta = 3 * (a.loss - b.loss) / (b.step - a.step) + a.slope + b.slope
    scale = max(abs(theta), abs(a.slope), abs(b.slope))
    if scale == 0:
        return theta, 0.0
    return theta, scale * math.sqrt(max(0.0, (theta / scale) ** 2 - (a.slope / scale) * (b.slope / scale)))


def _cubic(a: _Point, b: _Point) -> float:
    """The minimum of the cubic, told from ``a``."""
    theta, gamma = _cubic_terms(a, b)
    gamma = math.copysign(gamma, b.step - a.step)
    p, q = gamma - a.slope + theta, gamma - a.slope + gamma + b.slope
    return a.step + (p / q if q else 0.5) * (b.step - a.step)


def _quadratic_of_losses(a: _Point, b: _Point) -> float:
    """The minimum of the parabola through both points with the slope at ``a``."""
    width = b.step - a.step
    return a.step + a.slope / ((a.loss - b.loss) / width + a.slope) / 2 * width


def _secant(a: _Point, b: _Point) -> float:
    """The zero of the line through both slopes."""
    return a.step + a.slope / (a.slope - b.slope) * (b.step - a.step) if a.slope != b.slope else b.step
