"""Data-parallel training: each rank computes gradients of its part of the batch, the trainer does the rest.

Parameters stay the caller's arrays and are updated in place. For the exchange they are packed into flat buckets, in
reverse order, since back-propagation finishes the last layer first. What is exchanged, and when, is the mode's matter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import is_device
from bitring.collectives.calls import require_root
from bitring.collectives.runtime.context import context_of, given_comm, one_call
from bitring.collectives.runtime.jointly import jointly, raise_everywhere
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.collectives.selection.selection import check_name
from bitring.compression.compressor import Compressor, compressors, parsed
from bitring.compression.factors import Factors
from bitring.compression.reducers.sufficient_factors import SufficientFactors
from bitring.errors import MismatchError, NonFiniteError, uncopyable
from bitring.settings import Range, checked
from bitring.training.mode import Mode, modes
from bitring.training.optimizer import Optimizer, optimizers
from bitring.training.preemption import NOTICE, watching
from bitring.training.step.checks import (
    checked_gradients,
    checked_leaves,
    checked_parameters,
    checked_unused,
    checked_weight,
    chosen,
    difference,
    is_frozen,
    not_finite,
    require_state,
    resumable,
    text_of,
)
from bitring.training.step.gradient_exchange import GradientExchange
from bitring.training.step.interrupts import HeldBack
from bitring.training.step.meeting import OPERATIONS, TOLD, WEIGHT, WRONG, Meeting, Records, hash_of
from bitring.training.step.replicas import broadcast_tree, compare
from bitring.training.step.transaction import Transaction
from bitring.training.step.undo import Numbers, arrays_in
from bitring.training.step.waits import Waits
from bitring.training.tree import copied, host_copy, set_leaf

# Below this size the exchange is over before waking the progress thread has paid.
OVERLAP_BYTES = 8 << 20

_FIXED = {"comm", "compression", "algorithm", "warmup_steps", "check_every"}

_trainers_made = 0


class DataParallel:
    """Train ``parameters`` on all ranks of ``comm``. Collective, as are ``step``, ``synchronize`` and ``free``.

    ``parameters``: dict of name -> array, or a list (named "0", "1", ...); float16, bfloat16, float32 or float64, NumPy
    or CuPy (all the same) or what shares its memory through DLPack, dense and writable; on the host in any memory
    order, such as channels_last. They take rank 0's values now and are updated in place.
    ``optimizer``: a name, or an instance such as ``SGD(lr=0.05)``; settings put into ``trainer.optimizer`` later, such
    as another learning rate, hold from then on.
    ``mode``: a name, or an instance such as ``BlockMomentum(tau=50)``.
    ``compression``: None for an exact exchange, a name such as "topk" or "topk:density=0.001", or an instance such as
    ``OneBit(block=1024)``. Parameters with fewer values than one block of an encoder travel exactly. The first
    ``warmup_steps`` steps are exact.
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
        mode: Mode | str = "sync",
        compression: Compressor | str | None = None,
        algorithm: str = "auto",
        warmup_steps: int = 0,
        bucket_bytes: int = 25 << 20,
        check_every: int = 0,
        unused: str = "error",
    ) -> None:
        self.comm = given_comm(comm, "DataParallel")
        self.rank = self.comm.Get_rank()
        self.steps = 0
        """Steps made, those without samples included."""
        self.notice = 0
        """Bits that this rank tells the others when they meet next, in the record that they exchange anyway."""
        self.notices = 0
        """Bits that any rank told in the last step; equal on all ranks, 0 where the step did not make them meet."""
        self._problem: Exception | None = None
        self._operation = "step"
        self._updates: dict[str, Any] = {}  # gradients that the optimizer is to see at the step's end
        self._waits = Waits()
        self._held = HeldBack()  # in a step, until ranks meet

        error: Exception | None = None
        mine: dict[str, Any] = {}
        try:
            self._optimizer = chosen("optimizer", optimizer, optimizers, Optimizer)
            self._mode = chosen("mode", mode, modes, Mode)
            given = parsed(compression, "DataParallel")
            self.compression = None if given is None else chosen("compression", given, compressors, Compressor)
            check_name(algorithm, "DataParallel")
            self.algorithm = algorithm
            self.warmup_steps = checked("DataParallel", "warmup_steps", warmup_steps, int, Range(least=0))
            self.check_every = checked("DataParallel", "check_every", check_every, int, Range(least=0))
            self._check_at = self.check_every
            self._parameters = checked_parameters(parameters)
            self._on_device = any(map(is_device, self._parameters.values()))
            self._bucket_bytes = checked("DataParallel", "bucket_bytes", bucket_bytes, int, Range(least=1))
            self.unused = checked_unused(unused)
            mine = self.describe()
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        raise_everywhere(self.comm, "DataParallel", error)

        global _trainers_made
        _trainers_made += 1
        theirs, self._id = broadcast(self.comm, (mine, _trainers_made), "DataParallel")
        for rank, text in enumerate(allgather(self.comm, difference(mine, theirs), "DataParallel")):
            if text is not None:
                raise MismatchError(f"DataParallel: rank {rank} differs from rank 0: {text}")
        self._set_words()
        self._meeting = Meeting(self.comm, self._words)
        self._exchange = GradientExchange(
            self.comm,
            self._parameters,
            self.compression,
            algorithm,
            self._bucket_bytes,
            self.warmup_steps > 0,
            OVERLAP_BYTES,
        )
        self._exchange.broadcast(self._parameters, root=0)
        self.buckets, self.plans = self._exchange.buckets, self._exchange.plans
        self._transaction = Transaction(self.comm, self._meeting, self._exchange, self._waits)
        self._optimizer_state = jointly(self.comm, "DataParallel", lambda: self._optimizer.init(self._parameters))
        self._mode_state = jointly(self.comm, "DataParallel", lambda: self._mode.init(self))
        self._numbers = Numbers(self._mode_state)
        self._changes = self._arrays_that_change()

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

        Raises ValueError for an optimizer that keeps other slots: the state is not made anew.
        """
        optimizer: Optimizer = self._optimizer
        return optimizer

    @optimizer.setter
    def optimizer(self, given: Optimizer | str) -> None:
        new: Optimizer = chosen("optimizer", given, optimizers, Optimizer)
        if set(new.slots) != set(self._optimizer_state):
            raise ValueError(
                f"DataParallel: optimizer must keep the slots {list(self._optimizer_state)} of the trainer's state, "
                f"got {text_of(new)}, which keeps {list(new.slots)}; make another trainer for it"
            )
        self._optimizer = new
        self._set_words()

    @property
    def mode(self) -> Mode:
        """The mode's settings. Others of the same mode can be put here, as with ``optimizer``."""
        mode: Mode = self._mode
        return mode

    @mode.setter
    def mode(self, given: Mode | str) -> None:
        new: Mode = chosen("mode", given, modes, Mode)
        if type(new) is not type(self._mode):
            raise ValueError(
                f"DataParallel: mode must stay {type(self._mode).__name__}, whose state the trainer keeps, "
                f"got {text_of(new)}; make another trainer for it"
            )
        new.take_over(self._mode_state)
        self._mode = new
        self._changes = self._arrays_that_change()
        self._set_words()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.Get_size()

    @property
    def parameters(self) -> dict[str, Any]:
        """Name -> the caller's array, or an array over the memory of what was given."""
        return self._parameters

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others in exchanges so far."""
        return self._exchange.bytes_sent

    def telemetry(self) -> dict[str, float | int | None]:
        """Times and losses of this rank's exchanges since the last call; empty where there were none.

        ``wait_seconds`` for the slowest rank, before exchanges, and ``slowest_rank``, the one that was so most often.
        Where there were compressed exchanges also ``encode_seconds``, ``wire_seconds``, ``decode_seconds`` and
        ``bytes_sent``, summed over steps and buckets; ``residual_ratio``, ``contraction`` and ``owner_residual_ratio``
        as means. See ``Telemetry``.
        """
        return {**self._exchange.totals.taken(), **self._waits.taken()}

    @property
    def in_a_block(self) -> bool:
        """Whether this rank has made steps alone since ranks met last, in a mode that exchanges less often."""
        return bool(self._mode_state.get("steps"))

    @property
    def algorithms(self) -> list[str]:
        """The algorithm chosen for each bucket."""
        return [plan.algorithm for plan in self.plans]

    # What users call

    @one_call("DataParallel.step")
    def step(self, gradients: Mapping[str, Any] | Sequence[Any], weight: float = 1.0) -> None:
        """One training step from this rank's ``gradients``, the mean over ``weight`` samples. Collective.

        ``gradients`` match the parameters in names (or order), shapes, dtypes and device; any strides, through DLPack
        as well; NumPy's subclasses are their plain data. They are only read, and ignored when ``weight`` is 0. A
        gradient of two dimensions may be given as ``Factors``. All ranks make equally many steps; total weight 0
        changes nothing.

        A rank's bad arguments raise TypeError or ValueError there and PeerError on the others, NaN or Inf
        NonFiniteError on all; parameters, optimizer and residuals are as before, and training may go on. In a mode that
        exchanges less often, the rank concerned skips that local step and all raise at the next exchange, before
        anything is averaged. An error in an optimizer or a mode is raised there, and as PeerError on the others; then
        parameters, optimizer, residuals and the mode's state are as before, and the step can be made again.

        A Ctrl-C takes effect where ranks meet, and then the step has not been made; or, in a step in which they do not,
        at its end, so that no rank falls behind.
        """
        with self._held:
            self._operation = "step"
            where = self._where()
            self.notices = 0
            problem = self._problem
            taken: dict[str, Any] = {}
            try:
                taken, weight = self._checked(gradients, weight, where)
            except Exception as error:  # whatever it is, the other ranks must not wait
                self._problem = self._problem or error
                weight = 0.0
            try:
                self._transact(lambda: self._mode.step(self, self._mode_state, taken, weight), where, steps=1)
            except Exception as error:
                if self._transaction.came:
                    self._problem = self._problem and problem  # what was found in this step is over, but not what waits
                    raise
                self._problem = self._problem or error  # the others know nothing of it, and hear of it when they meet
                self._transact(lambda: self._mode.step(self, self._mode_state, {}, 0.0), where, steps=1)
            for preemption in watching(self.comm):
                preemption.answer_is_new = True
            if self._compares_after(0):
                self._check_at = self.steps + self.check_every
                compare(self.comm, self._parameters, where)

    @one_call("DataParallel.synchronize")
    def synchronize(self) -> None:
        """Make the parameters equal on all ranks, as the mode does it. Collective, but for ``sync``."""
        self._operation = "synchronize"
        self._transact(lambda: self._mode.synchronize(self, self._mode_state), self._where())

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
        broadcast_tree(self.comm, self._exchange, self.live(), root)

    def digest(self) -> str:
        """A hash of this rank's parameters, bit for bit; equal on all ranks when the replicas are."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self._parameters.items():
            digest.update(name.encode(errors="surrogatepass"))
            digest.update(host_copy(array).reshape(-1).view(np.uint8))
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """All that this rank needs to go on, as NumPy copies and numbers.

        Calls ``synchronize`` first, so it is collective in modes where that is. Holds ``parameters``, ``optimizer``,
        ``mode``, ``residuals`` (for each bucket, what its plan keeps), ``steps``, ``algorithms`` and ``settings``.
        """
        self.synchronize()
        return {
            **copied(self.live()),
            "residuals": [{key: host_copy(x) for key, x in plan.state_dict().items()} for plan in self.plans],
            "steps": self.steps,
            "algorithms": self.algorithms,
            "settings": self.describe(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from this rank's ``state_dict``, of a trainer with the same parameters and settings. Not collective.

        Raises TypeError or ValueError, before anything is changed, when they are not the same.
        """
        where = "DataParallel.load_state_dict"
        mine: dict[str, Any] = {**self.live(), "residuals": [], "steps": self.steps, "settings": self.describe()}
        require_state(state, mine, where)
        text = difference(resumable(mine["settings"]), resumable(state["settings"]))
        if text is None and state["settings"]["bucket_bytes"] != self._bucket_bytes:
            text = f"bucket_bytes is {self._bucket_bytes}, not {state['settings']['bucket_bytes']}"
        if text is None and state["settings"]["ranks"] != self.size:
            text = f"there are {self.size} ranks, not {state['settings']['ranks']}; load_checkpoint can change that"
        if text is not None:
            raise ValueError(f"{where}: the state is of another trainer: {text}")
        self.restore(checked_leaves(state, self.live(), self.plans, where), state["steps"])
        for plan, residuals in zip(self.plans, state["residuals"], strict=True):
            plan.load_state_dict(residuals)

    def free(self) -> None:
        """Free the plans. Collective; the parameters stay as they are."""
        self._exchange.free()

    # What modes call; see bitring.training.mode.Trainer

    def agree(self, weight: float, check: Mapping[str, Any] | None = None) -> float:
        """See :class:`bitring.training.mode.Trainer`."""
        where = self._where()
        if check is not None and self._problem is None:
            bad = self._not_finite(check)
            if bad is not None:
                self._problem = NonFiniteError(f"{where}: the parameter {bad} on rank {self.rank}; training diverged")
        told = self.notice
        preemptions = watching(self.comm)
        if any(preemption.noted for preemption in preemptions):
            told |= NOTICE

        def heard(records: Records) -> None:
            self.notice &= ~told
            self.notices = 0
            for record in records:
                self.notices |= int(record[TOLD])
            for preemption in preemptions:
                preemption.learn(bool(self.notices & NOTICE))

        self._held.release()
        self._transaction.came = True
        records = self._meeting.exchange(self._record(self._problem is not None, weight, told), where, heard)
        if any(record[WRONG] for record in records):
            problem, self._problem = self._problem, None
            raise_everywhere(self.comm, where, problem, alike=(NonFiniteError,))
        total = 0.0
        for record in records:
            total += record[WEIGHT]
        if not math.isfinite(total):
            raise ValueError(f"{where}: the weights of all ranks have no finite sum")
        self._transaction.met = True
        if self._mode_state:
            self._save()
        return total

    def _record(self, wrong: bool, weight: float = 0.0, told: int = 0, ends: bool = False) -> tuple[float, ...]:
        if self._settings_may_change:
            self._set_words()
        operation = OPERATIONS.index(self._operation)
        return self._id, operation, ends, self.steps, self._settings_hash, wrong, weight, told, self._meeting.waited

    def exchange(
        self, arrays: Mapping[str, Any], scale: float, minus: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """See :class:`bitring.training.mode.Trainer`."""
        beside = self._save if self._mode.writes or self._update_may_raise else lambda: None
        return self._exchange.run(arrays, scale, minus, self.steps < self.warmup_steps, beside)

    def update(self, gradients: Mapping[str, Any], at_end: bool = False) -> None:
        """See :class:`bitring.training.mode.Trainer`."""
        dense = gradients
        if self._has_factors(gradients):
            dense = {name: g.product() if isinstance(g, Factors) else g for name, g in gradients.items()}
        if at_end and not self._update_may_raise:
            for name in dense:
                if not self._parameters[name].flags.writeable:
                    raise ValueError(
                        f"{self._where()}: the parameter {name!r} must be writable, and was made read-only"
                    )
            self._updates.update(dense)
            return
        self._save()
        self._optimizer.update({name: self._parameters[name] for name in dense}, dense, self._optimizer_state)

    def restart_optimizer(self) -> None:
        """See :class:`bitring.training.mode.Trainer`."""
        self._optimizer.restart(self._optimizer_state)

    # What checkpoints call

    def meet(self, operation: str, error: Exception | None, afresh: bool = False) -> None:
        """Raise on all ranks when one has an ``error``, or is not at the same operation and step. Collective.

        An error of an earlier step of this rank, kept until ranks meet, is raised too, unless ``afresh``.
        """
        self._operation = operation
        self._problem = error if afresh else self._problem or error
        self.agree(0.0)

    def live(self) -> dict[str, Any]:
        """The state but for residuals: a tree of the arrays and numbers in use, no copies."""
        return {"parameters": self._parameters, "optimizer": self._optimizer_state, "mode": self._mode_state}

    def restore(self, values: Mapping[tuple[str, ...], Any], steps: int) -> None:
        """Fill leaves of ``live``, by path; ``steps`` have been made."""
        tree = self.live()
        for path, value in values.items():
            set_leaf(tree, path, value)
        self.steps = steps
        self._problem = None

    def use_algorithms(self, algorithms: Sequence[str]) -> None:
        """Make the exact plans anew that run another algorithm. Collective."""
        self._exchange.use_algorithms(algorithms)

    def describe(self) -> dict[str, Any]:
        """The settings, as plain data; all ranks give the same."""
        return {
            "parameters": {name: [w.dtype.name, list(w.shape)] for name, w in self._parameters.items()},
            "optimizer": text_of(self._optimizer),
            "mode": text_of(self._mode),
            "compression": text_of(self.compression),
            "algorithm": self.algorithm,
            "warmup_steps": self.warmup_steps,
            "check_every": self.check_every,
            "bucket_bytes": self._bucket_bytes,
            "device": self._on_device,
            "ranks": self.size,
        }

    # Inside

    def _transact(self, body: Callable[[], None], where: str, steps: int = 0) -> None:
        """Run ``body``, then the updates left to the step's end, all or nothing; then count ``steps``."""
        try:
            self._transaction.run(body, self._numbers, lambda failed: self._record(failed, ends=True), where)
            if not self._updates:
                self.steps += steps
                return
            changed = {name: self._parameters[name] for name in self._updates}
            if not self._compares_after(steps):
                context_of(self.comm).exchanged()
            with HeldBack(), np.errstate(all="ignore"):  # numbers that overflow are found in the next gradients
                self._optimizer.update(changed, self._updates, self._optimizer_state)
                self.steps += steps
        finally:
            self._updates.clear()

    def _compares_after(self, steps: int) -> bool:
        """Whether the replicas are compared when so many steps more have been made."""
        return bool(self.check_every) and self._transaction.met and self.steps + steps >= self._check_at

    @property
    def _update_may_raise(self) -> bool:
        return self._on_device or self._optimizer.may_raise

    def _arrays_that_change(self) -> list[tuple[Any, list[Any]]]:
        """The arrays of a step's undo, those of one bucket and slot together, each with a key."""
        kinds: dict[tuple[str, ...], dict[str, Any]] = {("parameters",): self._parameters}
        kinds |= {("optimizer", slot): arrays for slot, arrays in self._optimizer_state.items()}
        changes: list[tuple[Any, list[Any]]] = [
            ((kind, i), [arrays[name] for name in bucket.shapes])
            for kind, arrays in kinds.items()
            for i, bucket in enumerate(self.buckets)
        ]
        return changes + [(path, [array]) for path, array in arrays_in({"mode": self._mode_state})]

    def _save(self) -> None:
        """Copy what this step may change from here on, so that it can be restored."""
        for key, arrays in self._changes:
            self._transaction.undo.save(key, arrays)

    def _words(self) -> list[str]:
        """The settings that ranks compare in each step, as words."""
        return [f"the optimizer {text_of(self._optimizer)}", f"the mode {text_of(self._mode)}"]

    def _set_words(self) -> None:
        self._settings_hash = hash_of(" ".join(self._words()))
        self._settings_may_change = not (is_frozen(self._optimizer) and is_frozen(self._mode))

    def _where(self) -> str:
        if self._operation.endswith("checkpoint"):
            return self._operation
        return f"DataParallel.{self._operation} (step {self.steps})"

    def _not_finite(self, arrays: Mapping[str, Any]) -> str | None:
        """The first of the arrays that holds NaN or Inf, and which; see ``not_finite``."""
        if not self._has_factors(arrays) and self._exchange.sums_are_finite(arrays):
            return None
        return not_finite(arrays)

    def _has_factors(self, arrays: Mapping[str, Any]) -> bool:
        return Factors in map(type, arrays.values())

    def _checked(self, gradients: Any, weight: Any, where: str) -> tuple[dict[str, Any], float]:
        number = checked_weight(weight, where)
        if not number:
            return {}, number
        taken = checked_gradients(gradients, self._parameters, where, self.unused == "zeros")
        bad = self._not_finite(taken)
        if bad is not None:
            raise NonFiniteError(f"{where}: the gradient of {bad} on rank {self.rank}")
        if self._has_factors(taken) and not isinstance(self.compression, SufficientFactors):
            taken = {name: g.product() if isinstance(g, Factors) else g for name, g in taken.items()}
        return taken, number
