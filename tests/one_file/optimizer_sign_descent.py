"""Steps of one size, in the direction of the gradient's sign: w ← w − lr·sign(g)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitring.arrays import xp_of
from bitring.settings import setting
from bitring.training.optimizer import Elementwise


@dataclass(frozen=True)
class SignDescent(Elementwise):
    """``lr`` > 0."""

    lr: float = setting(0.001, above=0)

    @property
    def slots(self) -> tuple[str, ...]:
        """None."""
        return ()

    def apply(self, w: Any, g: Any, slots: Mapping[str, Any], t: Any, u: Any) -> None:
        """See Optimizer."""
        t[...] = xp_of(w).sign(g)
        t *= w.dtype.type(self.lr)
        w -= t
