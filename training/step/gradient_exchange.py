"""Exchange of arrays like the parameters: packed into buckets, a plan for each; and what happens when that fails."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import bytes_of, xp_of
from bitring.collectives.base_plan import Plan
from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.context import context_of
from bitring.compression.compressor import Compressor
from bitring.compression.factors import Factors, dense, has_factors
from bitring.compression.plans.telemetry import Totals
from bitring.errors import NonFiniteError
from bitring.training.step.bucket import Bucket, make_buckets
from bitring.training.step.bucket_sizes import overlaps
from bitring.training.step.checks import checked_gradients, not_finite
from bitring.training.step.timeline import Timeline
from bitring.training.tree import host_copy
from bitring.waited import Waited


class GradientExchange:
    """The buckets of ``parameters`` on ``comm``, and their ``plans``. Collective.

    ``compressors``: what each parameter travels by, None for exact sums.
    ``warms_up``: whether there are exact plans, too, for buckets that are compressed. ``make_plan``: makes a bucket's
    plan, from it, a communicator, an algorithm's name and a compressor. ``travelling``: what is exchanged for the
    gradients of these names. ``overlaps``: whether large
    buckets travel while others are packed.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        parameters: Mapping[str, Any],
        compressors: Mapping[str, Compressor | None],
        algorithm: str,
        bucket_bytes: int,
        warms_up: bool,
        make_plan: Callable[[Bucket, MPI.Intracomm, str, Compressor | None], Any],
        travelling: Callable[[Mapping[str, Any], Iterable[str]], Mapping[str, Any]],
    ) -> None:
        self._comm = comm
        self._parameters = parameters
        self._xp = xp_of(next(iter(parameters.values())))
        self._compressors = compressors
        self.takes_factors = any(each is not None and each.takes_factors for each in compressors.values())
        # In memory that the node's ranks share they reduce each other's gradients where they are.
        empty = Communicator(comm).empty if self._xp is np else self._xp.empty
        nodes = context_of(comm).topology.nodes
        self.buckets = make_buckets(parameters, compressors, bucket_bytes, nodes, empty)
        self.overlaps = overlaps(sum(bucket.flat.nbytes for bucket in self.buckets), nodes)
        self._make_plan = make_plan
        self._travelling = travelling
        self.plans: list[Any] = []
        self._exact_plans: dict[int, Any] = {}
        for i, bucket in enumerate(self.buckets):
            self.plans.append(make_plan(bucket, comm, algorithm, bucket.compressor))
            if bucket.compressed and warms_up:
                self._exact_plans[i] = make_plan(bucket, comm, algorithm, None)
        self._note_plans()
        self.totals = Totals()
        self._can_pack = True
        self._packed: Mapping[str, Any] | None = None  # whose small arrays are in the buckets
        self._left: deque[tuple[Bucket, Any]] = deque()  # of the exchange under way: what other ranks wait for
        self._opened: list[tuple[Bucket, Any]] = []  # all buckets of the exchange, and their plans
        self._travels: set[int] = set()  # the numbers of those that began to travel beside this rank's other work
        self._first_began = 0.0  # when the exchange of the first bucket began, where that was over before the others'
        self.timeline = Timeline()
        self.looked_at = True
        """Whether it is known that the gradients last ``checked`` are finite."""
        self.failed = False
        """Whether a plan's run has failed since ``begin``, which it has on all ranks, or the communicator is broken."""

    def _note_plans(self) -> None:
        self.all_plans = [*self.plans, *self._exact_plans.values()]
        """Those of the warm-up, too."""
        self._carrying = [plan for plan in self.all_plans if type(plan).mark is not Plan.mark]

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others in exchanges so far."""
        return sum(plan.bytes_sent for plan in self.all_plans)

    def use_algorithms(self, algorithms: Sequence[str]) -> None:
        """Make the exact plans anew that run another algorithm. Collective."""
        for i, (bucket, algorithm) in enumerate(zip(self.buckets, algorithms, strict=True)):
            if not bucket.compressed and self.plans[i].algorithm != algorithm:
                self.plans[i].free()
                self.plans[i] = self._make_plan(bucket, self._comm, algorithm, None)
        self._note_plans()

    def free(self) -> None:
        """Free the plans; one whose run was interrupted and goes on is freed at the end of its life."""
        for plan in self.all_plans:
            if not plan.started:
                plan.free()

    def sums_are_finite(self, arrays: Mapping[str, Any]) -> bool:
        """Whether all arrays have finite sums: then none holds NaN or Inf. Small arrays are packed on the way.

        A sum is the quickest pass over an array. When it is not finite, it may have overflowed.
        """
        runs = [(bucket, run) for bucket in self.buckets for run in bucket.runs]
        sums = self._xp.empty(len(runs), np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            for i, (bucket, run) in enumerate(runs):
                sums[i] = bucket.packed(arrays, run).sum(dtype=bucket.wide)
        self._packed = arrays
        return all(map(math.isfinite, (sums if self._xp is np else host_copy(sums)).tolist()))

    def not_finite(self, arrays: Mapping[str, Any]) -> str | None:
        """The first of the arrays that holds NaN or Inf, and which; None where none does."""
        if not has_factors(arrays) and self.sums_are_finite(arrays):
            return None
        return not_finite(arrays)

    def checked(self, gradients: Any, where: str, zeros: bool, later: bool = False) -> dict[str, Any]:
        """A step's gradients, one for each parameter: arrays, or ``Factors`` where these travel.

        ``later``: their values are looked at when they are packed, if they can be, or by ``look``.
        Raises NonFiniteError for NaN or Inf, TypeError and ValueError for what is no gradient.
        """
        taken = checked_gradients(gradients, self._parameters, where, zeros)
        self.looked_at = not later or has_factors(taken)
        if not self.looked_at:
            return taken
        self.look(taken, where)
        travelling = self.as_it_travels(taken)
        if self._packed is taken:
            self._packed = travelling
        return travelling

    def look(self, gradients: Mapping[str, Any], where: str) -> None:
        """Raise NonFiniteError where a gradient holds NaN or Inf."""
        bad = self.not_finite(gradients)
        if bad is not None:
            raise NonFiniteError(f"{where}: the gradient of {bad} on rank {self._comm.Get_rank()}")
        self.looked_at = True

    def as_it_travels(self, gradients: Mapping[str, Any]) -> dict[str, Any]:
        """``Factors`` stay where these travel, and are multiplied out elsewhere."""
        return dict(gradients if self.takes_factors else dense(gradients))

    # One exchange, and its end

    def begin(self) -> None:
        """From here on ``undo`` takes back what exchanges change in what the plans carry from run to run."""
        self.failed = False
        self._left.clear()
        for plan in self._carrying:
            plan.mark()

    def run(
        self,
        arrays: Mapping[str, Any],
        scale: float,
        minus: Mapping[str, Any] | None,
        exact: bool,
        beside: Callable[[], None],
    ) -> Iterator[dict[str, Any]]:
        """The sum over ranks of scale·(arrays − minus), bucket by bucket; ``beside`` is called while they travel.

        ``exact``: by the plans of the warm-up, where there are some.
        """
        self.open(exact)
        for number in range(len(self.buckets)):
            self.load(number, arrays, scale, minus, self.overlaps)
        beside()
        yield from self.results()

    def open(self, exact: bool) -> None:
        """Begin an exchange: all ranks do. Buckets are to be loaded, first to last."""
        for plan in self.all_plans:
            if plan.signed:
                plan.sign(None)
        self._open(exact)

    def _open(self, exact: bool) -> None:
        plans = [self._exact_plans.get(i, plan) if exact else plan for i, plan in enumerate(self.plans)]
        self._left.extend(zip(self.buckets, plans, strict=True))
        self._opened = [*self._left]
        self._travels.clear()
        self._first_began = 0.0
        self.timeline.opened()

    def load(
        self, number: int, arrays: Mapping[str, Any], scale: float, minus: Mapping[str, Any] | None, start: bool
    ) -> None:
        """Fill a bucket of the open exchange with scale·(arrays − minus); ``start``: it begins to travel."""
        began = time.perf_counter()
        bucket, plan = self._opened[number]
        if minus is None and scale:
            arrays = self._travelling(arrays, bucket.shapes)
        packed = minus is None and self._packed is arrays
        if self.takes_factors:
            self._load_factors(bucket, plan, arrays, scale, minus)
        elif scale == 0:
            bucket.flat[...] = 0
        else:
            bucket.load(arrays, scale, minus, packed)
        self.timeline.packed(number, began)
        if start:
            plan.start(self.timeline.started(number))
            self._travels.add(number)

    def first_plan(self, exact: bool) -> Any:
        """The plan of the first bucket; ``exact``: in the warm-up."""
        return self._exact_plans.get(0, self.plans[0]) if exact else self.plans[0]

    def load_all(self, arrays: Mapping[str, Any], scale: float, exact: bool, where: str) -> None:
        """Open an exchange and load its buckets; the first one's plan is to be run, signed, then ``first_is_there``.

        Raises NonFiniteError for NaN or Inf in what has not been ``looked_at``; then nothing is to be exchanged.
        """
        self._open(exact)
        if not (scale and self._pack(arrays, scale)):
            if not self.looked_at:
                self.look(arrays, where)
            for number in range(len(self.buckets)):
                self.load(number, arrays, scale, None, start=False)
        self._packed = None  # what is in the buckets are not the arrays any more
        self._first_began = time.perf_counter()

    def open_loaded(self, exact: bool) -> None:
        """As ``load_all``, where the buckets have been loaded."""
        self._open(exact)
        self._packed, self.looked_at, self._first_began = None, True, time.perf_counter()

    def _pack(self, arrays: Mapping[str, Any], scale: float) -> bool:
        """Fill all buckets with scale·arrays in one pass; whether that could be done, and all values are finite."""
        for number, bucket in enumerate(self.buckets if self._can_pack else ()):
            began = time.perf_counter()
            finite = bucket.pack(arrays, scale)
            if not finite:
                self._can_pack = finite is not None  # other steps' gradients are like this one's
                return False
            self.timeline.packed(number, began)
        self.looked_at |= self._can_pack
        return self._can_pack

    def first_is_there(self) -> None:
        """The first bucket has been exchanged."""
        self._travels.add(0)

    def close(self) -> None:
        """End an open exchange of which nothing has been exchanged; it is to be opened again."""
        self._left.clear()

    def wait(self) -> None:
        """Wait for the buckets that travel; ``results`` has their sums at once then. Can be called again."""
        if self.failed:
            raise RuntimeError("DataParallel: an exchange between two steps has failed; load a state to go on from")
        for _, plan in self._left:
            if plan.started:
                self._wait(plan)

    def _wait(self, plan: Any, run: Callable[[Any], None] | None = None) -> None:
        try:
            if plan.started:
                plan.wait()
            elif run is None:
                plan()
            else:
                run(plan)
        except Exception:
            self.failed = True
            raise

    def results(self, run: Callable[[Any], None] | None = None) -> Iterator[dict[str, Any]]:
        """The sums, bucket by bucket, when all are loaded. Interrupted, it can be called again for what is left.

        ``run``: runs a plan; None: by a call.
        """
        self._packed = None
        while self._left:
            bucket, plan = self._left[0]
            began, number = self._first_began or time.perf_counter(), len(self._opened) - len(self._left)
            self._first_began = 0.0
            if plan.started or number not in self._travels:
                self._wait(plan, run)
            self._left.popleft()
            self.timeline.came(number, began, plan.telemetry)
            if plan.telemetry is not None:
                self.totals.add(plan.telemetry)
            yield bucket.views
        self.timeline.ended()

    def _load_factors(
        self, bucket: Bucket, plan: Any, arrays: Mapping[str, Any], scale: float, minus: Mapping[str, Any] | None
    ) -> None:
        """Fill a bucket whose plan may take ``Factors``, where it is not a plan of the warm-up."""
        takes = plan.takes_factors
        factor = np.float32(scale) if bucket.flat.dtype.itemsize == 2 else scale
        for number, (name, view) in enumerate(bucket.views.items()):
            if scale == 0:
                view[...] = 0
                if takes and view.ndim == 2:  # no samples: nothing speaks against the others' factors
                    plan.take(number, Factors(self._xp.empty((0, view.shape[0]), view.dtype), view[:0]))
            elif isinstance(arrays[name], Factors):
                factors = arrays[name].scaled(scale)
                if takes:
                    plan.take(number, factors)
                else:
                    factors.multiply(view)
            elif minus is None:
                self._xp.multiply(arrays[name], factor, out=view, casting="same_kind")
            else:
                self._xp.subtract(arrays[name], minus[name], out=view)
                self._xp.multiply(view, factor, out=view, casting="same_kind")

    def take_part(self, seconds: float) -> bool:
        """Run what is left of an exchange that this rank has given up, with zeros: the others wait for it.

        What comes of it is of no use. Whether it was over within ``seconds``.
        """
        waited = Waited()
        while self._left and not self.failed:
            bucket, plan = self._left[0]
            with contextlib.suppress(Exception):
                if not plan.started and self._number not in self._travels:
                    bucket.flat[...] = 0
                    plan.start()
                if math.isinf(seconds):
                    plan.wait()
                while plan.started and not plan.test():
                    if waited.look() > seconds:
                        return False
                    time.sleep(1e-4)
                self._left.popleft()
                continue
            self.failed = True
        return not self.failed

    @property
    def _number(self) -> int:
        """Of the bucket that is next."""
        return len(self._opened) - len(self._left)

    @property
    def under_way(self) -> bool:
        """Whether plans of an exchange that failed are still started."""
        return any(plan.started for plan in self.all_plans)

    def undo(self) -> None:
        """Take back what runs have changed since ``begin`` in what the plans carry from run to run."""
        for plan in self._carrying:
            plan.undo()

    # From one rank to all

    def broadcast(self, arrays: Mapping[str, Any], root: int) -> None:
        """Give ``arrays``, one like each parameter, the values of rank ``root``'s, in place. Collective."""
        comm = Communicator(self._comm)
        for bucket in self.buckets:
            if self._comm.Get_rank() == root:
                bucket.gather(arrays)
            comm.Bcast(bytes_of(bucket.flat), root)
            if self._comm.Get_rank() != root:
                bucket.scatter(arrays)
