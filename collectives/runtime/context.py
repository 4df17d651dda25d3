"""Context of a communicator, kept by bitring: a private duplicate, and the jobs and caches that use it.

It hangs on the communicator as an MPI attribute: made at the first collective call, shared by every library that uses
bitring on the communicator, freed with it. Nothing is keyed by address or handle.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.library_steps import NoCommunicatorError, allgather_steps, beside
from bitring.collectives.interop.mpi_library import library_version
from bitring.collectives.interop.steps import Progress, Steps, StepsTo, wait_for
from bitring.collectives.node.node_group import NodeGroup, make_node_group
from bitring.collectives.runtime import ending
from bitring.collectives.runtime.abort import abort_on_exception
from bitring.collectives.runtime.agreement import Request, agree
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.job_queue import JobQueue
from bitring.collectives.runtime.ports import ports
from bitring.collectives.runtime.rank_numbers import numbers_in
from bitring.collectives.runtime.roll_call import node_roll_call, nodes_roll_call
from bitring.collectives.runtime.turn import Turn, Turns
from bitring.collectives.runtime.watch import gone_in_words
from bitring.collectives.schedules.topology import Topology
from bitring.collectives.selection.table import BUILT_IN, load_table, path_of_table
from bitring.errors import DeadRankError, MismatchError
from bitring.launcher import alone_by_mistake, launched_rank, thread_share
from bitring.native import extension, native

logger = logging.getLogger("bitring")


class Context:
    """``queue`` runs the communicator's jobs; ``plans`` counts the plans created, the same on all ranks.

    The choice of an algorithm depends on ``topology`` and on ``table``, rank 0's measured one; ``shared`` is the
    group of this node's ranks. Before ``prepare`` nothing is known and nothing shared, identically on all ranks.
    ``node`` is the context of the ranks of this node, those that share memory; ``nodes`` the ranks of each node.
    """

    def __init__(self, comm: MPI.Intracomm, made: MPI.Request | None, rank: int, places: Sequence[int]) -> None:
        """``comm`` is private to bitring; ``made`` the request that makes it, if it is not there yet.

        ``places``: the ranks' numbers in MPI.COMM_WORLD.
        """
        self.queue = JobQueue(comm, made, rank, places)
        self.rank = rank
        size = len(places)
        self.size = size
        self.plans = 0
        self.cache: dict[Any, Any] = {}
        self.choices: dict[Any, tuple[Any, bool]] = {}
        """The algorithm chosen for each kind of call, and whether it is the library's own call."""
        self.kept: dict[str, Any] = {}
        """Objects that users of bitring's plans keep with the communicator, by name; communicators are freed, too."""
        self.topology = Topology(size)
        self.table = BUILT_IN
        self.shared: NodeGroup | None = None
        self.roll_call: Any = None
        """The native one of all ranks; None without the native engine."""
        self.fast_path_serves = False  # it has been told what it may do
        self.direct: Any = None  # the fast path of ``bitring.allreduce``, when there is one
        self.node = self
        self.nodes = [list(range(size))]
        self._parts: dict[str, MPI.Intracomm] = {}
        self._spare: MPI.Intracomm | None = None
        self._turns = Turns(self)
        self._prepared = size == 1

    @property
    def comm(self) -> MPI.Intracomm:
        """The private duplicate; nobody else's messages travel in it."""
        return self.queue.comm

    def turn(self, function: str, continues: bool = False) -> Turn:
        """For ``with``: a call that has a place in the communicator's order. Calls may be made of others.

        Entering raises RuntimeError while another thread is in one. ``continues``: this thread has begun it by the
        native way past the engine.
        """
        return Turn(self._turns, function, continues)

    def exchanged(self) -> None:
        """Say that this turn's call has nothing more to exchange: an interrupt from now on is this rank's alone."""
        self._turns.exchanged()

    def refuse(self, function: str, error: Exception) -> None:
        """Let the other ranks hear that this one cannot make the call, ``function``, that is its turn's."""
        self._turns.tell(Request(function, error=error))

    def new_plan(self) -> int:
        """The number of the next plan, from 1."""
        self.plans += 1
        return self.plans

    @property
    def common(self) -> NodeGroup | None:
        """The group of all ranks; None when they are not all on one node."""
        return self.shared if self.topology.nodes == 1 else None

    @property
    def leaders(self) -> MPI.Intracomm:
        """The first ranks of all nodes; COMM_NULL on the other ranks. Collective when first asked for."""
        return self._part("the first ranks of all nodes", 0 if self.node.rank == 0 else MPI.UNDEFINED)

    @property
    def lane_comm(self) -> MPI.Intracomm:
        """The ranks of all nodes with this rank's number in its node; COMM_NULL where a node has none so numbered.

        Collective when first asked for.
        """
        number = self.node.rank
        return self._part("the lanes between nodes", number if number < self.topology.lanes else MPI.UNDEFINED)

    def _part(self, what: str, color: int) -> MPI.Intracomm:
        if what not in self._parts:
            request = Request(f"a communicator of {what}")

            def split(progress: Progress) -> StepsTo[MPI.Intracomm]:
                yield from agree(self.comm, self.roll_call, request, progress)
                return (yield from beside(lambda: MPI.Intracomm(self.comm.Split(color)), progress))

            self._parts[what] = self.queue.call(split, request.function)
        return self._parts[what]

    def spare(self, progress: Progress) -> StepsTo[MPI.Intracomm]:
        """Another private duplicate, for calls that the library may refuse on some ranks; made when first needed."""
        if self._spare is None:
            comm, made = self.comm.Idup()
            try:
                yield from wait_for(made, progress)
            except MPI.Exception as error:  # on all ranks alike
                raise NoCommunicatorError(error.Get_error_code()) from error
            comm.Set_errhandler(MPI.ERRORS_RETURN)
            self._spare = MPI.Intracomm(comm)
        return self._spare

    def drop_spare(self) -> None:
        """Some ranks are a call ahead in the spare duplicate: it is of no use any more, nor can it be freed."""
        self._spare = None

    def prepare(self, function: str, error: Exception | None = None) -> None:
        """Find out where the ranks are, and make what those of a node share. Collective and blocking; once.

        ``function``: the call that errors name. ``error``: this rank's bad arguments, which all ranks raise.
        """
        if not self._prepared:
            request = Request(function, error=error)
            self.queue.call(lambda progress: self._preparation(progress, request), function)

    def _preparation(self, progress: Progress, request: Request) -> Steps:
        # Another rank's first call may be one that does not prepare.
        yield from agree(self.comm, self.roll_call, request, progress)
        progress.exchanging = True  # nothing comes of it unless all ranks come to its end
        table = load_table(path_of_table()).of(library_version()) if self.rank == 0 else BUILT_IN
        mine = table, native() is not None, os.sched_getaffinity(0)
        everyone = yield from allgather_steps(self.comm, mine, progress)
        self.table, engines = everyone[0][0], all(native for _, native, _ in everyone)
        part = yield from beside(lambda: node_of(self.comm), progress)
        node = Context(part, None, part.Get_rank(), numbers_in(MPI.COMM_WORLD, part))
        mates = yield from allgather_steps(part, self.rank, progress)
        found: list[list[int]] = yield from allgather_steps(self.comm, mates, progress)
        nodes = [ranks for rank, ranks in enumerate(found) if ranks[0] == rank]
        fewest, most = min(map(len, nodes)), max(map(len, nodes))
        if engines:
            extension.limit_threads(thread_share([everyone[rank][2] for rank in mates], node.rank))
            if len(mates) > 1:
                extension.set_neighbours(True)
        shared = (yield from make_node_group(part, mates, progress)) if engines and most > 1 else None
        everywhere = all((yield from allgather_steps(self.comm, shared is not None, progress)))
        self.node, self.nodes = node, nodes
        self.topology = Topology(self.size, len(nodes), fewest, everywhere, engines)
        if shared is not None and everywhere:
            self.shared = self.queue.shared = shared
        if engines:
            self._call_roll()
        self.choices.clear()
        self._prepared = True
        progress.exchanging = False

    def _call_roll(self) -> None:
        """Make what ranks find out by whether they mean the same, and the way past the engine."""
        if self.common is not None:
            way = node_roll_call(self.common)
        elif self.topology.nodes > 1:
            nodes = [[rank] for rank in range(self.size)] if self.shared is None else self.nodes
            way = nodes_roll_call(self.comm, self.shared, nodes)
            self.queue.place = way.roll_call.place
        else:  # on one node that has no room to share
            return
        self.roll_call = way.roll_call
        self.queue.fast_path = extension.FastPath(
            way.allreduce, way.others, self.rank, self.size, np.ndarray, MPI.IN_PLACE
        )
        if self.common is not None:
            self.common.fast_path = self.queue.fast_path

    def part(self) -> None:
        """Find out, before the end, whether calls that did not wait for all ranks were the same. Collective.

        Raises MismatchError where they were not.
        """
        if self.roll_call is None or not self.roll_call.repeating:
            return
        request = Request("Free")
        try:
            with contextlib.suppress(RuntimeError), self.turn("Free"):  # which a useless communicator raises
                self.queue.call(lambda progress: agree(self.comm, self.roll_call, request, progress), "Free")
        except MismatchError as error:  # ranks that are not in Free wait in vain for this one from now on
            self.queue.cut_short("Free", error, told=str(error))
            raise

    def close(self) -> None:
        """Free everything. Collective, as freeing a communicator is."""
        self.cache.clear()
        kept = [each for each in self.kept.values() if isinstance(each, MPI.Comm)]
        self.kept.clear()
        for part in (*kept, *self._parts.values(), self._spare):
            if part is not None and part != MPI.COMM_NULL:
                part.Free()
        if self.node is not self:
            self.node.close()
        self.queue.close()
        self.shared = self.roll_call = self.direct = None


