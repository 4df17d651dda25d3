"""A table of parameters that all ranks read and update at their own pace (Bösen; Wei et al., SoCC 2015).

What belongs together in ``training/store``: ``rule``, when updates are applied and reads are served; ``table``, where
values live: ``messages`` by messages, ``shared`` in the memory of a node, with ``members``; ``making`` takes one of
them; ``layout`` and ``shard``, who has what; ``owner`` and ``service``, what a rank does for others, and
``native_service``, without the interpreter, and ``copied_service``, with ``lines``, where shards outlive ranks, of
which ``serving`` takes one; ``service_job``, which is waited for; ``codec``, what travels encoded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.context import given_comm
from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.errors import MismatchError, NonFiniteError, uncopyable
from bitring.settings import Range, checked
from bitring.training.optimizer import Optimizer, optimizers, require_gradients
from bitring.training.step.checks import checked_parameters, chosen, not_finite, text_of
from bitring.training.store.farewell import at_the_end
from bitring.training.store.making import make_table
from bitring.training.store.rows import checked_rows, distinct, summed
from bitring.training.store.rule import Terms
from bitring.training.store.table import Setup, Update


class ParameterStore:
    """Values that all ranks of ``comm`` share, in shards. Collective, as are ``synchronize`` and ``free``.

    ``parameters``: name -> NumPy array of float16, bfloat16, float32 or float64, or a list; rank 0's values are taken,
    and the arrays are left alone: ``get`` gives the store's values. ``optimizer``: a name or an instance; it runs where
    a shard is, on each gradient that comes, and keeps its slots there. ``staleness``: s of bounded staleness (stale
    synchronous parallel; Ho et al., 2013), None: no read waits. ``servers``: so many ranks, the first ones, have
    shards; None: all. ``cache``: rows that this rank has got before are given again without a message, as long as the
    staleness allows it and this rank has not updated them since: fewer bytes, and values that are as old as they may
    be. Without a staleness, and in the memory of one node, where a read sends nothing, it does nothing. ``copies``: 1
    has another rank keep a copy of each shard, so that the others go on when a rank dies: it has left then, and what it
    had pushed counts, of its last update perhaps on some shards only. Until both ranks that have a shard have died.

    A member's clock begins at 0. With staleness s a ``get`` at own clock c sees all updates of its own, and everybody's
    of clocks 0 to c − s − 1; it may see more. No rank is more than s + 1 clocks ahead of the slowest.

    A rank serves the others whenever it waits in bitring, whatever for; with MPI.THREAD_MULTIPLE also while it
    computes. Below that level others wait for a rank that computes.

    Raises on all ranks: TypeError or ValueError where a rank's arguments are bad, PeerError on the others;
    MismatchError where ranks' arguments differ.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any] | Sequence[Any],
        optimizer: Optimizer | str,
        *,
        comm: MPI.Intracomm | None = None,
        staleness: int | None = None,
        servers: int | None = None,
        cache: bool = False,
        copies: int = 0,
    ) -> None:
        self.comm = given_comm(comm, "ParameterStore")
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        error: Exception | None = None
        values: dict[str, Any] = {}
        mine: dict[str, str] = {}
        try:
            values = _checked_values(parameters)
            self.optimizer: Optimizer = chosen("optimizer", optimizer, optimizers, Optimizer, "ParameterStore")
            require_gradients(self.optimizer, "ParameterStore: optimizer")
            self.terms = Terms(staleness=_checked_or_none("staleness", staleness, 0))
            servers = _checked_or_none("servers", servers, 1)
            cache = checked("ParameterStore", "cache", cache, bool)
            copies = checked("ParameterStore", "copies", copies, int, Range(least=0, most=1))
            mine = {
                "parameters": str({name: (w.dtype.name, w.shape) for name, w in values.items()}),
                "optimizer": text_of(self.optimizer),
                "staleness": str(staleness),
                "servers": str(servers),
                "cache": str(cache),
                "copies": str(copies),
            }
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        raise_everywhere(self.comm, "ParameterStore", error)
        for rank, theirs in enumerate(allgather(self.comm, mine, "ParameterStore")):
            for key, value in mine.items():
                if theirs[key] != value:
                    raise MismatchError(f"ParameterStore: {key} is {theirs[key]} on rank {rank}, {value} on another")
        values = broadcast(self.comm, values, "ParameterStore")
        self._like = {name: np.empty(0, w.dtype).reshape(0, *w.shape[1:]) for name, w in values.items()}
        self._shapes = {name: w.shape for name, w in values.items()}
        setup = Setup(
            self.comm, "ParameterStore", values, self.optimizer, self.terms, servers, cache=cache, copies=copies
        )
        self._table = make_table(setup)
        self._calling = threading.Lock()
        self._clock = 0
        self._freed = False
        at_the_end(self._table, self)

    def get(self, rows: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Name -> new array, of all parameters.

        ``rows``: name -> 1-D integers, in any order, of rows (along the first dimension) of these parameters; only they
        travel, and the result has only them, in the order given. Waits as ``staleness`` has it. Allowed after
        ``leave``, too; it does not wait then.
        """
        with self._call("get"):
            if rows is None:
                return self._table.pull()
            wanted: dict[str, Any] = {}
            back: dict[str, Any] = {}
            for name, given in checked_rows(rows, self._shapes, "ParameterStore.get").items():
                wanted[name], back[name] = distinct(given)
            pulled = self._table.pull(wanted)
            return {name: values if back[name] is None else values[back[name]] for name, values in pulled.items()}

    def inc(self, gradients: Mapping[str, Any], rows: Mapping[str, Any] | None = None) -> None:
        """Hand gradients to the store's optimizer: w ← w − lr·g for SGD. Not divided by the number of ranks.

        ``gradients``: name -> array like the parameter, of some parameters or all. ``rows``: name -> 1-D integers, the
        rows that the gradient of that name is for, of shape (rows, ...); only they travel, and the optimizer sees only
        them. Gradients of a row that is named more than once are added. They are only read, and may be changed
        afterwards.

        Does not wait for its application. Raises TypeError or ValueError for what does not match the parameters,
        NonFiniteError for NaN or Inf, RuntimeError after ``leave``; nothing is applied then.
        """
        where = "ParameterStore.inc"
        with self._call("inc"):
            if self._clock < 0:
                raise RuntimeError(f"{where}: this rank has left")
            taken = checked_rows(rows or {}, self._shapes, where)
            arrays = self._checked(gradients, taken, where)
            if arrays and (bad := not_finite(arrays)) is not None:
                raise NonFiniteError(f"{where}: the gradient of {bad} on rank {self.rank}")
            for name, given in taken.items():
                taken[name], arrays[name] = summed(given, arrays[name])
            contiguous = {name: np.require(g, requirements=("C", "ALIGNED")) for name, g in arrays.items()}
            self._table.push(Update(contiguous, taken))

    def clock(self) -> None:
        """This rank's clock moves on by one; its updates from now on are of the new clock.

        Waits where this rank would be more than ``staleness`` + 1 clocks ahead of the slowest. Raises RuntimeError
        after ``leave``.
        """
        with self._call("clock"):
            if self._clock < 0:
                raise RuntimeError("ParameterStore.clock: this rank has left")
            self._table.wait_for_slowest()
            self._table.tick()

    def claim(self, row: tuple[int, ...]) -> int:
        """The next number, from 0 on, of a row of numbers, each of which one rank gets; see ``bitring.claimed``."""
        with self._call("claim"):
            return self._table.claim(row)

    def leave(self) -> None:
        """This rank makes no more updates: its clock counts as infinite, and nobody waits for it.

        It may still ``get``, ``synchronize`` and ``free``, and serves its shard.
        """
        with self._call("leave"):
            self._clock = -1
            self._table.leave()

    def synchronize(self) -> dict[str, Any]:
        """Wait for all ranks; all updates are applied then, and every rank gets the same values. Collective.

        Who waits here holds nobody back. Afterwards all clocks are as far as the furthest was, but for those who have
        left. Ranks that have freed the store, or ended, are not waited for.
        """
        with self._call("synchronize"):
            return self._table.settle()

    def free(self) -> None:
        """Wait for all ranks, and end. Collective. At exit it is done for those who have not."""
        with self._call("free", again=True):
            self._freed = True
            self._table.free()

    @property
    def clocks(self) -> list[float]:
        """Every rank's clock, as far as this one knows; infinite for those who have left."""
        return self._table.clocks

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent to others for the store."""
        return self._table.nbytes_sent

    def telemetry(self) -> dict[str, Any]:
        """What this rank has done and waited for since the store was made.

        ``wait_seconds`` of its calls, and ``waited_for``: rank -> seconds of these that were for it; of its shard's
        updates ``applied``, how many, and their ``staleness``: versions between a rank's last read and its update ->
        how many. With a cache ``cached_rows``, how many rows it has given.
        """
        return self._table.counts()

    def __enter__(self) -> ParameterStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._freed:
            self.leave()

    def __reduce__(self) -> Any:
        raise uncopyable(self, "get() has its values")

    def _checked(self, gradients: Any, rows: Mapping[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(gradients, Mapping):
            raise TypeError(f"{where}: gradients must be a dict of arrays, got {type(gradients).__name__}")
        for name in (*gradients, *rows):
            if name not in self._shapes:
                raise ValueError(f"{where}: {name!r} is no parameter; known: {', '.join(self._shapes)}")
        arrays: dict[str, Any] = {}
        for name, given in gradients.items():
            shape, dtype = self._shapes[name], self._like[name].dtype
            if name in rows:
                shape = (len(rows[name]), *shape[1:])
            g = np.asarray(given)
            if g.shape != shape or g.dtype != dtype:
                raise ValueError(
                    f"{where}: the gradient of {name!r} must be {dtype.name} of shape {shape}, "
                    f"got {g.dtype.name} of shape {g.shape}"
                )
            arrays[name] = g
        for name in rows:
            if name not in arrays:
                raise ValueError(f"{where}: rows names {name!r}, of which gradients has none")
        return arrays

    @contextlib.contextmanager
    def _call(self, name: str, again: bool = False) -> Generator[None]:
        """Around a call: one thread at a time, and none after ``free`` but one that may come ``again``."""
        if not self._calling.acquire(blocking=False):
            raise RuntimeError(f"ParameterStore.{name}: another thread is in one of its calls")
        try:
            if self._freed and not again:
                raise RuntimeError(f"ParameterStore.{name}: it has been freed")
            yield
        finally:
            self._calling.release()


def _checked_values(parameters: Any) -> dict[str, Any]:
    """Copies, C-contiguous."""
    found = checked_parameters(parameters, "ParameterStore", written=False)
    for name, w in found.items():
        if not isinstance(w, np.ndarray):
            raise TypeError(f"ParameterStore: parameters: {name!r} must be in host memory, got a device array")
    return {name: np.array(w, order="C") for name, w in found.items()}


def _checked_or_none(name: str, value: Any, least: int) -> Any:
    return None if value is None else checked("ParameterStore", name, value, int, Range(least=least))
