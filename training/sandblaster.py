"""Sandblaster: a batch method on all ranks, by a coordinator that holds no parameters (Dean et al., NIPS 2012).

Every rank computes gradients of small portions of the batch, as many as it gets done; every rank holds a shard of the
parameters and of L-BFGS's vectors; rank 0 decides, by numbers alone. What belongs together:

- ``lbfgs``, ``line_search``: the method, which yields commands; ``coordinator``: who does what next
- ``portions``: which portion goes to whom; ``sum_tree``: sums that do not depend on that
- ``whole_batch``: a batch cut into portions; ``shard``: the vectors; ``cut``: who holds which; ``sandblaster_service``:
  a rank's messages and shard, beside its computing; ``survivors``: what follows a death; ``joint_calls``: calls
  that wait for all; ``split_replica``: several ranks that compute together
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.context import context_of, given_comm
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.errors import DeadRankError, MismatchError, uncopyable
from bitring.training.coordinator import ERRORS, Kind, PortionRecord
from bitring.training.flat import fill, flat
from bitring.training.joint_calls import JointCalls
from bitring.training.lbfgs import LBFGS, NUMBERS, History
from bitring.training.placement.placement import Placement
from bitring.training.sandblaster_arguments import checked_arguments, require_alike, require_groups, require_state
from bitring.training.sandblaster_service import Service
from bitring.training.split_replica import SplitReplica
from bitring.training.store.service_job import private_context
from bitring.training.whole_batch import cut, digest


class Sandblaster:
    """Train ``model`` by L-BFGS on all ranks of ``comm``. Making it is collective, and so are all calls but ``step``.

    model: a ``bitring.Model``, or what has its ``parameters`` (name -> NumPy array, all of one floating dtype) and
    ``loss_and_gradients(x, y)`` (the mean loss, and name -> gradient). Rank 0's parameters are taken. optimizer:
    ``bitring.LBFGS``. portions: into so many parts a batch is cut (fewer where it has fewer samples). backups: whether
    ranks without work compute copies of portions that others have not finished. placement: ``replicas`` equal runs of
    ranks compute together, the model split as in ``bitring.ModelParallel``; without it each rank is a replica.
    survives: whether each rank keeps a copy of another's shard, so that a rank that dies costs the others no more than
    the evaluation under way; not with a placement.

    Equal arguments give equal parameters to the bit, whatever the number of replicas, their speed, and ``backups``,
    whoever dies, provided that the model's arithmetic is the same on all of them. Each rank holds about (2·memory + 8)
    / p float64 vectors of the parameters' size beside the replica, and as many for the copy. Messages and shards are
    served by the progress thread, which needs MPI.THREAD_MULTIPLE; below it a rank serves the others only while it is
    in one of the calls.
    """

    def __init__(
        self,
        model: Any,
        optimizer: LBFGS,
        *,
        comm: MPI.Intracomm | None = None,
        portions: int = 64,
        backups: bool = True,
        placement: str | Mapping[str, str | int] | Placement | None = None,
        replicas: int = 1,
        survives: bool = True,
    ) -> None:
        comm = given_comm(comm, "Sandblaster")
        outer = context_of(comm)
        self.model = model

        def check() -> tuple[int, Any]:
            require_groups(model, placement, replicas, outer.size)
            return checked_arguments(model, optimizer, portions, backups, survives)

        self._size, self._dtype = jointly(comm, "Sandblaster", check, (TypeError, ValueError))
        self.optimizer, self.portions, self.backups = optimizer, int(portions), bool(backups)
        shapes = [(name, w.shape) for name, w in model.parameters.items()]
        mine = {
            "parameters": str(shapes),
            "dtype": self._dtype.name,
            "optimizer": optimizer,
            "portions": portions,
            "backups": backups,
            "survives": survives,
            "placement": repr(placement),
            "replicas": replicas,
        }
        require_alike(mine, allgather(comm, mine, "Sandblaster"))
        self._split: SplitReplica | None = None
        self._last = broadcast(comm, flat(model.parameters, self._dtype), "Sandblaster")  # after the last step
        self._fill(self._last)
        self._context = private_context(comm, "Sandblaster")
        self.rank = outer.rank
        if placement is not None:
            self._split = SplitReplica(model, placement, int(replicas), comm)
        survives = survives and placement is None and outer.size > 1
        self._service = Service(self._context, comm, self._last, optimizer.memory, self.backups, survives)
        self._job = self._context.queue.submit(self._service.steps, "Sandblaster")
        self._calls = JointCalls(self._service, self._until)
        self._calling = threading.Lock()
        self._loaded = 0  # the evaluation whose parameters the model has
        self._left = self._freed = False
        self.steps = 0
        self.evaluations = 0
        """Of loss and gradient on the whole batch, up to the end of the last step."""
        engine.start_thread()
        atexit.register(_finish, weakref.ref(self))

    def step(self, x: Any, y: Any = None) -> float:
        """One iteration over the batch x, y. Returns the loss at the new parameters: the mean over its samples.

        x, y: as the model takes them; every rank gives the whole batch, the same on all. Or ``y`` is left out, and x is
        an iterable of portions (x, y). Where two steps give the same samples the second begins with the loss and the
        gradient that the first ended with.

        No barrier: a rank that is late makes the steps that the others have finished without it, at once. The model has
        the new parameters afterwards, but for a rank that was late, or has raised: ``parameters`` gives them to all.

        What ``loss_and_gradients`` raises is raised on this rank alone: others compute its portions, and it may make
        the step again. Raises on all ranks: NonFiniteError where the loss or the gradient at the present parameters
        are no numbers, MismatchError where ranks give different samples; parameters are as before. DeadRankError when
        a rank has died and the others cannot go on without it, as where another has died that had its shard's copy; the
        model has the parameters of the last step then, from which they may begin anew.
        """
        with self._call("step"):
            if self._left:
                raise RuntimeError("Sandblaster.step: this rank has left")
            pieces = self._pieces(x, y)
            samples = sum(len(piece[0]) for piece in pieces)
            data = float(len(pieces)), *digest(pieces if y is None else [(x, y)])
            step = self.steps + 1
            if self._split is not None:
                self._split.require_alike(data)
                if not self._split.leads:
                    self._split.follow(pieces)
                    return self._end(step, data)
            self._post(Kind.READY, step, data)
            try:
                while step not in self._service.over:
                    self._until(lambda: step in self._service.over or self._has_work())
                    self._compute(pieces, samples)
            except BaseException as error:
                self._post(Kind.GIVES_UP, step)
                if self._split is not None:
                    self._split.end(error)
                raise
            if self._split is not None:
                self._split.end(None)
            return self._end(step, data)

    def _pieces(self, x: Any, y: Any) -> list[Any]:
        """The batch's portions. What is wrong with it is raised on all ranks of a replica."""
        where = "Sandblaster.step"
        if self._split is None:
            return cut(where, x, y, self.portions)
        return jointly(self._split.comm, where, lambda: cut(where, x, y, self.portions), (TypeError, ValueError))

    def _end(self, step: int, data: tuple[float, ...]) -> float:
        """The step's result, when it is over."""
        service = self._service
        self._until(lambda: step in service.over)  # some may hear of it from their replica's leader
        ended = service.over.pop(step)
        self.steps, self.evaluations = step, int(ended.history[NUMBERS.index("evaluations")])
        if ended.error:
            raise ERRORS[ended.error - 1](ended.text.decode())
        if ended.data != data:
            raise MismatchError(f"Sandblaster.step: rank {self.rank} gave other samples in step {step} than another")
        self._until(lambda: service.point[0] >= ended.point)
        evaluation, values = service.point
        if evaluation == ended.point or (evaluation, step) == service.shown:
            self._load(evaluation, values)
            self._last = values
        return ended.loss

    @property
    def comm(self) -> MPI.Intracomm:
        """The ranks that take part: those it was made with, or those of them that are left."""
        return self._calls.place()[1]

    def parameters(self) -> dict[str, Any]:
        """The parameters after the last step: name -> new array. Collective; the model has them, too, afterwards."""
        with self._call("parameters"):
            self._gather("parameters")
            return {name: w.copy() for name, w in self.model.parameters.items()}

    def synchronize(self) -> None:
        """Wait until all ranks have come here; every rank's model has the parameters then. Collective."""
        with self._call("synchronize"):
            self._gather("synchronize")

    def leave(self) -> None:
        """Make no more steps on this rank. It still serves its shard, and takes part in collective calls.

        The ranks of a split replica leave together, after the same step.
        """
        self._left = True

    def free(self) -> None:
        """Wait until all ranks have come here, and end. Collective. At exit it is done for those who have not."""
        if self._freed:
            return
        with self._call("free"):
            self._freed = True
            atexit.unregister(_finish)
            self._post(Kind.FINISHED)
            self._until(lambda: False)
            self._context.close()
            if self._split is not None:
                self._split.free()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent to others for steps."""
        return self._service.nbytes_sent

    @property
    def records(self) -> list[PortionRecord]:
        """Who computed which portion, and when: the last 65,536. Rank 0 knows; the list is empty elsewhere."""
        coordinator = self._service.coordinator
        return [] if coordinator is None else list(coordinator.records)

    def state_dict(self) -> dict[str, Any]:
        """All that another Sandblaster, on any number of ranks, needs to go on as this one would. Collective.

        ``parameters``, ``gradient``: 1-D float64, all parameters one after the other; ``s``, ``y``: (pairs, size)
        float64; ``gram``: their products; ``numbers``; ``batch``: the digest of the last step's samples; ``steps``.
        Equal on all ranks.
        """
        state: dict[str, Any] = self.together("state_dict", self.exchange_state)
        return state

    def exchange_state(self, comm: MPI.Intracomm) -> dict[str, Any]:
        """``state_dict``, while all ranks are in ``together``."""
        shard, coordinator = self._service.held.shard, self._service.coordinator
        mine = shard.w, shard.g, np.array(shard.s), np.array(shard.y)
        everyone = allgather(comm, mine, "Sandblaster.state_dict")
        history = None if coordinator is None else (coordinator.history, coordinator.batch, coordinator.steps)
        history, batch, steps = broadcast(comm, history, "Sandblaster.state_dict")
        w, g = (np.concatenate([each[i] for each in everyone]) for i in (0, 1))
        pairs = (len(shard.s), self._size)
        s, y = (np.concatenate([each[i] for each in everyone], axis=-1).reshape(pairs) for i in (2, 3))
        return {
            "parameters": w,
            "gradient": g,
            "s": s,
            "y": y,
            "gram": history.gram.copy(),
            "numbers": {name: getattr(history, name) for name in NUMBERS},
            "batch": batch,
            "steps": steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the Sandblaster would that ``state`` was taken of, on however many ranks. Collective.

        Raises ValueError on all ranks when it is of other parameters or another ``memory``.
        """
        where = "Sandblaster.load_state_dict"

        def load(comm: MPI.Intracomm) -> None:
            jointly(comm, where, lambda: require_state(state, self._size, self.optimizer), (ValueError,))
            engine.undisturbed(lambda: self._take(state))

        with self._call("load_state_dict"):
            self._calls.together("load_state_dict", load)
            self.evaluations = state["numbers"]["evaluations"]
            self._gather("load_state_dict")

    def _take(self, state: Mapping[str, Any]) -> None:
        service, batch = self._service, tuple(state["batch"] or ())
        history = History(self.optimizer.memory, **state["numbers"], gram=np.array(state["gram"], np.float64))
        # Steps are counted from where they are: the ranks' numbers must not fall behind.
        service.ended = service.ended._replace(error=0, history=history.numbers, data=batch)
        rows = np.array([state["parameters"], state["gradient"], *state["s"], *state["y"]])
        service.held.load(self.rank, rows, service.ended.step)
        if service.coordinator is not None:
            service.coordinator.history, service.coordinator.batch = history, batch or None

    def together(self, function: str, exchange: Callable[[MPI.Intracomm], Any]) -> Any:
        """What ``exchange`` of those that are left returns, when all ranks have come to this call. Collective.

        It is made anew where a rank dies in the middle of it. ``function``: what the call is named in errors.
        """
        with self._call(function):
            return self._calls.together(function, exchange)

    def _gather(self, function: str) -> None:
        """Give all models the parameters."""

        def gather(comm: MPI.Intracomm) -> Any:
            return allgather(comm, self._service.held.shard.w.astype(self._dtype), f"Sandblaster.{function}")

        self._last = np.concatenate(self._calls.together(function, gather))
        self._fill(self._last)
        self._loaded = 0

    def _has_work(self) -> bool:
        """Whether there is a portion to compute whose parameters are here."""
        return self._service.has_work(self._service.point[0])

    def _compute(self, pieces: list[Any], samples: int) -> None:
        """Compute a portion, if there is one."""
        if not self._has_work():
            return
        begin = time.perf_counter()
        evaluation, values = self._service.point
        portion = self._service.take_portion(evaluation)
        if portion is None:  # the evaluation has ended meanwhile
            return
        self._load(evaluation, values)
        x, y = piece = pieces[portion]
        if self._split is None:
            loss, gradients = self.model.loss_and_gradients(x, y)
        else:
            loss, gradients = self._split.compute(portion, piece)
        share = len(x) / samples
        gradient = flat({name: gradients[name] for name in self.model.parameters}, self._dtype)
        if gradient.size != self._size:
            raise ValueError(f"Sandblaster.step: gradients have {gradient.size} values, parameters {self._size}")
        gradient *= share
        self._post(Kind.DONE, evaluation, (portion, share * float(loss), time.perf_counter() - begin), gradient)

    def _load(self, evaluation: int, values: Any) -> None:
        if self._loaded != evaluation:
            self._fill(values)
            self._loaded = evaluation

    def _fill(self, values: Any) -> None:
        """Give the model's parameters the values."""
        fill(self.model.parameters, values)
        if self._split is not None:
            self._split.renew()

    def _post(self, kind: Kind, serial: int = 0, numbers: tuple[float, ...] = (), gradient: Any = None) -> None:
        self._service.outbox.append((kind, serial, numbers, gradient))

    def _until(self, there: Callable[[], bool]) -> None:
        """Wait for something that the service brings, or for its end."""
        if there():
            return
        self._service.awaiting = True
        try:
            engine.drive(_Wait(self._job, there))  # type: ignore[arg-type]
        finally:
            self._service.awaiting = False
        if self._job.done and self._job.error is not None:
            raise self._job.error

    @contextlib.contextmanager
    def _call(self, name: str) -> Generator[None]:
        """Around a call: one thread at a time, and none after ``free`` or an error of the service."""
        if not self._calling.acquire(blocking=False):
            raise RuntimeError(f"Sandblaster.{name}: another thread is in one of its calls")
        try:
            if self._freed:
                raise RuntimeError(f"Sandblaster.{name}: it has been freed")
            if self._job.done and self._job.error is not None:
                raise self._job.error
            yield
        except DeadRankError:
            self._fill(self._last)
            raise
        finally:
            self._calling.release()

    def __reduce__(self) -> Any:
        raise uncopyable(self, "use state_dict()")


class _Wait:
    """A wait for ``there``, or the job's end, as the engine drives one."""

    def __init__(self, job: Any, there: Callable[[], bool]) -> None:
        self._job, self._there = job, there
        self.error = None

    @property
    def done(self) -> bool:
        return self._job.done or self._there()


def _finish(job: weakref.ref[Sandblaster]) -> None:
    """At exit: stay until all ranks have come to their end. Others may still use this rank's shard."""
    found = job()
    if found is not None and not found._freed:
        with contextlib.suppress(Exception):
            found.free()
