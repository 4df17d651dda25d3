"""AdaGrad: each value's step shrinks with the squares of its own past gradients (Duchi, Hazan and Singer, 2011).

With gradient g, parameter w and sum of squares s (zero at first)::

    g ← g + weight_decay·w
    s ← s + g²
    w ← w − lr·g / (√s + eps)

This is ``torch.optim.Adagrad`` without its decay of the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitring.arrays import xp_of
from bitring.settings import setting
from bitring.training.optimizer import Elementwise, NativeUpdate, cannot_raise


@dataclass(frozen=True)
class AdaGrad(Elementwise):
    """Settings of AdaGrad. ``lr`` > 0; ``eps`` > 0 keeps the division finite; ``weight_decay`` ≥ 0 (L2)."""

    lr: float = setting(0.01, above=0)
    eps: float = setting(1e-10, above=0)
    weight_decay: float = setting(0.0, least=0)

    @property
    def slots(self) -> tuple[str, ...]:
        """``squares``: the sum of squared gradients."""
        return ("squares",)

    def native_update(self) -> NativeUpdate | None:
        """See Optimizer."""
        if not self.updates_as(AdaGrad):
            return None
        return NativeUpdate("adagrad", self.lr, weight_decay=self.weight_decay, eps=self.eps)

    @cannot_raise
    def apply(self, w: Any, g: Any, slots: Mapping[str, Any], t: Any, u: Any) -> None:
        """One step on a run of values; see the module's formulas."""
        xp = xp_of(w)
        if self.weight_decay:
            xp.multiply(w, self.weight_decay, out=t)
            t += g
            g = t
        s = slots["squares"]
        xp.multiply(g, g, out=u)
        s += u
        xp.sqrt(s, out=u)
        u += self.eps
        xp.divide(g, u, out=t)
        t *= self.lr
        w -= t
