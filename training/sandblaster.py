"""Sandblaster: a batch method on all ranks, by a coordinator that holds no parameters (Dean et al., NIPS 2012).

Every rank computes gradients of small portions of the batch, as many as it gets done; every rank holds a shard of the
parameters and of L-BFGS's vectors; rank 0 decides, by numbers alone. What belongs together:

- ``lbfgs``, ``line_search``: the method, which yields commands; ``coordinator``: who does what next
- ``portions``: which portion goes to whom; ``sum_tree``: sums that do not depend on that
- ``whole_batch``: a batch cut into portions; ``shard``: the vectors; ``sandblaster_service``: a rank's messages and
  shard, beside its computing
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

from bitring.collectives.interop.steps import Progress, StepsTo, wait_for
from bitring.collectives.runtime.context import Context, context_of, given_comm
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.job_queue import numbers_in
from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import agreed_job, allgather, broadcast
from bitring.errors import MismatchError, uncopyable
from bitring.settings import Range, checked
from bitring.training.coordinator import ERRORS, Kind, PortionRecord
from bitring.training.lbfgs import LBFGS, History
from bitring.training.sandblaster_service import Service
from bitring.training.shard import Shard, held_by
from bitring.training.whole_batch import cut, digest

NUMBERS = ("pairs", "loss", "step", "slope", "iterations", "evaluations", "restarts")
"""Of L-BFGS's history, in a state."""