class KeepsDirect:
    """A communicator that has its context's ``direct`` at hand; to look that up takes as long as a small call."""

    direct: Any = None


def node_of(comm: MPI.Intracomm) -> MPI.Intracomm:
    """The ranks of ``comm`` that share memory with this one. Collective, by a call of the library's that blocks."""
    return MPI.Intracomm(comm.Split_type(MPI.COMM_TYPE_SHARED))


@functools.cache
def _keyval() -> int:
    def delete(comm: MPI.Comm, keyval: int, context: Context) -> None:
        context.close()

    return MPI.Comm.Create_keyval(delete_fn=delete)


@functools.cache
def _warn_if_alone() -> None:
    """Warn once, on the first of several processes that were started together, each with a world of its own."""
    mistake = alone_by_mistake(MPI.COMM_WORLD.Get_size(), library_version())
    if mistake is not None and launched_rank() == 0:
        logger.warning(mistake)


def given_comm(comm: MPI.Intracomm | None, function: str) -> MPI.Intracomm:
    """``comm``, MPI.COMM_WORLD for None. Raises TypeError, naming ``function``, for anything else."""
    if comm is None:
        return MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{function}: comm must be an MPI.Intracomm such as MPI.COMM_WORLD; got {type(comm).__name__}")
    return comm


