"""1-bit Adam: the momentum travels at one bit per value once the variance is known well enough to be frozen.

Tang et al., "1-bit Adam", 2021. For ``freeze_step`` steps this is AdamW with exact mean gradients g. From then on the
variance v stays as it is; each rank adds its own gradient to the common momentum, and the mean of the ranks' momenta is
exchanged, compressed with error feedback::

    m_r ← β₁·m + (1 − β₁)·g_r        on rank r
    m ← mean over ranks of m_r       compressed
    w ← w − lr·(m̂ / (√v̂ + eps) + weight_decay·w)

with m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − β₂ˢ), s = min(t, freeze_step). Where v is 0 no gradient came before the freeze, and
no step is made there: a code has no zero, so what one bit makes of an m of 0 would be divided by eps alone. Nor is a
step longer than lr, weight decay aside: Adam's own are hardly ever (Kingma and Ba, 2015, section 2.1), since v grows
with what comes, but a frozen v that is tiny holds nothing back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mpi4py import MPI

from bitring.collectives.runtime.context import given_comm
from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.collectives.runtime.objects import allgather
from bitring.compression.compressor import Compressor
from bitring.errors import MismatchError, uncopyable
from bitring.settings import Range, checked
from bitring.torch.bucket import Entry
from bitring.torch.mean import Mean, new_meeting
from bitring.torch.options import BUCKET_BYTES, Options, device_of
from bitring.torch.residuals import Kept
from bitring.torch.tensors import array_dtype, memory_order
from bitring.training.step.checks import checked_weight


class OneBitAdam(torch.optim.Optimizer):
    """AdamW, whose gradients and momentum it exchanges itself: see the module. Collective, as is ``step``.

    ``params``: a module's parameters, or groups of them; they must be equal on all ranks. ``freeze_step``: 15 to 25% of
    the training are usual. ``compression``: of the momentum. Gradients are those of the rank's own batch; no averager
    is to be used with it. The state has PyTorch's names: ``exp_avg``, ``exp_avg_sq``, ``step``.

    Raises on all ranks: a rank's bad arguments raise TypeError or ValueError there, and PeerError on the others;
    MismatchError where the ranks' parameters differ.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        comm: MPI.Intracomm | None = None,
        freeze_step: int = 100,
        compression: Compressor | str | None = "onebit",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        base = given_comm(comm, "OneBitAdam")
        error: Exception | None = None
        exact: list[Entry] = []
        compressed: list[Entry] = []
        try:
            for name, value, inside in (
                ("lr", lr, Range(least=0)),
                ("eps", eps, Range(least=0)),
                ("weight_decay", weight_decay, Range(least=0)),
                ("betas[0]", betas[0], Range(least=0, below=1)),
                ("betas[1]", betas[1], Range(least=0, below=1)),
            ):
                checked("OneBitAdam", name, value, float, inside)
            self.freeze_step = checked("OneBitAdam", "freeze_step", freeze_step, int, Range(least=1))
            options = Options(compression=compression, bucket_bytes=bucket_bytes)
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
            self._named: dict[str, Any] = {
                str(i): p for i, p in enumerate(p for g in self.param_groups for p in g["params"])
            }
            for name, p in self._named.items():
                dtype = array_dtype(p.dtype, f"OneBitAdam: parameter number {name}")
                entry = Entry(name, dtype, tuple(p.shape), memory_order(p), device_of(p, "OneBitAdam"), None)
                exact.append(entry)
                compressed.append(entry._replace(compression=options.compressor_of(name, p.numel())))
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        raise_everywhere(base, "OneBitAdam", error)
        everyone = allgather(base, [str(entry) for entry in compressed] + [str(freeze_step)], "OneBitAdam")
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                odd = [a for a, b in zip(theirs, everyone[0], strict=False) if a != b][:1]
                raise MismatchError(f"OneBitAdam: rank {rank} has other parameters or settings than rank 0: {odd}")
        self._names = {p: name for name, p in self._named.items()}
        self.comm, self._meeting = new_meeting(base, "OneBitAdam.step")
        self._exact: Mean | None = Mean(self.comm, exact, bucket_bytes, "OneBitAdam.step", self._meeting)
        self._exact_entries = exact
        self._bucket_bytes = bucket_bytes
        self._compressed = Mean(self.comm, compressed, bucket_bytes, "OneBitAdam.step", self._meeting)
        self.steps = 0
        """Calls of ``step``."""

    def __reduce__(self) -> Any:
        raise uncopyable(self, "state_dict() has what it knows")

    longest_step = 1.0
    """A weight's step after the freeze, in units of lr: at most so long."""

    _step_supports_amp_scaling = True  # so that step() is called, and says that it is not to be

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while this is made. Raises RuntimeError later: what is exchanged is fixed then."""
        if hasattr(self, "_exact_entries"):
            raise RuntimeError("OneBitAdam.add_param_group: parameters cannot be added; make another OneBitAdam")
        super().add_param_group(param_group)

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others."""
        return sum(mean.exchange.bytes_sent for mean in (self._exact, self._compressed) if mean is not None)

    def residuals(self) -> Kept:
        """What compressed exchanges carry from step to step, for ``give_residuals``. Collective."""
        return self._compressed.take()

    def give_residuals(self, kept: Kept) -> None:
        """Go on with what ``residuals`` returned, perhaps on other ranks."""
        self._compressed.give(kept)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, weight: float = 1.0) -> Any:
        """One step from this rank's gradients, the mean over ``weight`` samples. Collective; returns closure's loss.

        A gradient that is None counts as zeros, a sparse one as dense; parameters that require none stay as they are.
        Raises on all ranks, with all as it was: a bad weight, what ``closure`` raises, and NonFiniteError where a
        gradient holds NaN or Inf.
        """
        loss = None
        problem: Exception | None = None
        gradients: dict[str, Any] = {}
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if hasattr(self, "found_inf"):
                raise RuntimeError("OneBitAdam.step: a GradScaler is not supported: use autocast with bfloat16")
            weight = checked_weight(weight, "OneBitAdam.step")
            for entry, p in zip(self._exact_entries, self._named.values(), strict=True):
                if array_dtype(p.dtype, "OneBitAdam.step: a parameter") != entry.dtype or tuple(p.shape) != entry.shape:
                    raise TypeError(
                        f"OneBitAdam.step: parameter number {entry.name} was {entry.dtype} of shape {entry.shape} and "
                        f"is {p.dtype} of shape {tuple(p.shape)}: make another OneBitAdam"
                    )
            gradients = {name: _gradient(p) for name, p in self._named.items()}
        except Exception as error:  # whatever it is, the other ranks must not wait
            problem, weight = error, 0.0
        for p in self._named.values():
            if not self.state[p]:
                self.state[p].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
        made = int(next(iter(self.state[p]["step"] for p in self._named.values()), torch.tensor(0)).item())
        frozen = made >= self.freeze_step
        if frozen and self._exact is not None:
            self._exact.free()
            self._exact = None
        elif not frozen and self._exact is None:  # a state from before the freeze was loaded
            self._exact = Mean(self.comm, self._exact_entries, self._bucket_bytes, "OneBitAdam.step", self._meeting)
        mean = self._compressed
        if not frozen:
            assert self._exact is not None
            mean = self._exact
        else:
            gradients = self._momenta(gradients if weight else None)
        if mean.of(gradients, weight, self.steps, problem):
            self._update(mean.views, frozen)
        self.steps += 1
        return loss

    def _momenta(self, gradients: dict[str, Any] | None) -> dict[str, Any]:
        """Each parameter's momentum with this rank's gradient in it."""
        made: dict[str, Any] = {}
        for group in self.param_groups:
            beta = group["betas"][0]
            for p in group["params"]:
                name = self._names[p]
                momentum = self.state[p]["exp_avg"]
                made[name] = momentum if gradients is None else torch.lerp(gradients[name], momentum, beta)
        return made

    def _update(self, means: dict[str, Any], frozen: bool) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                state, mean = self.state[p], means[self._names[p]]
                state["step"] += 1
                t = state["step"].item()
                m, v = state["exp_avg"], state["exp_avg_sq"]
                if frozen:
                    m.copy_(mean)
                else:
                    m.lerp_(mean, 1 - first)
                    v.mul_(second).addcmul_(mean, mean, value=1 - second)
                if not p.requires_grad:  # its gradients are zeros, but weights would decay
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = v.sqrt().div_(math.sqrt(1 - second ** min(t, self.freeze_step))).add_(group["eps"])
                moved = (m / root).mul_(group["lr"] / (1 - first**t))
                if frozen:
                    longest = self.longest_step * group["lr"]
                    moved = torch.where(v > 0, moved.clamp_(-longest, longest), 0.0)
                p.sub_(moved)

    def free(self) -> None:
        """Free plans, memory and communicator. Collective."""
        if self.comm == MPI.COMM_NULL:
            return
        for mean in (self._exact, self._compressed):
            if mean is not None:
                mean.free()
        self._meeting.free()
        self.comm.Free()


def _gradient(p: Any) -> Any:
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad if p.grad.layout == torch.strided else p.grad.to_dense()
