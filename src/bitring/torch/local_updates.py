"""Training alone for τ steps, then an outer step on the mean change: parameter averaging, block momentum, DiLoCo.

Each rank's optimizer changes its own copy of the parameters. After τ steps the change start − w, averaged over the
ranks and compressed with error feedback, is the gradient of an outer optimizer, which moves ``start``; and w begins
there anew. ``SGD(lr=1)`` outside is parameter averaging, ``SGD(lr=1, momentum=η)`` block momentum, Nesterov's
``SGD(lr=0.7, momentum=0.9)`` DiLoCo (Douillard et al., 2023). Streaming (Douillard et al., 2025): ``fragments`` of the
parameters take turns, so that a part travels at a time, arrives ``delay`` steps later, and is blended with what was
learned meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI

from bitring.collectives.runtime.context import given_comm
from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.compression.compressor import Compressor
from bitring.errors import uncopyable
from bitring.settings import Range, checked
from bitring.torch.broadcast import broadcast_tensors
from bitring.torch.bucket import Entry
from bitring.torch.buffers import Buffers
from bitring.torch.mean import Mean, new_meeting
from bitring.torch.options import BUCKET_BYTES, Options, device_of
from bitring.torch.residuals import Kept
from bitring.torch.tensors import array_dtype, array_over, memory_order
from bitring.torch.watched import state_tensors
from bitring.training.optimizer import Optimizer, require_gradients
from bitring.training.optimizers.sgd import SGD
from bitring.training.step.checks import checked_weight

_OUTER = SGD(lr=0.7, momentum=0.9, nesterov=True)


class _Fragment:
    """Parameters that are exchanged together."""

    def __init__(self, names: list[str], offset: int, mean: Mean, outer_state: Any) -> None:
        self.names = names
        self.offset = offset
        self.mean = mean
        self.outer_state = outer_state
        self.weight = 0.0  # samples since it was exchanged last
        self.arrives: int | None = None  # the step at whose end a mean that is under way is taken


class LocalUpdates:
    """Train ``module`` by ``optimizer``, any of PyTorch's, on each rank alone, and exchange every ``tau`` steps.

    Collective, as is each ``tau``-th ``step``. All ranks take rank 0's parameters and buffers now. ``outer``: a bitring
    optimizer for the mean change. ``compression``, ``compression_for``: of the change, as for GradientAverager.
    ``fragments``: the parameters are dealt out to so many, whose exchanges are spread over the ``tau`` steps.
    ``delay``: an exchange goes on beside so many steps. ``blend``: w becomes blend·own + (1 − blend)·common at its end.
    Outer steps are made on the host, in float32 for parameters of 16 bits; those on a CUDA device are copied there.

    Raises on all ranks: a rank's bad arguments raise TypeError or ValueError there, and PeerError on the others.
    """

    def __init__(
        self,
        module: Any,
        optimizer: Any,
        *,
        comm: MPI.Intracomm | None = None,
        tau: int = 50,
        outer: Optimizer = _OUTER,
        compression: Compressor | str | None = None,
        compression_for: Any = None,
        fragments: int = 1,
        delay: int = 0,
        blend: float = 0.0,
    ) -> None:
        base = given_comm(comm, "LocalUpdates")
        error: Exception | None = None
        options: Any = None
        self._trained: dict[str, Any] = {}
        try:
            if not isinstance(module, torch.nn.Module):
                raise TypeError(f"LocalUpdates: module must be a torch.nn.Module; got {type(module).__name__}")
            self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
            self.tau = checked("LocalUpdates", "tau", tau, int, Range(least=1))
            self.fragments = checked("LocalUpdates", "fragments", fragments, int, Range(least=1))
            if self.fragments > min(tau, len(self._trained)):
                raise ValueError(
                    f"LocalUpdates: fragments must be at most tau and the number of parameters, "
                    f"{min(tau, len(self._trained))}; got {fragments}"
                )
            self.delay = checked("LocalUpdates", "delay", delay, int, Range(least=0))
            if self.delay >= tau:
                raise ValueError(f"LocalUpdates: delay must be below tau, {tau}; got {delay}")
            self.blend = checked("LocalUpdates", "blend", blend, float, Range(least=0, below=1))
            if not isinstance(outer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"LocalUpdates: outer must be a bitring optimizer, such as bitring.SGD(); got {outer!r}"
                )
            require_gradients(outer, "LocalUpdates: outer")
            options = Options(compression=compression, compression_for=compression_for)
            options.require_known(self._trained)
            for name, p in self._trained.items():
                array_dtype(p.dtype, f"LocalUpdates: the parameter {name!r}")
                device_of(p, "LocalUpdates")
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        raise_everywhere(base, "LocalUpdates", error)
        self._module = module
        self.optimizer = optimizer
        self.outer = outer
        self.comm, self._meeting = new_meeting(base, "LocalUpdates.step")
        broadcast_tensors(self.comm, list(state_tensors(module).values()), "LocalUpdates", 0)
        self.steps = 0
        """Calls of ``step``."""
        self._start = {name: _wide(p).clone() for name, p in self._trained.items()}
        self._outer_arrays = {name: array_over(t) for name, t in self._start.items()}
        self._parts = [self._fragment(number, options) for number in range(self.fragments)]

    def __reduce__(self) -> Any:
        raise uncopyable(self, "state_dict() has what it knows")

    def _fragment(self, number: int, options: Options) -> _Fragment:
        names = list(self._trained)[number :: self.fragments]
        entries = [
            Entry(
                name,
                array_dtype(self._start[name].dtype, "LocalUpdates"),
                tuple(p.shape),
                memory_order(p),
                "cpu",
                options.compressor_of(name, p.numel()),
            )
            for name, p in ((name, self._trained[name]) for name in names)
        ]
        mean = Mean(self.comm, entries, BUCKET_BYTES, "LocalUpdates.step", self._meeting)
        offset = number * self.tau // self.fragments
        return _Fragment(names, offset, mean, self.outer.init({n: self._outer_arrays[n] for n in names}))

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others."""
        return sum(part.mean.exchange.bytes_sent for part in self._parts)

    def step(self, weight: float = 1.0, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the optimizer, and the exchanges that are due. ``weight``: samples in this rank's batch.

        ``closure`` is for the optimizer, whose ``step`` returns what this does. Raises on all ranks what goes wrong in
        an exchange: NonFiniteError where any has NaN or Inf in parameters, RuntimeError where the module trains other
        parameters than it did. A bad ``weight``, and what the optimizer raises, is raised on this rank alone where no
        exchange is due, and the step does not count.
        """
        problem: Exception | None = None
        made: Any = None
        try:
            weight = checked_weight(weight, "LocalUpdates.step")
            made = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        except Exception as error:  # the others may wait for this rank
            problem, weight = error, 0.0
        self.steps += 1
        for part in self._parts:
            part.weight += weight
        for part in self._parts:
            if part.arrives == self.steps:
                self._take(part)
            if (self.steps + part.offset) % self.tau == 0:
                self._send(part, problem)
                if self.delay == 0:
                    self._take(part)
        if problem is not None:
            self.steps -= 1
            raise problem
        return made

    def synchronize(self) -> None:
        """End the block of all fragments now: parameters and buffers are equal on all ranks then. Collective.

        Buffers that are no whole numbers become their mean, the others rank 0's.
        """
        for part in self._parts:
            if part.arrives is not None:
                self._take(part)
        for part in self._parts:
            self._send(part)
            if part.arrives is None:  # nobody has had samples since the last one, of which a rank may have kept its own
                self._begin_anew(part, blend=0.0)
            self._take(part, blend=0.0)
        buffers = Buffers(self.comm, self._module, "mean", BUCKET_BYTES)
        buffers.begin()
        buffers.exchange(self._module, 1 / self.comm.Get_size())
        buffers.store(self._module)
        buffers.free()

    @torch.no_grad()
    def _send(self, part: _Fragment, problem: Exception | None = None) -> None:
        """Begin the mean of the changes; ``problem``: why this rank cannot."""
        changes: dict[str, Any] = {}
        try:
            self._require_same_module()
            changes = {name: self._start[name] - self._now(name) for name in part.names}
        except Exception as error:  # whatever it is, the other ranks must not wait
            problem = problem or error
        part.arrives = None
        if part.mean.begin(changes, part.weight, self.steps, problem):
            part.arrives = self.steps + self.delay
        part.weight = 0.0

    def _require_same_module(self) -> None:
        there = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        if there.keys() != self._trained.keys() or any(
            p is not self._trained[name] or p.shape != self._start[name].shape for name, p in there.items()
        ):
            raise RuntimeError(
                "LocalUpdates.step: the module trains other parameters than when this was made; call synchronize() "
                "before such a change, and make another LocalUpdates after it"
            )

    def _now(self, name: str) -> Any:
        """What the optimizer has made of a parameter, on the host, as outer steps are."""
        return _wide(self._trained[name]).to(self._start[name].dtype)

    @torch.no_grad()
    def _take(self, part: _Fragment, blend: float | None = None) -> None:
        """Make the outer step with a mean that was begun."""
        if part.arrives is None:
            return
        part.arrives = None
        part.mean.finish()
        arrays = {name: self._outer_arrays[name] for name in part.names}
        self.outer.update(arrays, {n: array_over(part.mean.views[n]) for n in part.names}, part.outer_state)
        self._begin_anew(part, self.blend if blend is None else blend)

    @torch.no_grad()
    def _begin_anew(self, part: _Fragment, blend: float) -> None:
        for name in part.names:
            p, start = self._trained[name], self._start[name]
            p.copy_(start if blend == 0 else start.lerp(self._now(name), blend))

    def state_dict(self) -> dict[str, Any]:
        """Where blocks began, the outer optimizer's state, and the counts; not while an exchange is under way."""
        if any(part.arrives is not None for part in self._parts):
            raise RuntimeError("LocalUpdates.state_dict: an exchange is under way; call synchronize() before")
        return {
            "start": dict(self._start),
            "outer": [
                {slot: {n: torch.from_numpy(a) for n, a in arrays.items()} for slot, arrays in part.outer_state.items()}
                for part in self._parts
            ],
            "weights": [part.weight for part in self._parts],
            "steps": self.steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, of the same settings. Raises ValueError for another module's."""
        if state["start"].keys() != self._start.keys() or len(state["outer"]) != len(self._parts):
            raise ValueError("LocalUpdates.load_state_dict: the state is of another module, or of other fragments")
        for name, start in self._start.items():
            start.copy_(state["start"][name])
        for part, outer, weight in zip(self._parts, state["outer"], state["weights"], strict=True):
            part.weight = weight
            for slot, arrays in part.outer_state.items():
                for name, array in arrays.items():
                    array[...] = outer[slot][name].numpy()
        self.steps = state["steps"]

    def residuals(self) -> Kept:
        """What compressed exchanges carry, for ``give_residuals``. Collective."""
        kept = Kept()
        for part in self._parts:
            kept.add(part.mean.take())
        return kept

    def give_residuals(self, kept: Kept) -> None:
        """Go on with what ``residuals`` returned, perhaps on other ranks."""
        for part in self._parts:
            part.mean.give(kept)

    def free(self) -> None:
        """Free plans, memory and communicator. Collective."""
        if self.comm == MPI.COMM_NULL:
            return
        for part in self._parts:
            part.mean.free()
        self._meeting.free()
        self.comm.Free()


def _wide(p: Any) -> Any:
    """A parameter's values on the host; 16 bits as float32, since an outer step may be smaller than they can tell."""
    values = p.detach().cpu()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
