"""Stochastic gradient descent with momentum, Nesterov's momentum and weight decay, as PyTorch defines them.

With gradient g, parameter w and velocity v (zero at first)::

    g ← g + weight_decay·w
    v ← momentum·v + g
    w ← w − lr·v                     plain momentum
    w ← w − lr·(g + momentum·v)      Nesterov

This is ``torch.optim.SGD`` with dampening 0: the learning rate multiplies the velocity and is not accumulated in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitring.arrays import xp_of
from bitring.settings import setting
from bitring.training.optimizer import Elementwise, NativeUpdate, State, cannot_raise


@dataclass(frozen=True)
class SGD(Elementwise):
    """Settings of SGD. ``lr`` > 0; 0 ≤ ``momentum`` < 1; ``nesterov`` needs momentum; ``weight_decay`` ≥ 0 (L2)."""

    lr: float = setting(0.01, above=0)
    momentum: float = setting(0.0, least=0, below=1)
    nesterov: bool = False
    weight_decay: float = setting(0.0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD: nesterov=True needs momentum > 0, got momentum=0")

    @property
    def slots(self) -> tuple[str, ...]:
        """``velocity``, when there is momentum."""
        return ("velocity",) if self.momentum else ()

    def native_update(self) -> NativeUpdate | None:
        """See Optimizer."""
        if not self.updates_as(SGD):
            return None
        rule = "sgd_nesterov" if self.nesterov else "sgd_momentum" if self.momentum else "sgd"
        return NativeUpdate(rule, self.lr, self.momentum, self.weight_decay)

    @cannot_raise
    def apply(self, w: Any, g: Any, slots: Mapping[str, Any], t: Any, u: Any) -> None:
        """One step on a run of values; see the module's formulas."""
        xp = xp_of(w)
        if self.weight_decay:
            xp.multiply(w, self.weight_decay, out=t)
            t += g
            g = t
        if self.momentum:
            v = slots["velocity"]
            v *= self.momentum
            v += g
            if self.nesterov:
                xp.multiply(v, self.momentum, out=u)
                u += g
                g = u
            else:
                g = v
        xp.multiply(g, self.lr, out=t)
        w -= t

    def restart(self, state: State) -> None:
        """Set the velocity to zero."""
        for velocity in state.get("velocity", {}).values():
            velocity.fill(0)