def context_of(comm: MPI.Intracomm) -> Context:
    """The communicator's context, made on first use; collective then."""
    context = comm.Get_attr(_keyval())
    if context is None:
        context = _first_context_of(comm)
    assert isinstance(context, Context)
    return context


def finish_making(comm: MPI.Intracomm) -> None:
    """Before ``comm`` is freed: what its first collective has asked of the library comes to its end.

    Raises MismatchError where ranks' last calls were not the same, which some do not wait to hear.
    """
    context = comm.Get_attr(_keyval()) if comm != MPI.COMM_NULL else None
    if isinstance(context, Context):
        context.queue.before_free()
        context.part()


def check_alive(comm: MPI.Intracomm, function: str) -> list[int]:
    """The ranks' numbers in MPI.COMM_WORLD; to be called before the first message of a communicator.

    Raises DeadRankError, naming ``function``, when it is known that a rank has died or left the job.
    """
    places = numbers_in(MPI.COMM_WORLD, comm)
    if len(places) > 1:
        engine.hear()
        gone = ports().gone(places, left=True)
        if gone:
            engine.bereaved = True
            raise DeadRankError(f"{function}: {gone_in_words(gone)}", gone)
    return places


_first_use = threading.RLock()


def _first_context_of(comm: MPI.Intracomm) -> Context:
    with _first_use:
        context = comm.Get_attr(_keyval())
        if context is None:
            engine.check("the first collective of a communicator")
            abort_on_exception()
            _warn_if_alone()
            places = check_alive(comm, "the first collective of a communicator")
            # Nonblocking: a nonblocking collective may be the first, and ranks may come to it in different orders.
            private, made = MPI.Intracomm(comm).Idup()
            if comm.Get_size() == 1:
                made.Wait()  # nobody to wait for; and plans of one rank run no job that would
            context = Context(private, made, comm.Get_rank(), places)
            comm.Set_attr(_keyval(), context)
        assert isinstance(context, Context)
        return context


_Method = TypeVar("_Method", bound=Callable[..., Any])


def one_call(function: str) -> Callable[[_Method], _Method]:
    """A decorator: the method, of something that has a ``comm``, is one call of that communicator, a ``Context.turn``.

    So no other thread's call comes between those that the method is made of.
    """

    def decorated(method: _Method) -> _Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with context_of(self.comm).turn(function):
                return method(self, *args, **kwargs)

        return cast(_Method, call)

    return decorated


ending.register()
