"""Ctrl-C held back for a moment: what has begun comes to its end."""

from __future__ import annotations

import contextlib
import threading

# The same as the signal module's, without its conversions to enums, which take as long as the update of a small model.
from _signal import getsignal, signal  # type: ignore[import-not-found]
from collections.abc import Callable
from signal import SIGINT
from types import FrameType, TracebackType
from typing import Any

_SIGINT = int(SIGINT)
_ALREADY = contextlib.nullcontext()


class HeldBack:
    """For ``with``: a Ctrl-C meanwhile has its effect at the end, or in ``release``, which ends the holding back.

    Elsewhere than in the main thread none can come.
    """

    __slots__ = ("_handler", "came")

    def __init__(self) -> None:
        self._handler: Any = None
        self.came: tuple[int, FrameType | None] | None = None
        """The last that was held back: its number, and where it came."""

    def __enter__(self) -> None:
        self.came = None
        if threading.get_ident() == threading.main_thread().ident:
            handler = getsignal(_SIGINT)
            if callable(handler):
                self._handler = handler
                signal(_SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = number, frame

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def holds(self) -> bool:
        """Whether one would be held back now."""
        return self._handler is not None

    def again(self) -> None:
        """Hold it back again, if it is no more."""
        if self._handler is None:
            self.__enter__()

    def anyway(self) -> contextlib.AbstractContextManager[None]:
        """For ``with``: hold back, whether this does or not."""
        return _ALREADY if self.holds else HeldBack()

    def except_for_errors(self, work: Callable[[], None]) -> None:
        """Call ``work``; where it raises, what comes after is not held back: a Ctrl-C that came is raised instead."""
        try:
            work()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """From here on a Ctrl-C has its effect at once."""
        handler, self._handler = self._handler, None
        if handler is not None:
            signal(_SIGINT, handler)
            if self.came is not None:
                handler(*self.came)
