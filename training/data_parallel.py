"""Data-parallel training: each rank computes gradients of its part of the batch, the trainer does the rest.

Parameters stay the caller's arrays and are updated in place. For the exchange they are packed into flat buckets, in
reverse order, since back-propagation finishes the last layer first. What is exchanged, and when, is the mode's matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mpi4py import MPI

from bitring.collectives.calls import require_root
from bitring.collectives.runtime.context import given_comm, one_call
from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.collectives.selection.selection import check_name
from bitring.compression.compressor import Compressor
from bitring.errors import uncopyable
from bitring.settings import Range, checked
from bitring.training.choice import Choice, Picked
from bitring.training.mode import BaseMode, FreeMode, modes
from bitring.training.optimizer import Optimizer
from bitring.training.step.base_stepper import BaseStepper
from bitring.training.step.bucket import Bucket
from bitring.training.step.checks import checked_unused
from bitring.training.step.compression_for import checked_choices, chosen_compression, compressor_of_each
from bitring.training.step.free_stepper import FreeStepper
from bitring.training.step.gradient_exchange import GradientExchange
from bitring.training.step.open_step import OpenStep
from bitring.training.step.picking import picked_jointly
from bitring.training.step.replica import Replica
from bitring.training.step.replicas import broadcast_tree, compare
from bitring.training.step.state_dict import description_of, load_state, require_alike, state_of
from bitring.training.step.stepper import Stepper
from bitring.training.step.timeline import Span

_FIXED = {"comm", "compression", "compression_for", "algorithm", "warmup_steps", "check_every", "bucket_bytes"}
_numbers_of_trainers = itertools.count(1)


_NOT_GIVEN = float("1")
"""The weight of a step without one: an object of its own, which no caller's 1.0 is."""