class Sandblaster:
    """Train ``model`` by L-BFGS on all ranks of ``comm``. Making it is collective, and so are all calls but ``step``.

    model: a ``bitring.Model``, or what has its ``parameters`` (name -> NumPy array, all of one floating dtype) and
    ``loss_and_gradients(x, y)`` (the mean loss, and name -> gradient). Rank 0's parameters are taken. optimizer:
    ``bitring.LBFGS``. portions: into so many parts a batch is cut (fewer where it has fewer samples). backups: whether
    ranks without work compute copies of portions that others have not finished.

    Equal arguments give equal parameters to the bit, whatever the number of ranks, their speed, and ``backups``,
    provided that the model's arithmetic is the same on all of them. Each rank holds about (2·memory + 4) / p float64
    vectors of the parameters' size beside the replica. Messages and shards are served by the progress thread, which
    needs MPI.THREAD_MULTIPLE; below it a rank serves the others only while it is in one of the calls.
    """

    def __init__(
        self,
        model: Any,
        optimizer: LBFGS,
        *,
        comm: MPI.Intracomm | None = None,
        portions: int = 64,
        backups: bool = True,
    ) -> None:
        self.comm = given_comm(comm, "Sandblaster")
        outer = context_of(self.comm)
        self.model = model
        self._size, self._dtype = jointly(
            self.comm, "Sandblaster", lambda: _checked(model, optimizer, portions, backups), (TypeError, ValueError)
        )
        self.optimizer, self.portions, self.backups = optimizer, int(portions), bool(backups)
        shapes = [(name, w.shape) for name, w in model.parameters.items()]
        mine = {
            "parameters": str(shapes),
            "dtype": self._dtype.name,
            "optimizer": optimizer,
            "portions": portions,
            "backups": backups,
        }
        for rank, theirs in enumerate(allgather(self.comm, mine, "Sandblaster")):
            for key, value in theirs.items():
                if value != mine[key] or type(value) is not type(mine[key]):
                    raise MismatchError(f"Sandblaster: {key} is {value} on rank {rank}, {mine[key]} on another")
        self._fill(broadcast(self.comm, _flat(model.parameters, self._dtype), "Sandblaster"))
        private = agreed_job(outer, lambda progress: _duplicate(outer, progress), "Sandblaster")
        self._context = Context(private, None, outer.rank, numbers_in(MPI.COMM_WORLD, private))
        self.rank, self.size = outer.rank, outer.size
        held = _flat(model.parameters, self._dtype)[held_by(self.rank, self.size, self._size)]
        shard = Shard(held, optimizer.memory, self.rank, self.size, self._size)
        self._service = Service(self._context, shard, self._size, self._dtype, optimizer.memory, self.backups)
        self._job = self._context.queue.submit(self._service.steps, "Sandblaster")
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
        a rank has died.
        """
        with self._call("step"):
            if self._left:
                raise RuntimeError("Sandblaster.step: this rank has left")
            pieces = cut("Sandblaster.step", x, y, self.portions)
            samples = sum(len(piece[0]) for piece in pieces)
            data = float(len(pieces)), *digest(pieces if y is None else [(x, y)])
            step = self.steps + 1
            self._post(Kind.READY, step, data)
            try:
                while step not in self._service.over:
                    self._until(lambda: step in self._service.over or self._has_work())
                    self._compute(pieces, samples)
            except BaseException:
                self._post(Kind.GIVES_UP, step)
                raise
            return self._end(step, data)

    def _end(self, step: int, data: tuple[float, ...]) -> float:
        """The step's result, when it is over."""
        service = self._service
        message = service.over.pop(step)
        kind, loss, point, evaluations, *theirs = message.numbers
        self.steps, self.evaluations = step, int(evaluations)
        if kind:
            raise ERRORS[int(kind) - 1](message.payload.tobytes().decode())
        if tuple(theirs) != data:
            raise MismatchError(f"Sandblaster.step: rank {self.rank} gave other samples in step {step} than another")
        self._until(lambda: service.point[0] >= point)
        evaluation, flat = service.point
        if evaluation == point:
            self._load(evaluation, flat)
        return float(loss)

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
        """Make no more steps on this rank. It still serves its shard, and takes part in collective calls."""
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
        with self._call("state_dict"):
            self._meet("state_dict")
            shard, coordinator = self._service.shard, self._service.coordinator
            mine = shard.w, shard.g, np.array(shard.s), np.array(shard.y)
            everyone = allgather(self.comm, mine, "Sandblaster.state_dict")
            history = None if coordinator is None else (coordinator.history, coordinator.batch, coordinator.steps)
            history, batch, steps = broadcast(self.comm, history, "Sandblaster.state_dict")
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
        with self._call("load_state_dict"):
            self._meet("load_state_dict")
            jointly(self.comm, "Sandblaster.load_state_dict", lambda: self._check_state(state), (ValueError,))
            shard, coordinator = self._service.shard, self._service.coordinator
            mine = held_by(self.rank, self.size, self._size)
            shard.w[:], shard.g[:] = state["parameters"][mine], state["gradient"][mine]
            shard.s = [row[mine].copy() for row in state["s"]]
            shard.y = [row[mine].copy() for row in state["y"]]
            # Steps are counted from where they are: the ranks' numbers must not fall behind.
            if coordinator is not None:
                gram = np.array(state["gram"], np.float64)
                coordinator.history = History(self.optimizer.memory, **state["numbers"], gram=gram)
                batch = state["batch"]
                coordinator.batch = None if batch is None else tuple(batch)
            self.evaluations = state["numbers"]["evaluations"]
            self._gather("load_state_dict")

    def _check_state(self, state: Mapping[str, Any]) -> None:
        where = "Sandblaster.load_state_dict"
        for key in ("parameters", "gradient", "s", "y", "gram", "numbers", "batch", "steps"):
            if key not in state:
                raise ValueError(f"{where}: state has no {key!r}")
        if np.shape(state["parameters"]) != (self._size,):
            raise ValueError(f"{where}: state has {np.size(state['parameters'])} parameters, the model {self._size}")
        wanted = (2 * self.optimizer.memory + 1,) * 2
        if np.shape(state["gram"]) != wanted:
            raise ValueError(f"{where}: state is of memory {len(state['gram']) // 2}, not {self.optimizer.memory}")

    def _meet(self, function: str) -> None:
        """Wait until all ranks have come here: none is in a step from then on."""
        service = self._service
        service.all_here = None
        self._post(Kind.HERE)
        self._until(lambda: service.all_here is not None)
        ended = (service.all_here or [0])[1:]
        if ended:
            raise RuntimeError(f"Sandblaster.{function}: ranks {ended} have freed it, or have ended")

    def _gather(self, function: str) -> None:
        """Give all models the parameters."""
        self._meet(function)
        parts = allgather(self.comm, self._service.shard.w.astype(self._dtype), f"Sandblaster.{function}")
        self._fill(np.concatenate(parts))
        self._loaded = 0

    def _has_work(self) -> bool:
        """Whether there is a portion to compute whose parameters are here."""
        assigned, service = self._service.assigned, self._service
        with contextlib.suppress(IndexError):
            while assigned[0][0] < service.latest:
                assigned.popleft()
            return bool(assigned[0][0] == service.point[0])
        return False

    def _compute(self, pieces: list[Any], samples: int) -> None:
        """Compute a portion, if there is one."""
        if not self._has_work():
            return
        begin = time.perf_counter()
        evaluation, flat = self._service.point
        try:
            of, portion = self._service.assigned.popleft()
        except IndexError:  # the evaluation has ended meanwhile
            return
        if of != evaluation:
            return
        self._load(evaluation, flat)
        x, y = pieces[portion]
        loss, gradients = self.model.loss_and_gradients(x, y)
        share = len(x) / samples
        gradient = _flat({name: gradients[name] for name in self.model.parameters}, self._dtype)
        if gradient.size != self._size:
            raise ValueError(f"Sandblaster.step: gradients have {gradient.size} values, parameters {self._size}")
        gradient *= share
        self._post(Kind.DONE, evaluation, (portion, share * float(loss), time.perf_counter() - begin), gradient)

    def _load(self, evaluation: int, flat: Any) -> None:
        if self._loaded != evaluation:
            self._fill(flat)
            self._loaded = evaluation

    def _fill(self, flat: Any) -> None:
        """Give the model's parameters the values."""
        first = 0
        for w in self.model.parameters.values():
            w[...] = flat[first : first + w.size].reshape(w.shape)
            first += w.size

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


