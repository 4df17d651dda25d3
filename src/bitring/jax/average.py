"""Averaging gradients over ranks as a transformation of optax's, exactly or compressed with error feedback.

A trainer, ``DataParallel``, does the work; its optimizer hands the mean over instead of updating anything. So all that
it has is there: weights, empty parts, NaN checks, steps that are all or nothing, residuals in checkpoints. What it
keeps from step to step is outside of what JAX traces: the transformation's own state is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.compression.compressor import Compressor
from bitring.jax.channel import channel_of, require_channel
from bitring.jax.order import settle
from bitring.jax.primitive import do
from bitring.jax.trees import leaves_of
from bitring.jax.work import Work
from bitring.training.choice import Choice
from bitring.training.data_parallel import DataParallel
from bitring.training.optimizer import Optimizer, State


class Average(optax.GradientTransformationExtraArgs):
    """What ``average`` returns: ``init`` and ``update`` for optax, and the trainer behind them."""

    exchange: Mean

    @property
    def trainer(self) -> DataParallel:
        """The trainer that exchanges, when all that was dispatched is done: for checkpoints, ``bytes_sent``, telemetry.

        Raises RuntimeError before ``init``.
        """
        settle()
        if self.exchange.trainer is None:
            raise RuntimeError("average: there is no trainer before init(params)")
        return self.exchange.trainer


def average(
    *,
    comm: MPI.Intracomm | None = None,
    compression: Compressor | Choice | str | None = None,
    compression_for: Mapping[str, Compressor | str | None] | None = None,
    algorithm: str = "auto",
    warmup_steps: int = 0,
) -> Average:
    """A transformation that makes each rank's gradients their mean over all ranks, for ``optax.chain``.

    Its ``init`` and ``update`` are collective, inside ``jit`` or outside. ``update(..., weight=n)``: the gradients are
    the mean over n samples, which may be 0 on some ranks; the result is the mean over all samples, zeros where there
    are none. Gradients are float16, bfloat16, float32 or float64, named as in "layer/w".
    ``compression``, ``compression_for``, ``algorithm``, ``warmup_steps``: see ``DataParallel``. With a compression the
    residuals are in ``.trainer``, which ``save_checkpoint`` and ``load_checkpoint`` take.

    Raises what ``DataParallel`` does; from inside ``jit`` as ``jax.errors.JaxRuntimeError``.
    """
    settings: dict[str, Any] = {
        "compression": compression,
        "compression_for": compression_for,
        "algorithm": algorithm,
        "warmup_steps": warmup_steps,
    }
    exchange = Mean(channel_of(comm, "average"), settings)

    def init(params: Any) -> optax.EmptyState:
        exchange.read(params, 1.0)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, *, weight: Any = 1.0, **_: Any) -> tuple[Any, Any]:
        arguments, structure = exchange.read(updates, weight)
        means = do(exchange, arguments) if len(arguments) > 1 else []
        return jax.tree_util.tree_unflatten(structure, means), state

    made = Average(init, update)
    made.exchange = exchange
    return made


@dataclass(frozen=True)
class _HandOver(Optimizer):
    """Copies the mean gradients into the arrays ``into``, by name."""

    into: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def slots(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def may_raise(self) -> bool:
        """Copying does not."""
        return False

    def update(self, parameters: Mapping[str, Any], gradients: Mapping[str, Any], state: State) -> None:
        """Copy."""
        for name, gradient in gradients.items():
            self.into[name][...] = gradient

    def update_parameter(self, w: Any, g: Any, slots: Mapping[str, Any]) -> None:
        """Not called: there is nothing to update."""


class Mean(Work):
    """The weighted mean of gradients; the first argument is the weight."""

    linear = False
    by_value = False

    def __init__(self, channel: Communicator, settings: Mapping[str, Any]) -> None:
        self._channel = channel
        self._settings = settings
        self._optimizer = _HandOver()
        self._kinds: list[tuple[str, Any, Any]] = []
        self.trainer: DataParallel | None = None

    def read(self, gradients: Any, weight: Any) -> tuple[list[Any], Any]:
        """The arguments of this work, and the structure of the tree of gradients. Collective the first time.

        Bad ones raise on all ranks, which are in their first call too, or in a step.
        """
        arguments, kinds, structure, error = list[Any](), list[tuple[str, Any, Any]](), None, None
        try:
            names, arrays, structure = leaves_of(gradients, "average", "gradients")
            arguments = [jnp.asarray(weight, jnp.float32), *arrays]
            if arguments[0].shape:
                raise ValueError(f"average: weight must be a number; got an array of shape {arguments[0].shape}")
            kinds = [(name, tuple(x.shape), np.dtype(x.dtype)) for name, x in zip(names, arrays, strict=True)]
            if self.trainer is not None:
                self._require_alike(kinds)
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        if self.trainer is None or error is not None:
            settle()  # what is under way comes first
        if self.trainer is None:
            raise_everywhere(self._channel, "average", error)
        elif error is not None:
            self.trainer.meet("step", error)  # which raises it
        if self.trainer is None and kinds:
            zeros = {name: np.zeros(shape, dtype) for name, shape, dtype in kinds}
            self.trainer = DataParallel(zeros, self._optimizer, comm=self._channel, **self._settings)
            self._kinds = kinds
        return arguments, structure

    def _require_alike(self, kinds: list[tuple[str, Any, Any]]) -> None:
        if kinds != self._kinds:
            odd = next((a for a, b in zip(kinds, self._kinds, strict=False) if a != b), None)
            got = f"{len(kinds)} arrays" if odd is None else f"{odd[0]!r}, {odd[2]} of shape {odd[1]}"
            raise ValueError(f"average: gradients must be as init(params) had them; got {got}; make another average()")

    def shapes(self, arguments: Sequence[Any]) -> list[Any]:
        """As the gradients."""
        return list(arguments[1:])

    def run(self, arguments: Sequence[Any], results: Sequence[Any]) -> None:
        """A step of the trainer."""
        assert self.trainer is not None
        require_channel(self._channel, "average")
        names = [name for name, _, _ in self._kinds]
        weight = float(arguments[0])
        self._optimizer.into.update(zip(names, results, strict=True))
        if weight == 0:  # perhaps nobody has samples
            for result in results:
                result[...] = 0
        try:
            self.trainer.step(dict(zip(names, arguments[1:], strict=True)), weight=weight)
        finally:
            self._optimizer.into.clear()

    def describe(self) -> str:
        """See Work."""
        return "average"
