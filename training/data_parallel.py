"""Data-parallel training: each rank computes gradients of its part of the batch, the trainer does the rest.

Parameters stay the caller's arrays and are updated in place. For the exchange they are packed into flat buckets, in
reverse order, since back-propagation finishes the last layer first. What is exchanged, and when, is the mode's matter.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.arrays import is_device, xp_of
from bitring.collectives.communicator import Communicator
from bitring.collectives.errors import MismatchError, NonFiniteError, PeerError
from bitring.collectives.state import given_comm
from bitring.compression.compressor import Compressor, compressors, parsed
from bitring.compression.factors import Factors
from bitring.compression.reduced_plan import ReducedPlan
from bitring.compression.sufficient_factors import SufficientFactors
from bitring.compression.telemetry import Totals
from bitring.compression.watched_plan import WatchedPlan
from bitring.training.bucket import Bucket
from bitring.training.checks import (
    checked_gradients,
    checked_parameters,
    checked_weight,
    chosen,
    count_of,
    difference,
    not_finite,
    resumable,
    text_of,
)
from bitring.training.mode import Mode, modes
from bitring.training.optimizer import Optimizer, optimizers
from bitring.training.preemption import NOTICE, watching
from bitring.training.tree import copied, fill, host_copy, leaves, set_leaf

# Below this size the exchange is over before waking the progress thread has paid.
OVERLAP_BYTES = 8 << 20

# What ranks can be doing when they meet; the control record holds the index.
OPERATIONS = ("step", "synchronize", "save_checkpoint", "load_checkpoint")

_trainers_made = 0


class DataParallel:
    """Train ``parameters`` on all ranks of ``comm``. Collective, as are ``step``, ``synchronize`` and ``free``.

    ``parameters``: dict of name -> array, or a list (named "0", "1", ...); float16, bfloat16, float32 or float64, NumPy
    or CuPy (all the same) or what shares its memory through DLPack, C-contiguous and writable. They take rank 0's
    values now and are updated in place.
    ``optimizer``: a name, or an instance such as ``SGD(lr=0.05)``; settings put into ``trainer.optimizer`` later, such
    as another learning rate, hold from then on.
    ``mode``: a name, or an instance such as ``BlockMomentum(tau=50)``.
    ``compression``: None for an exact exchange, a name such as "topk" or "topk:density=0.001", or an instance such as
    ``OneBit(block=1024)``. Parameters with fewer values than one block of an encoder travel exactly. The first
    ``warmup_steps`` steps are exact.
    ``algorithm``: of the exact exchange, and "auto" chooses. ``bucket_bytes``: buckets are closed at this size.

    Raises on all ranks alike: a rank's own mistake there as TypeError or ValueError, and on the others as PeerError
    naming that rank; MismatchError where the ranks' arguments differ.
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
        self._totals = Totals()
        self._operation = "step"

        error: Exception | None = None
        try:
            self.optimizer = chosen("optimizer", optimizer, optimizers, Optimizer)
            self.mode = chosen("mode", mode, modes, Mode)
            self.compression = (
                None if compression is None else chosen("compression", parsed(compression), compressors, Compressor)
            )
            self.algorithm = algorithm
            self.warmup_steps = count_of("warmup_steps", warmup_steps, 0)
            self._parameters = checked_parameters(parameters)
            self._bucket_bytes = count_of("bucket_bytes", bucket_bytes, 1)
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        _raise_together(self.comm, "DataParallel", error)

        global _trainers_made
        _trainers_made += 1
        mine = self.describe()
        theirs, self._id = self.comm.bcast((mine, _trainers_made))
        differences: list[str | None] = self.comm.allgather(difference(mine, theirs))
        for rank, text in enumerate(differences):
            if text is not None:
                raise MismatchError(f"DataParallel: rank {rank} differs from rank 0: {text}")
        self._xp = xp_of(next(iter(self._parameters.values())))
        for array in self._parameters.values():
            host = host_copy(array)
            self.comm.Bcast(host.reshape(-1).view(np.uint8), root=0)
            if self.rank != 0:
                fill(array, host)

        self._record = np.zeros(6)  # trainer's id, operation, steps, whether something is wrong, weight, notice
        self._records = np.zeros((self.size, 6))
        self.buckets = self._make_buckets()
        self._overlaps = sum(bucket.flat.nbytes for bucket in self.buckets) >= OVERLAP_BYTES
        self.plans: list[Any] = []
        self._exact_plans: dict[int, Any] = {}  # of compressed buckets, for the warm-up
        for i, bucket in enumerate(self.buckets):
            self.plans.append(bucket.plan(self.comm, algorithm, self.compression if bucket.compressed else None))
            if bucket.compressed and self.warmup_steps:
                self._exact_plans[i] = bucket.plan(self.comm, algorithm, None)
        self._optimizer_state = self.optimizer.init(self._parameters)
        self._mode_state = self.mode.init(self)

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
        return sum(plan.bytes_sent for plan in (*self.plans, *self._exact_plans.values()))

    def telemetry(self) -> dict[str, float | int | None]:
        """What compressed exchanges took on this rank since the last call; empty where there were none.

        ``encode_seconds``, ``wire_seconds``, ``decode_seconds``, ``wait_seconds`` (for the slowest rank, before the
        exchange) and ``bytes_sent``, summed over steps and buckets; ``residual_ratio``, ``contraction`` and
        ``owner_residual_ratio`` as means; ``slowest_rank``, the one that was so most often. See ``Telemetry``.
        """
        return self._totals.taken()

    @property
    def in_a_block(self) -> bool:
        """Whether this rank has made steps alone since ranks met last, in a mode that exchanges less often."""
        return bool(self._mode_state.get("steps"))

    @property
    def algorithms(self) -> list[str]:
        """The algorithm chosen for each bucket."""
        return [plan.algorithm for plan in self.plans]

    def _make_buckets(self) -> list[Bucket]:
        block = getattr(self.compression, "block", 1)
        filling: dict[Any, dict[str, Any]] = {}
        buckets: list[Bucket] = []

        # In memory that the node's ranks share they reduce each other's gradients where they are.
        empty = Communicator(self.comm).empty if self._xp is np else self._xp.empty

        def close(kind: Any) -> None:
            buckets.append(Bucket(filling.pop(kind), kind[1], empty))

        for name, array in reversed(self._parameters.items()):
            if not array.size:
                continue
            kind = array.dtype, self.compression is not None and array.size >= block
            held = sum(other.nbytes for other in filling.get(kind, {}).values())
            if held and held + array.nbytes > self._bucket_bytes:
                close(kind)
            filling.setdefault(kind, {})[name] = array
        for kind in list(filling):
            close(kind)
        return buckets

    # What users call

    def step(self, gradients: Mapping[str, Any] | Sequence[Any], weight: float = 1.0) -> None:
        """One training step from this rank's ``gradients``, the mean over ``weight`` samples. Collective.

        ``gradients`` match the parameters in names (or order), shapes, dtypes and device; any strides, through DLPack
        as well; they are only read, and not looked at when ``weight`` is 0. One of two dimensions may be given as
        ``Factors``. All ranks make equally many steps; total weight 0 changes nothing.

        A rank's bad arguments raise TypeError or ValueError there and PeerError on the others, NaN or Inf
        NonFiniteError on all; parameters, optimizer and residuals are as before, and training may go on. In a mode that
        exchanges less often, the rank concerned skips that local step and all raise at the next exchange, before
        anything is averaged; the exchange is then made at the step after it.
        """
        self._operation = "step"
        self.notices = 0
        for preemption in watching(self.comm):
            preemption.answer_is_new = True
        taken: dict[str, Any] = {}
        try:
            taken, weight = self._checked(gradients, weight)
        except Exception as problem:  # whatever it is, the other ranks must not wait
            self._problem = self._problem or problem
            weight = 0.0
        self.mode.step(self, self._mode_state, taken, weight)
        self.steps += 1

    def synchronize(self) -> None:
        """Make the parameters equal on all ranks, as the mode does it. Collective, but for ``sync``."""
        self._operation = "synchronize"
        self.mode.synchronize(self, self._mode_state)

    def digest(self) -> str:
        """A hash of this rank's parameters, bit for bit; equal on all ranks when the replicas are."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self._parameters.items():
            digest.update(name.encode())
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

        Raises ValueError, before anything is changed, when they are not the same.
        """
        where = "DataParallel.load_state_dict"
        text = difference(resumable(self.describe()), resumable(state["settings"]))
        if text is None and state["settings"]["bucket_bytes"] != self._bucket_bytes:
            text = f"bucket_bytes is {self._bucket_bytes}, not {state['settings']['bucket_bytes']}"
        if text is None and state["settings"]["ranks"] != self.size:
            text = f"there are {self.size} ranks, not {state['settings']['ranks']}; load_checkpoint can change that"
        if text is not None:
            raise ValueError(f"{where}: the state is of another trainer: {text}")
        given = dict(leaves({part: state[part] for part in ("parameters", "optimizer", "mode")}))
        wanted = dict(leaves(self.live()))
        if given.keys() != wanted.keys():
            odd = "/".join(min(given.keys() ^ wanted.keys()))
            raise ValueError(f"{where}: the state is of another trainer: {odd} is only in one of the two")
        self.restore(given, state["steps"])
        for plan, residuals in zip(self.plans, state["residuals"], strict=True):
            plan.load_state_dict(residuals)

    def free(self) -> None:
        """Free the plans. Collective; the parameters stay as they are."""
        for plan in (*self.plans, *self._exact_plans.values()):
            plan.free()

    # What modes call; see bitring.training.mode.Trainer

    def agree(self, weight: float, check: Mapping[str, Any] | None = None) -> float:
        """See :class:`bitring.training.mode.Trainer`."""
        if check is not None and self._problem is None:
            bad = not_finite(check)
            if bad is not None:
                self._problem = NonFiniteError(
                    f"{self._where()}: the parameter {bad} on rank {self.rank}; training diverged"
                )
        told, self.notice = self.notice, 0
        preemptions = watching(self.comm)
        if any(preemption.noted for preemption in preemptions):
            told |= NOTICE
        wrong = self._problem is not None
        self._record[:] = self._id, OPERATIONS.index(self._operation), self.steps, wrong, weight, told
        self.comm.Allgather(self._record, self._records)
        self.notices = functools.reduce(operator.or_, self._records[:, 5].astype(int).tolist())
        for preemption in preemptions:
            preemption.learn(bool(self.notices & NOTICE))
        asked = [tuple(record) for record in self._records[:, :3].tolist()]
        if len(set(asked)) > 1:
            raise MismatchError(_odd_one_out(asked))
        if self._records[:, 3].any():
            problem, self._problem = self._problem, None
            _raise_together(self.comm, self._where(), problem)
        with np.errstate(over="ignore"):
            total = float(np.cumsum(self._records[:, 4])[-1])  # one after the other, in rank order
        if not math.isfinite(total):
            raise ValueError(f"{self._where()}: the weights of all ranks have no finite sum")
        return total

    def exchange(
        self, arrays: Mapping[str, Any], scale: float, minus: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """See :class:`bitring.training.mode.Trainer`."""
        warm = self.steps < self.warmup_steps
        plans = [self._exact_plans.get(i, plan) if warm else plan for i, plan in enumerate(self.plans)]
        for bucket, plan in zip(self.buckets, plans, strict=True):
            # 16-bit values are scaled in float32 and rounded once.
            factor = np.float32(scale) if bucket.flat.dtype.itemsize == 2 else scale
            takes_factors = isinstance(self.compression, SufficientFactors) and isinstance(plan, ReducedPlan)
            for number, (name, view) in enumerate(bucket.views.items()):
                if scale == 0:
                    view[...] = 0
                    if takes_factors and view.ndim == 2:  # no samples: nothing speaks against the others' factors
                        plan.take(number, Factors(self._xp.empty((0, view.shape[0]), view.dtype), view[:0]))
                elif isinstance(arrays[name], Factors):
                    factors = arrays[name].scaled(scale)
                    if takes_factors:
                        plan.take(number, factors)
                    else:
                        factors.multiply(view)
                elif minus is None:
                    self._xp.multiply(arrays[name], factor, out=view, casting="same_kind")
                else:
                    self._xp.subtract(arrays[name], minus[name], out=view)
                    self._xp.multiply(view, factor, out=view, casting="same_kind")
            if self._overlaps:
                plan.start()
        for bucket, plan in zip(self.buckets, plans, strict=True):
            if self._overlaps:
                plan.wait()
            else:
                plan()
            if isinstance(plan, WatchedPlan) and plan.telemetry is not None:
                self._totals.add(plan.telemetry)
            yield bucket.views

    def update(self, gradients: Mapping[str, Any]) -> None:
        """See :class:`bitring.training.mode.Trainer`."""
        dense = {name: g.product() if isinstance(g, Factors) else g for name, g in gradients.items()}
        self.optimizer.update({name: self._parameters[name] for name in dense}, dense, self._optimizer_state)

    def restart_optimizer(self) -> None:
        """See :class:`bitring.training.mode.Trainer`."""
        self.optimizer.restart(self._optimizer_state)

    # What checkpoints call

    def meet(self, operation: str, error: Exception | None, afresh: bool = False) -> None:
        """Raise on all ranks alike when one has an ``error``, or is not at the same operation and step. Collective.

        So does what a step of this rank's found, which waits for the ranks to meet; with ``afresh`` it is forgotten.
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
        for i, (bucket, algorithm) in enumerate(zip(self.buckets, algorithms, strict=True)):
            if not bucket.compressed and self.plans[i].algorithm != algorithm:
                self.plans[i].free()
                self.plans[i] = bucket.plan(self.comm, algorithm, None)

    def describe(self) -> dict[str, Any]:
        """The settings, as plain data; all ranks give the same."""
        return {
            "parameters": {name: [w.dtype.name, list(w.shape)] for name, w in self._parameters.items()},
            "optimizer": text_of(self.optimizer),
            "mode": text_of(self.mode),
            "compression": text_of(self.compression),
            "algorithm": self.algorithm,
            "warmup_steps": self.warmup_steps,
            "bucket_bytes": self._bucket_bytes,
            "device": any(map(is_device, self._parameters.values())),
            "ranks": self.size,
        }

    # Checks

    def _where(self) -> str:
        if self._operation.endswith("checkpoint"):
            return self._operation
        return f"DataParallel.{self._operation} (step {self.steps})"

    def _checked(self, gradients: Any, weight: Any) -> tuple[dict[str, Any], float]:
        where = self._where()
        number = checked_weight(weight, where)
        taken = checked_gradients(gradients, self._parameters, where)
        if number:
            bad = not_finite(taken)
            if bad is not None:
                raise NonFiniteError(f"{where}: the gradient of {bad} on rank {self.rank}")
            if not isinstance(self.compression, SufficientFactors):
                taken = {name: g.product() if isinstance(g, Factors) else g for name, g in taken.items()}
        return taken, number


def _raise_together(comm: MPI.Intracomm, where: str, error: Exception | None) -> None:
    """Raise on all ranks when any has an ``error``: the rank itself its own, the others one naming it. Collective."""
    mine = None if error is None else (isinstance(error, NonFiniteError), type(error).__name__, str(error))
    for rank, theirs in enumerate(comm.allgather(mine)):
        if error is not None:
            raise error
        if theirs is not None:
            not_finite, kind, text = theirs
            raise NonFiniteError(text) if not_finite else PeerError(f"{where}: rank {rank} raised {kind}: {text}")


def _odd_one_out(asked: Sequence[tuple[float, ...]]) -> str:
    """Say which rank is doing something else than most."""
    usual = Counter(asked).most_common(1)[0][0]
    odd = next(rank for rank, one in enumerate(asked) if one != usual)
    other = next(rank for rank, one in enumerate(asked) if one == usual)

    def words(rank: int) -> str:
        trainer, operation, steps = map(int, asked[rank])
        return f"rank {rank} is at {OPERATIONS[operation]}, after {steps} steps of its trainer number {trainer}"

    return f"DataParallel: ranks do not do the same: {words(odd)}; {words(other)}"