def _checked(model: Any, optimizer: Any, portions: Any, backups: Any) -> tuple[int, Any]:
    """The number of the model's values, and their dtype."""
    if not isinstance(optimizer, LBFGS):
        raise TypeError(f"Sandblaster: optimizer must be bitring.LBFGS; got {type(optimizer).__name__}")
    checked("Sandblaster", "portions", portions, int, Range(least=1))
    checked("Sandblaster", "backups", backups, bool)
    parameters = getattr(model, "parameters", None)
    if not isinstance(parameters, Mapping) or not parameters or not hasattr(model, "loss_and_gradients"):
        raise TypeError(
            f"Sandblaster: model must have parameters, a dict of arrays, and loss_and_gradients; "
            f"got {type(model).__name__}"
        )
    for name, w in parameters.items():
        if not isinstance(w, np.ndarray) or w.dtype not in (np.float32, np.float64):
            kind = w.dtype if isinstance(w, np.ndarray) else type(w).__name__
            raise TypeError(f"Sandblaster: parameter {name!r} must be a NumPy array of float32 or float64; got {kind}")
    dtypes = {w.dtype for w in parameters.values()}
    if len(dtypes) > 1:
        raise TypeError(f"Sandblaster: parameters must be of one dtype; got {sorted(map(str, dtypes))}")
    return sum(w.size for w in parameters.values()), dtypes.pop()


def _duplicate(context: Context, progress: Progress) -> StepsTo[MPI.Intracomm]:
    private, made = context.comm.Idup()
    yield from wait_for(made, progress)
    private.Set_errhandler(MPI.ERRORS_RETURN)
    return MPI.Intracomm(private)


def _flat(arrays: Mapping[str, Any], dtype: Any) -> Any:
    """All values, one array after the other, in a new array."""
    return np.concatenate([np.asarray(x, dtype).reshape(-1) for x in arrays.values()])
