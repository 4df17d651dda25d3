"""Synchronous data-parallel training: every step applies the mean gradient over all ranks' samples.

With gradients g_r over n_r samples on rank r, the optimizer sees Σ n_r·g_r / Σ n_r, as one process with the whole batch
would. A step in which no rank has samples changes nothing. Replicas are equal after every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitring.training.mode import Mode, State, Trainer
from bitring.training.optimizer import cannot_raise


@dataclass(frozen=True)
class Sync(Mode):
    """Exchange gradients in every step."""

    writes = False
    wait_free = True

    def init(self, trainer: Trainer) -> State:
        """No state."""
        return {}

    @cannot_raise
    def step(self, trainer: Trainer, state: State, gradients: Mapping[str, Any], weight: float) -> None:
        """Average the gradients, then let the optimizer apply them."""
        total = trainer.agree(weight)
        if total:
            for means in trainer.exchange(gradients, weight / total):
                trainer.update(means, at_end=True)

    def synchronize(self, trainer: Trainer, state: State) -> None:
        """Replicas are equal already; ranks do not meet."""
