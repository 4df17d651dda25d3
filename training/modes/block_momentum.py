"""Block momentum: parameter averaging that filters the blocks' changes (BMUF; Chen and Huo, ICASSP 2016).

Ranks train alone for a block of τ steps from a common start S. With M = Σ n_r·W_r / Σ n_r, the mean of their parameters
weighted by samples, and W the model, Δ its momentum (zero at first)::

    G = M − S
    Δ ← momentum·Δ + zeta·G
    W ← W + Δ
    S = W                   classical
    S = W + momentum·Δ      Nesterov: the next block starts where the momentum leads

Averaging alone moves the model as far as one rank went; on N ranks, momentum 1 − 1/N with zeta 1 makes up for that in
the long run, and the learning rate stays that of one rank. The optimizer's own momentum restarts with each block.
With momentum 0 and zeta 1 this is ``local``, but for that restart.

Training happens at S, evaluation at W: ``synchronize`` ends the block and leaves the parameters at W, and the block
after it starts there, without the look-ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitring.arrays import xp_of
from bitring.settings import setting
from bitring.training.mode import Mode, State, Trainer, copies, local_step, mean_changes, new_block


@dataclass(frozen=True)
class BlockMomentum(Mode):
    """Filter the mean change of every ``tau`` steps.

    0 ≤ ``momentum`` < 1, None for 1 − 1/N on N ranks; ``zeta`` > 0 scales the block's change; see the module.
    """

    tau: int = setting(50, least=1)
    momentum: float | None = setting(None, least=0, below=1)
    zeta: float = setting(1.0, above=0)
    nesterov: bool = True

    def init(self, trainer: Trainer) -> State:
        """The block's ``steps``, ``weight``, ``start``; the ``model`` W and its momentum ``delta`` (name -> array)."""
        state = new_block(trainer)
        state["model"] = copies(state["start"]) if self.nesterov else state["start"]
        state["delta"] = copies(state["start"])
        for delta in state["delta"].values():
            delta[...] = 0
        return state

    def take_over(self, state: State) -> None:
        """Without look-ahead the model has been where the block began, and one array with it."""
        if self.nesterov and state["model"] is state["start"]:
            state["model"] = copies(state["start"])

    def step(self, trainer: Trainer, state: State, gradients: Mapping[str, Any], weight: float) -> None:
        """A step alone; at the block's end, the filtered change."""
        local_step(trainer, state, gradients, weight, self.tau)
        if state["steps"] >= self.tau:
            self._end_block(trainer, state, look_ahead=self.nesterov)

    def synchronize(self, trainer: Trainer, state: State) -> None:
        """End the block now and leave the parameters at W. Collective."""
        self._end_block(trainer, state, look_ahead=False)
        for name, model in state["model"].items():
            state["start"][name][...] = model
            trainer.parameters[name][...] = model

    def _end_block(self, trainer: Trainer, state: State, look_ahead: bool) -> None:
        momentum = 1 - 1 / trainer.size if self.momentum is None else self.momentum
        for changes in mean_changes(trainer, state):
            for name, change in changes.items():
                model, delta, start = state["model"][name], state["delta"][name], state["start"][name]
                delta *= momentum
                change *= self.zeta
                delta += change
                model += delta
                start[...] = model
                if look_ahead:
                    xp_of(delta).multiply(delta, momentum, out=change)
                    start += change
                trainer.parameters[name][...] = start
        trainer.restart_optimizer()
