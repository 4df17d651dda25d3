"""An optimizer's step inside the block of an open step: an error, since its gradients are not the mean yet."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim.optimizer import register_optimizer_step_pre_hook


class OpenStep(Protocol):
    """A step that has begun and not ended."""

    def before_update(self, optimizer: Any) -> None:
        """Raise RuntimeError where ``optimizer`` has parameters of this step."""


_open: weakref.WeakSet[OpenStep] = weakref.WeakSet()


def opened(step: OpenStep) -> None:
    """From now on the step is asked before any optimizer's."""
    _open.add(step)


def closed(step: OpenStep) -> None:
    """It is asked no more."""
    _open.discard(step)


def _before_update(optimizer: Any, arguments: Any, named: Any) -> None:
    for step in list(_open):
        step.before_update(optimizer)


register_optimizer_step_pre_hook(_before_update)
