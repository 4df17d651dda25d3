"""One thread at a time in a communicator's calls.

MPI asks for it: collectives of one communicator happen in one order, the same on all ranks, and threads have none. A
thread that enters a call while another is inside is refused at once. Its call takes its place in the communicator's
order all the same, after the one that is under way: there all ranks learn of it, and none uses the communicator on,
since nobody can tell which of their calls were meant for each other. The progress thread takes jobs further beside
the caller and is not meant: only calls that have a place in the order are, not waits for what was started.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

from bitring.collectives.runtime.agreement import Request, agree
from bitring.collectives.runtime.engine import engine

if TYPE_CHECKING:
    from bitring.collectives.runtime.context import Context


class Turns:
    """The thread that is inside a communicator's calls. Runs past the engine note it in ``native.FastPath``."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._thread = 0  # the one inside; 0: none
        self._call = ""
        self._depth = 0  # calls are made of others
        self._before = 0  # jobs that the queue had when it came
        self._refused: Request | None = None

    def enter(self, call: str, continues: bool) -> None:
        """Begin ``call``, which ``continues`` a run past the engine.

        Raises RuntimeError while another thread is inside, and when the communicator is unusable.
        """
        me, queue = threading.get_ident(), self._context.queue
        with self._lock:
            if queue.broken or (queue.contact is not None and queue.contact.difference):
                queue.check(call)
            fast_path = queue.fast_path
            if fast_path is not None and fast_path.inside == me:
                fast_path.taken_over()
                if not continues:
                    queue.cut_short("a run", KeyboardInterrupt())
                    queue.check(call)
            if self._thread == me:
                self._depth += 1
                return
            inside, doing = self._thread, self._call
            if not inside:
                queue.occupy(me)  # from now on no other thread begins anything past the engine
                if fast_path is not None and fast_path.refuse():
                    inside, doing = fast_path.inside, fast_path.doing
                    queue.occupy(0)
            if not inside:
                self._thread, self._call, self._depth, self._before = me, call, 1, queue.count
                return
            error = RuntimeError(
                f"{call}: {_name(me)} called it while {_name(inside)} was in {doing} on the same communicator; one "
                "thread at a time: let them take turns, or give each its own, as comm.Dup() makes"
            )
            self._refused = Request(call, error=error, refused=True)
        raise error

    def leave(self, error: BaseException | None) -> None:
        """End the call; whoever was refused meanwhile takes part as such in what all ranks do next.

        An ``error`` that is an interrupt, between two jobs of the call, ends the communicator: others may be in the
        second one. A job that is left goes on.
        """
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            queue = self._context.queue
            refused, self._refused = self._refused, None
            try:
                interrupted = error is not None and not isinstance(error, Exception)
                if interrupted and queue.count > self._before and not queue.jobs:
                    queue.cut_short(self._call, error)
                if refused is not None:
                    self.tell(refused)
            finally:
                self._thread = 0
                queue.occupy(0)

    def exchanged(self) -> None:
        """Say that the call has nothing more to exchange: an interrupt from now on is this rank's alone."""
        self._before = self._context.queue.count

    def tell(self, request: Request) -> None:
        """Take part in what all ranks do next as one that cannot make the call; nobody here waits for it."""
        context, queue = self._context, self._context.queue
        if context.size == 1 or queue.broken:
            return
        what = f"{request.function}, which was refused"
        job = queue.last_word = queue.submit(lambda p: agree(context.comm, context.roll_call, request, p), what)
        if request.refused:
            queue.breaks(f"two threads were in its calls at the same time: {request.error}")
        if not engine.start_thread():
            engine.drive(job)


class Turn:
    """A call under way, for ``with``."""

    __slots__ = ("_continues", "_function", "_turns")

    def __init__(self, turns: Turns, function: str, continues: bool) -> None:
        self._turns = turns
        self._function = function
        self._continues = continues

    def __enter__(self) -> None:
        self._turns.enter(self._function, self._continues)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.leave(error)


def _name(ident: int) -> str:
    names = [thread.name for thread in threading.enumerate() if thread.ident == ident]
    return f"thread {names[0]!r}" if names else f"thread {ident}"
