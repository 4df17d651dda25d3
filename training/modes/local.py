"""Parameter averaging: ranks train alone for τ steps, then take the mean of their parameters (McDonald et al., 2010).

With W_r after n_r samples of the block on rank r and W at its start, all ranks go on from W + Σ n_r·(W_r − W) / Σ n_r.
With τ = 1 and plain SGD this is ``sync``. Compressed, the changes n_r·(W_r − W) / Σ n_r are encoded, with error
feedback. The optimizer's state stays each rank's own. Replicas are equal after every τ-th step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitring.settings import setting
from bitring.training.mode import Mode, State, Trainer, local_step, mean_changes, new_block


@dataclass(frozen=True)
class Local(Mode):
    """Average the parameters every ``tau`` steps."""

    tau: int = setting(50, least=1)

    def init(self, trainer: Trainer) -> State:
        """The block's ``steps``, ``weight`` and ``start`` (name -> array)."""
        return new_block(trainer)

    def step(self, trainer: Trainer, state: State, gradients: Mapping[str, Any], weight: float) -> None:
        """A step alone; at the block's end, the average."""
        local_step(trainer, state, gradients, weight, self.tau)
        if state["steps"] >= self.tau:
            self.synchronize(trainer, state)

    def synchronize(self, trainer: Trainer, state: State) -> None:
        """End the block now. Collective."""
        for changes in mean_changes(trainer, state):
            for name, change in changes.items():
                start = state["start"][name]
                start += change
                trainer.parameters[name][...] = start
