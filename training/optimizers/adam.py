"""Adam: steps along the mean of past gradients, scaled by the mean of their squares (Kingma and Ba, ICLR 2015).

With gradient g, parameter w, momentum m and variance v (zero at first) at the t-th update::

    g ← g + weight_decay·w              unless decoupled
    m ← beta1·m + (1 − beta1)·g
    v ← beta2·v + (1 − beta2)·g²
    w ← w − lr·weight_decay·w           decoupled: AdamW (Loshchilov and Hutter, ICLR 2019)
    w ← w − lr·m̂ / (√v̂ + eps)           m̂ = m/(1 − beta1ᵗ), v̂ = v/(1 − beta2ᵗ)

This is ``torch.optim.Adam``, or ``AdamW``. Where the momentum restarts, with the blocks of ``block_momentum``, so does
the t of m̂.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitring.arrays import xp_of
from bitring.settings import setting
from bitring.training.optimizer import Elementwise, State, cannot_raise


@dataclass(frozen=True)
class Adam(Elementwise):
    """Settings of Adam. ``lr`` > 0; 0 ≤ ``beta1``, ``beta2`` < 1; ``eps`` > 0 keeps the division finite.

    ``weight_decay`` ≥ 0 is added to the gradient (L2), or taken from the parameter by itself when ``decoupled``.
    """

    lr: float = setting(0.001, above=0)
    beta1: float = setting(0.9, least=0, below=1)
    beta2: float = setting(0.999, least=0, below=1)
    eps: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.0, least=0)
    decoupled: bool = False

    counters = ("momentum_updates", "variance_updates")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoupled and self.weight_decay == 0:
            raise ValueError("Adam: decoupled=True needs weight_decay > 0, got weight_decay=0")

    @property
    def slots(self) -> tuple[str, ...]:
        """``momentum``, the mean of past gradients, and ``variance``, that of their squares."""
        return ("momentum", "variance")

    @cannot_raise
    def apply(self, w: Any, g: Any, slots: Mapping[str, Any], t: Any, u: Any) -> None:
        """One step on a run of values; see the module's formulas."""
        xp = xp_of(w)
        if self.weight_decay and not self.decoupled:
            xp.multiply(w, self.weight_decay, out=t)
            t += g
            g = t
        m, v = slots["momentum"], slots["variance"]
        learn(m, v, g, self.beta1, self.beta2, u)
        if self.decoupled:
            w *= 1 - self.lr * self.weight_decay
        t_m, t_v = slots["momentum_updates"], slots["variance_updates"]
        underflows = w.dtype == np.float16  # and eps with it
        w -= step(m, v, self.lr / (1 - self.beta1**t_m), 1 - self.beta2**t_v, self.eps, underflows, t, u)

    def restart(self, state: State) -> None:
        """Set the momentum to zero, with the count of its updates; the variance stays."""
        for part in ("momentum", "momentum_updates"):
            for array in state.get(part, {}).values():
                array.fill(0)


def learn(m: Any, v: Any, g: Any, beta1: float, beta2: float, u: Any) -> None:
    """Take the gradient ``g`` into momentum and variance, in place; ``u`` is scratch."""
    xp = xp_of(m)
    xp.subtract(g, m, out=u)
    u *= 1 - beta1
    m += u
    xp.multiply(g, 1 - beta2, out=u)
    u *= g
    v *= beta2
    v += u


def step(m: Any, v: Any, lr: float, scale: float, eps: float, masked: bool, t: Any, u: Any) -> Any:
    """lr·m / (√(v/scale) + eps), in ``t``; ``u`` is scratch. ``masked``: 0 where v is 0."""
    xp = xp_of(m)
    xp.sqrt(v, out=u)
    u *= 1 / math.sqrt(scale)
    u += eps
    if masked:
        u[v == 0] = math.inf
    xp.divide(m, u, out=t)
    t *= lr
    return t
