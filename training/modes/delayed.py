"""Double buffering: a step's exchange goes on during the next steps' computing (CNTK; Seide and Agarwal, 2016).

With ``steps`` = d, step t begins the exchange of its gradients and applies the mean gradients of step t − d; the first
d steps apply nothing. Replicas are equal after every step. ``synchronize`` applies what was not applied yet.

Gradients are d steps old when they are applied, which acts like more momentum: docs/training.md has measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitring.settings import setting
from bitring.training.mode import Mode, State, Trainer, copies


@dataclass(frozen=True)
class Delayed(Mode):
    """Apply gradients ``steps`` steps after they were computed."""

    steps: int = setting(1, least=1)

    writes = False

    def init(self, trainer: Trainer) -> State:
        """The mean gradients not applied yet, ``sums``, in places that take turns: ``turn`` is the next step's.

        ``full``: by place, 1 where there are some; a step without samples leaves none.
        """
        places = [str(place) for place in range(self.steps)]
        return {
            "turn": 0,
            "full": dict.fromkeys(places, 0),
            "sums": {place: copies(trainer.parameters) for place in places},
        }

    def take_over(self, state: State) -> None:
        """Raises ValueError for another number of ``steps``: what is under way is for this one."""
        if len(state["sums"]) != self.steps:
            raise ValueError(
                f"Delayed: steps must stay {len(state['sums'])} during training, got {self.steps}; "
                "make another trainer for it"
            )

    def step(self, trainer: Trainer, state: State, gradients: Mapping[str, Any], weight: float) -> None:
        """Apply the oldest mean gradients, and begin to exchange these in their place."""
        total = trainer.agree(weight)
        place = str(state["turn"])
        sums = state["sums"][place]
        if state["full"][place]:
            trainer.update(sums, at_end=True)
        if total:
            trainer.exchange_later(gradients, weight / total, into=sums)
        state["full"][place] = int(total > 0)
        state["turn"] = (state["turn"] + 1) % self.steps

    def synchronize(self, trainer: Trainer, state: State) -> None:
        """Apply all mean gradients that are there, the oldest first; all ranks have the same."""
        for later in range(self.steps):
            place = str((state["turn"] + later) % self.steps)
            if state["full"][place]:
                trainer.update(state["sums"][place])
                state["full"][place] = 0
