"""1-bit Adam: the momentum travels compressed once the variance is known well enough to be frozen (Tang et al., 2021).

For ``freeze_step`` updates this is Adam with decoupled weight decay, from exact mean gradients g. From then on the
variance v stays as it is; each rank adds its own gradient to the common momentum, and the mean of the ranks' momenta is
exchanged by the trainer's compression, with error feedback::

    m_r ← beta1·m + (1 − beta1)·g_r        on rank r
    m ← mean over ranks of m_r             compressed
    w ← w − lr·weight_decay·w
    w ← w − lr·m̂ / (√v̂ + eps)              m̂ = m/(1 − beta1ᵗ), v̂ = v/(1 − beta2ˢ), s = min(t, freeze_step)

Where v is 0 no gradient came before the freeze, and no step is made there: a code has no zero, so what one bit makes of
an m of 0 would be divided by eps alone. Nor is a step after the freeze longer than lr, weight decay aside: Adam's own
are hardly ever (Kingma and Ba, ICLR 2015, section 2.1), since v grows with what comes, but a frozen v that is tiny
holds nothing back. ``bitring.torch.OneBitAdam`` is the same for PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitring.arrays import xp_of
from bitring.settings import setting
from bitring.training.optimizer import Elementwise, State, cannot_raise
from bitring.training.optimizers.adam import learn, step


@dataclass(frozen=True)
class OneBitAdam(Elementwise):
    """Settings of 1-bit Adam; for mode ``sync``. See ``Adam``; ``weight_decay`` is decoupled.

    ``freeze_step`` ≥ 1: so many updates are exact; 15 to 25% of the training are usual.
    """

    lr: float = setting(0.001, above=0)
    beta1: float = setting(0.9, least=0, below=1)
    beta2: float = setting(0.999, least=0, below=1)
    eps: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.0, least=0)
    freeze_step: int = setting(100, least=1)

    counters = ("updates",)

    @property
    def slots(self) -> tuple[str, ...]:
        """``momentum``, the mean of past gradients, and ``variance``, that of their squares until the freeze."""
        return ("momentum", "variance")

    @property
    def exact_steps(self) -> int:  # type: ignore[override]  # of each instance
        """Those before the freeze."""
        return self.freeze_step

    def travelling(self, gradients: Mapping[str, Any], state: State) -> Mapping[str, Any]:
        """Gradients, and from the freeze on the momentum with this rank's gradient in it: new arrays."""
        return {
            name: state["momentum"][name] * self.beta1 + g * (1 - self.beta1)
            if state["updates"][name] >= self.freeze_step
            else g
            for name, g in gradients.items()
        }

    @cannot_raise
    def apply(self, w: Any, g: Any, slots: Mapping[str, Any], t: Any, u: Any) -> None:
        """One step on a run of values; see the module's formulas."""
        m, v, updates = slots["momentum"], slots["variance"], slots["updates"]
        frozen = updates > self.freeze_step
        if frozen:
            m[...] = g
        else:
            learn(m, v, g, self.beta1, self.beta2, u)
        if self.weight_decay:
            w *= 1 - self.lr * self.weight_decay
        bias = 1 - self.beta2 ** min(updates, self.freeze_step)
        moved = step(m, v, self.lr / (1 - self.beta1**updates), bias, self.eps, frozen or w.dtype == np.float16, t, u)
        if frozen:
            xp = xp_of(w)
            xp.minimum(xp.maximum(moved, -self.lr, out=moved), self.lr, out=moved)
        w -= moved
