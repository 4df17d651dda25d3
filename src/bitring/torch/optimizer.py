"""DistributedOptimizer: any torch optimizer, whose step() averages the gradients over all ranks first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from bitring.errors import uncopyable
from bitring.torch.averager import GradientAverager
from bitring.torch.step import Step


class DistributedOptimizer(torch.optim.Optimizer):
    """``optimizer`` for ``module`` trained on all ranks. Collective, as is ``step``.

    All ranks take rank 0's parameters now. ``options`` are GradientAverager's. Where gradients travel beside
    back-propagation, they do from the step's first backward() on; ``backward_passes_per_step`` of them are summed.
    Learning rates and schedules work as with ``optimizer``, whose state, groups and settings these are.

    Each rank's gradients count alike; for batches of unequal size use ``with optimizer.averager.batch(weight=len(x)):``
    around the forward and backward pass, after which ``step`` does not average again.
    """

    def __init__(self, optimizer: Any, module: Any, *, backward_passes_per_step: int = 1, **options: Any) -> None:
        self.optimizer = optimizer
        self.averager = GradientAverager(module, **options)
        self.averager.passes = backward_passes_per_step
        self.averager.open_by_itself()
        self._averaged_at = self.averager.means
        self._skips = False

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setstate__(self, state: Any) -> None:
        raise uncopyable(self, "state_dict() has what it knows")

    def __reduce__(self) -> Any:
        raise uncopyable(self, "state_dict() has what it knows")

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self.optimizer!r})"

    _step_supports_amp_scaling = True  # so a GradScaler calls step() on all ranks, whatever it has found on one

    @property
    def param_groups(self) -> Any:
        """The optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> Any:
        """The optimizer's."""
        return self.optimizer.defaults

    def state_dict(self) -> Any:
        """The optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """The optimizer's."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: Any) -> None:
        """The optimizer's."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's. Raises RuntimeError between backward() and ``step``: gradients may be under way."""
        if self.averager.step is not None:
            raise RuntimeError(
                "DistributedOptimizer.zero_grad: called after backward() and before step() or synchronize(); gradients "
                "may be under way"
            )
        self.optimizer.zero_grad(set_to_none)

    @property
    def _averaged(self) -> bool:
        return self.averager.means > self._averaged_at

    def synchronize(self) -> None:
        """Average the gradients now, so that they can be looked at or clipped before ``step``. Collective."""
        step = self.averager.step
        if step is not None:
            step.end(None)
        elif not self._averaged:
            self.averager.average()

    @contextlib.contextmanager
    def skip_synchronize(self) -> Generator[None]:
        """For ``with``: ``step`` takes the gradients as they are."""
        self._skips = True
        try:
            yield
        finally:
            self._skips = False

    def no_sync(self) -> Any:
        """For ``with``: backward() adds to the gradients, and nothing is exchanged."""
        return self.averager.no_sync()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients, unless that was done since the last step, and let the optimizer make its step.

        Collective. ``closure`` computes the loss and the gradients; both are averaged each time it is called, since an
        optimizer such as LBFGS goes by the loss, too. When it raises on a rank, the others raise PeerError. Returns
        what the optimizer's ``step`` returns; None where a GradScaler has found an overflow.
        """
        if closure is not None:
            return self.optimizer.step(lambda: self._averaging(closure))
        factor, overflown = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if overflown is not None and not (self._averaged or self._skips):
            raise RuntimeError(
                "DistributedOptimizer.step: a GradScaler looks at the gradients before they are averaged, so that "
                "ranks would go apart; call optimizer.synchronize() before scaler.unscale_(optimizer) and "
                "scaler.step(optimizer)"
            )
        if not self._skips:
            self.synchronize()
        self._averaged_at = self.averager.means
        if overflown is not None and overflown.item():
            return None
        if factor is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(factor)
        return self.optimizer.step()

    def _averaging(self, closure: Callable[[], Any]) -> Any:
        """The loss of ``closure``, the mean over all ranks, with the mean gradients: optimizers decide by both."""
        a = self.averager
        self._averaged_at = a.means
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException as error:  # the other ranks must not wait
            step = a.step or Step(a, 0.0, "backward", may_overlap=False).__enter__().step
            assert step is not None
            step.end(error)
            raise
        if self._skips:
            return loss
        self.synchronize()
        self._averaged_at = a.means
        return _mean_loss(a, loss)


def _mean_loss(averager: GradientAverager, loss: Any) -> Any:
    """The mean over ranks of ``loss``, a number or a tensor of one, weighted as the last step was. Collective.

    What is no number is left out.
    """
    share = averager.share
    value = loss.detach() if isinstance(loss, torch.Tensor) else loss
    try:
        mine = share * float(value) if share else 0.0
    except Exception:  # a tensor's may be its library's own
        mine = share = 0.0
    sums = np.array([mine, share])
    averager.comm.Allreduce(MPI.IN_PLACE, sums)
    if loss is None or not sums[1]:
        return loss
    mean = float(sums[0] / sums[1])
    return torch.full_like(value, mean) if isinstance(loss, torch.Tensor) else mean