class DataParallel:
    """Train ``parameters`` on all ranks of ``comm``. Collective, as are ``step``, ``synchronize`` and ``free``.

    ``parameters``: dict of name -> array, or a list (named "0", "1", ...), or dicts, lists and tuples nested in each
    other, whose arrays are named as in "layer/w"; float16, bfloat16, float32 or float64, NumPy or CuPy (all the same)
    or what shares its memory through DLPack, dense and writable; on the host in any memory order, such as
    channels_last. They take rank 0's values now and are updated in place.
    ``optimizer``: a name, or an instance such as ``SGD(lr=0.05)``; settings put into ``trainer.optimizer`` later, such
    as another learning rate, hold from then on.
    ``mode``: a name, or an instance such as ``BlockMomentum(tau=50)``.
    ``compression``: None for an exact exchange, a name such as "topk" or "topk:density=0.001", or an instance such as
    ``OneBit(block=1024)``; or a choice, "structure" or ``Structure(batch=64)``, of what each parameter travels by.
    Parameters with fewer values than one block of an encoder travel exactly; so do the first ``warmup_steps`` steps.
    ``compression_for``: name of a parameter, or a pattern such as "conv*", -> compressor or None, for those that travel
    otherwise than by ``compression``; names go before patterns, and of these the first that fits.
    ``check_every``: after so many steps ranks compare digests of their parameters, which takes about a second per GB,
    and raise MismatchError with the first parameter and rank that differ; 0: never.
    ``algorithm``: of the exact exchange; "auto" chooses. ``bucket_bytes``: the largest size of a bucket, except for one
    with a single parameter.
    ``unused``: how to take a gradient that is None or missing, of a parameter that had no part in the loss: "error"
    raises, "zeros" counts it as zeros.

    Raises on all ranks: a rank's bad arguments raise TypeError or ValueError there, and PeerError naming that rank on
    the others; MismatchError where the ranks' arguments differ.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any] | Sequence[Any],
        optimizer: Optimizer | str,
        comm: MPI.Intracomm | None = None,
        mode: BaseMode | str = "sync",
        compression: Compressor | Choice | str | None = None,
        algorithm: str = "auto",
        warmup_steps: int = 0,
        bucket_bytes: int = 25 << 20,
        check_every: int = 0,
        unused: str = "error",
        compression_for: Mapping[str, Compressor | str | None] | None = None,
    ) -> None:
        self.comm = given_comm(comm, "DataParallel")
        self.rank = self.comm.Get_rank()
        error: Exception | None = None
        mine: dict[str, Any] = {}
        try:
            self._replica = Replica(parameters, optimizer, mode)
            self.compression = chosen_compression(compression)
            self.compression_for = checked_choices(compression_for, self._replica.parameters)
            check_name(algorithm, "DataParallel")
            self.algorithm = algorithm
            self.warmup_steps = checked("DataParallel", "warmup_steps", warmup_steps, int, Range(least=0))
            self._replica.warmup_steps = self.warmup_steps
            self.check_every = checked("DataParallel", "check_every", check_every, int, Range(least=0))
            self.bucket_bytes = checked("DataParallel", "bucket_bytes", bucket_bytes, int, Range(least=1))
            self.unused = checked_unused(unused)
            self._require_no_common_steps()
            mine = self.describe()
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        raise_everywhere(self.comm, "DataParallel", error)

        number = require_alike(self.comm, mine, next(_numbers_of_trainers))
        parameters = self._replica.parameters
        free = isinstance(self._replica.mode, FreeMode)
        self.picked: dict[str, Picked] = {}
        """What a choice such as Structure has picked for each parameter, with predicted seconds; else empty."""
        usual: dict[str, Compressor | None] = {}
        if isinstance(self.compression, Choice):
            self.picked = picked_jointly(self.comm, self.compression, parameters, free)
            usual = {name: picked.compressor for name, picked in self.picked.items()}
        else:
            usual = dict.fromkeys(parameters, self.compression)
        self.compressors = compressor_of_each(usual, self.compression_for)
        """What each parameter travels by, None for exact sums; small ones travel exactly all the same."""
        self._exchange = GradientExchange(
            self.comm,
            self._replica.parameters,
            dict.fromkeys(parameters) if free else self.compressors,
            algorithm,
            self.bucket_bytes,
            self._replica.warms_up,
            Bucket.plan if free else self._replica.common_mode.plan,
            self._replica.travelling,
        )
        self._exchange.broadcast(self._replica.parameters, root=0)
        self.buckets, self.plans = self._exchange.buckets, self._exchange.plans
        zeros = self.unused == "zeros"
        self._stepper: BaseStepper
        if free:
            self._stepper = FreeStepper(self.comm, self._replica, self._exchange, number, self.compressors, zeros)
        else:
            self._stepper = Stepper(self.comm, self._replica, self._exchange, number, zeros)
        self.notices = self._stepper.notices
        if self.check_every:
            self._stepper.compare_at = self.check_every

    def _require_no_common_steps(self) -> None:
        """Raise ValueError where a free mode is to do what takes steps that all ranks make."""
        if not isinstance(self._replica.mode, FreeMode):
            return
        for name in ("warmup_steps", "check_every"):
            if getattr(self, name):
                mode = modes.name_of(type(self._replica.mode))
                raise ValueError(
                    f"DataParallel: {name} must be 0 in mode {mode}, in which ranks do not make the same steps, "
                    f"got {getattr(self, name)}"
                )

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"DataParallel: {name} holds for the trainer's life; make another trainer for {value!r}"
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        raise uncopyable(self, "state_dict() has what it knows, as plain arrays and numbers, for load_state_dict")

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's settings. Others can be put here, the same on all ranks, which the next step checks.

        Raises ValueError for an optimizer that keeps other slots: the state is not made anew; and, in a mode in which
        ranks go each at its own pace, for one without a native kernel in the place of one that has it.
        """
        return self._replica.optimizer

    @optimizer.setter
    def optimizer(self, given: Optimizer | str) -> None:
        self._replica.take_optimizer(given)

    @property
    def mode(self) -> BaseMode:
        """The mode's settings. Others of the same mode can be put here, as with ``optimizer``."""
        return self._replica.mode

    @mode.setter
    def mode(self, given: BaseMode | str) -> None:
        self._replica.take_mode(given)
        self._stepper.mode_has_changed()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.Get_size()

    @property
    def parameters(self) -> dict[str, Any]:
        """Name -> the caller's array, or an array over the memory of what was given."""
        return self._replica.parameters

    @property
    def steps(self) -> int:
        """Steps made, those without samples included."""
        return self._stepper.steps

    @property
    def on_device(self) -> bool:
        """Whether the parameters are in device memory."""
        return self._replica.on_device

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others in exchanges so far."""
        return self._stepper.bytes_sent

    @property
    def clocks(self) -> list[float]:
        """Steps that each rank has made, as far as this one knows; infinite for one that has left."""
        return self._stepper.clocks

    def telemetry(self) -> dict[str, Any]:
        """Times and losses of this rank's exchanges since the last call; empty where there were none.

        ``wait_seconds`` for the slowest rank, before exchanges, and ``slowest_rank``, the one that was so most often.
        Where there were compressed exchanges also ``encode_seconds``, ``wire_seconds``, ``decode_seconds`` and
        ``bytes_sent``, summed over steps and buckets; ``residual_ratio``, ``contraction`` and ``owner_residual_ratio``
        as means. See ``Telemetry``. ``hidden_share``, of 0 to 1: how much of the time of exchanges that went on beside
        other work this rank did not wait for.

        In modes of a parameter server: ``wait_seconds`` of its steps, and ``waited_for``: rank -> seconds of these; of
        the updates that this rank's shard has got ``applied`` and ``dropped``, how many, and ``staleness``: how old
        they were -> how many.
        """
        return self._stepper.telemetry()

    def timeline(self) -> list[Span]:
        """What the last step did when, on this rank: spans of kind, bucket's number or None, start and end in seconds.

        Kinds: ``compute`` (what the caller does), ``pack`` (NaN check not included), ``encode``, ``wire``, ``decode``,
        ``wait`` (for a bucket), ``apply``. A bucket's encoding and decoding, which alternate with sending, are shown
        before and after it.
        """
        return self._exchange.timeline.spans

    @property
    def in_a_block(self) -> bool:
        """Whether this rank has made steps alone since ranks met last, in a mode that exchanges less often."""
        return bool(self._replica.mode_state.get("steps"))

    @property
    def algorithms(self) -> list[str]:
        """The algorithm chosen for each bucket."""
        return [plan.algorithm for plan in self.plans]

    @one_call("DataParallel.step")
    def step(self, gradients: Mapping[str, Any] | Sequence[Any] | None = None, weight: float = _NOT_GIVEN) -> None:
        """One training step from this rank's ``gradients``, the mean over ``weight`` samples (1). Collective.

        ``gradients`` match the parameters in nesting, names (or order), shapes, dtypes and device; any strides, through
        DLPack as well; NumPy's subclasses are their plain data. They are only read, and ignored when ``weight`` is 0. A
        gradient of two dimensions may be given as ``Factors``. All ranks make equally many steps; total weight 0
        changes nothing. Without arguments: the step that ``begin`` has opened.

        A rank's bad arguments raise TypeError or ValueError there and PeerError on the others, NaN or Inf
        NonFiniteError on all; parameters, optimizer and residuals are as before, and training may go on. In a mode that
        exchanges less often, the rank concerned skips that local step and all raise at the next exchange, before
        anything is averaged. An error in an optimizer or a mode is raised there, and as PeerError on the others; then
        parameters, optimizer, residuals and the mode's state are as before, and the step can be made again.

        A Ctrl-C takes effect where ranks meet, and then the step has not been made; or, in a step in which they do not,
        at its end, so that no rank falls behind. In modes of a parameter server the step has been made once it fetches.
        """
        if gradients is not None or weight is not _NOT_GIVEN or not self._stepper.step_opened():
            self._stepper.step(gradients, weight)
        self.notices.step_is_made()
        if self._stepper.compares_now:
            self._stepper.compare_at = self.steps + self.check_every
            compare(self.comm, self._replica.parameters, f"DataParallel.step (step {self.steps - 1})")

    @one_call("DataParallel.begin")
    def begin(self, weight: float = 1.0) -> OpenStep:
        """Open a step whose gradients, the mean over ``weight`` samples, go to ``ready`` one by one. Collective.

        In mode ``sync`` a bucket of gradients is exchanged as soon as they are there, while back-propagation computes
        the next (wait-free back-propagation; Zhang et al., Poseidon, 2017); with less than 8 MiB of them, in ``step``.
        The weights are exchanged from here on, beside the forward pass. In modes of a parameter server with push=1 and
        fetch=1 gradients travel to the shards' owners, 256 KiB together or more, who apply them when the step is made.
        Other modes keep the gradients for ``step``::

            trainer.begin(weight=len(x))
            model.loss_and_gradients(x, y, on_gradient=trainer.ready)
            trainer.step()

        The result is the bits of ``step(gradients, weight)``. ``with trainer.begin(weight): ...`` around the three also
        ends the step on all ranks when an exception comes in between: PeerError with its text on the others, parameters
        and residuals as before. Without ``with``, the next call of this trainer does that, and raises RuntimeError.
        """
        return self._stepper.begin(weight)

    @one_call("DataParallel.ready")
    def ready(self, name: str, gradient: Any) -> None:
        """Hand over the gradient of the parameter ``name``, in any order, best from the last layer to the first.

        It must stay as it is until ``step``. An error ends the open step on all ranks; see ``step`` for which there
        are. Raises RuntimeError without ``begin``.
        """
        self._stepper.ready(name, gradient)

    @one_call("DataParallel.synchronize")
    def synchronize(self) -> None:
        """Make the parameters equal on all ranks, as the mode does it. Collective, but for ``sync``."""
        self._stepper.synchronize()

    @one_call("DataParallel.broadcast")
    def broadcast(self, root: int = 0) -> None:
        """Give all ranks the parameters, and the optimizer's and mode's state, of rank ``root``. Collective.

        Residuals stay: they are each rank's own. Raises as ``step`` does.
        """
        error: Exception | None = None
        try:
            require_root(root, self.size, "DataParallel.broadcast")
        except (TypeError, ValueError) as problem:
            error = problem
        self.meet("broadcast", error)
        broadcast_tree(self.comm, self._exchange, self._stepper.common_state(), root)
        self.reload()

    def digest(self) -> str:
        """A hash of this rank's parameters, bit for bit; equal on all ranks when the replicas are."""
        return self._replica.digest()

    def state_dict(self) -> dict[str, Any]:
        """All that this rank needs to go on, as NumPy copies and numbers.

        Calls ``synchronize`` first, so it is collective in modes where that is. Holds ``parameters``, ``optimizer``,
        ``mode``, ``residuals`` (for each bucket, what its plan keeps), ``steps``, ``algorithms`` and ``settings``.
        """
        return self._stepper.collect(lambda: state_of(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from this rank's ``state_dict``, of a trainer with the same parameters and settings.

        Not collective, but in modes in which ranks go each at its own pace. Raises TypeError or ValueError, before
        anything is changed, when they are not the same.
        """
        self._stepper.put_in(lambda: load_state(self, state))

    def leave(self) -> None:
        """This rank makes no more steps, and nobody waits for it. It may still synchronize, save, load and free.

        Raises RuntimeError in a mode in which all ranks make the same steps. ``with trainer: ...`` leaves at its end.
        """
        self._stepper.leave()

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(self, *error: object) -> None:
        self._stepper.end()

    @property
    def claims(self) -> bool:
        """Whether ``claim`` has a store to count in."""
        return self._stepper.claims

    def claim(self, row: tuple[int, ...]) -> int:
        """The next number, from 0 on, of a row of numbers, each of which one rank gets; see ``bitring.claimed``."""
        return self._stepper.claim(row)

    def free(self) -> None:
        """Free the plans. Collective; the parameters stay as they are."""
        self._stepper.free()
        self._exchange.free()

    # What checkpoints call

    def meet(self, operation: str, error: Exception | None, afresh: bool = False) -> None:
        """Raise on all ranks when one has an ``error``, or is not at the same operation and step. Collective.

        An error of an earlier step of this rank, kept until ranks meet, is raised too, unless ``afresh``.
        """
        self._stepper.meet(operation, error, afresh)

    def live(self) -> dict[str, Any]:
        """The state but for residuals: a tree of the arrays and numbers in use, no copies."""
        return self._replica.live()

    def restore(self, values: Mapping[tuple[str, ...], Any], steps: int) -> None:
        """Fill leaves of ``live``, by path; ``steps`` have been made."""
        self._stepper.restore(values, steps)

    def reload(self) -> None:
        """Go on from what ``restore`` has filled in. Collective in modes where ranks go each at its own pace."""
        self._stepper.reload()

    def use_algorithms(self, algorithms: Sequence[str]) -> None:
        """Make the exact plans anew that run another algorithm. Collective."""
        self._exchange.use_algorithms(algorithms)

    def describe(self) -> dict[str, Any]:
        """The settings, as plain data; all ranks give the same."""
        return description_of(self)
