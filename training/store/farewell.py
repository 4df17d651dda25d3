"""A rank that ends while others still use what it holds: it says farewell, and stays until they have ended, too."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable
from typing import Protocol

from bitring.collectives.runtime.abort import instead_of_abort
from bitring.collectives.runtime.engine import engine


class Ends(Protocol):
    """What has an end that is collective."""

    def leave(self) -> None:
        """Nobody waits for this rank any more."""
        ...

    def end(self) -> bool:
        """This rank does nothing more, and does not wait. Returns whether others need it all the same."""
        ...

    def free(self, waits: bool = True) -> None:
        """Stay until all others have ended; nothing is done where they have. ``waits``: that may time out."""
        ...

    @property
    def over(self) -> bool:
        """Whether it has ended on all ranks."""
        ...


def at_the_end(ends: Ends, of: object = None) -> Callable[[], None]:
    """Have ``ends`` freed at exit. After an exception that nobody catches this rank leaves, and no rank is ended.

    The others get a PeerError in whatever collective call this rank does not come to.
    ``of``: what a user has of it. Once it is dropped nobody calls it here: this rank has ended its part, but stays.
    None: it is kept until what is returned is called, when it is over.
    """

    def say(error: BaseException) -> bool:
        if ends.over:
            return False
        try:
            ends.leave()
        except Exception:  # what it says it by has ended
            return False
        for queue in list(engine.queues):
            if not any(job.serves for job in queue.jobs):
                queue.cut_short("a rank", error)
        return True

    def finish() -> None:
        with contextlib.suppress(Exception):
            ends.free(waits=False)

    def forget() -> None:
        instead_of_abort.remove(say)
        atexit.unregister(finish)

    def dropped() -> None:
        needed = False
        with contextlib.suppress(Exception):
            needed = ends.end()
        if not needed:
            forget()

    instead_of_abort.append(say)
    atexit.register(finish)
    if of is not None:
        weakref.finalize(of, dropped).atexit = False
    return forget
