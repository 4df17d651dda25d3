"""Gradients of two steps are added up, and exchanged in every other step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitring.training.mode import Mode, State, Trainer, copies


@dataclass(frozen=True)
class EveryOther(Mode):
    """One update for two steps, with the mean gradient over the samples of both."""

    def init(self, trainer: Trainer) -> State:
        """``sum`` of weight · gradient, of this rank; its ``weight``; how many ``steps`` it is of."""
        state: State = {"sum": copies(trainer.parameters), "weight": 0.0, "steps": 0}
        for array in state["sum"].values():
            array[...] = 0
        return state

    def step(self, trainer: Trainer, state: State, gradients: Mapping[str, Any], weight: float) -> None:
        """See Mode. Ranks meet in every step, so that what is wrong with one is known at once."""
        trainer.agree(weight)
        if weight:
            for name, gradient in gradients.items():
                state["sum"][name] += gradient * gradient.dtype.type(weight)
        state["weight"] += weight
        state["steps"] += 1
        if state["steps"] == 2:
            self.synchronize(trainer, state)

    def synchronize(self, trainer: Trainer, state: State) -> None:
        """Apply what has been added up. Collective."""
        total = trainer.agree(state["weight"])
        if total:
            for means in trainer.exchange(state["sum"], 1 / total):
                trainer.update(means)
        for array in state["sum"].values():
            array[...] = 0
        state["weight"], state["steps"] = 0.0, 0
