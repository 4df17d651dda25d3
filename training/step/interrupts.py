"""Ctrl-C held back for a moment: what has begun comes to its end."""

from __future__ import annotations

import threading

# The same as the signal module's, without its conversions to enums, which take as long as the update of a small model.
from _signal import getsignal, signal  # type: ignore[import-not-found]
from signal import SIGINT
from types import FrameType, TracebackType
from typing import Any

_SIGINT = int(SIGINT)


class HeldBack:
    """For ``with``: a Ctrl-C meanwhile has its effect at the end, or in ``release``, which ends the holding back.

    Elsewhere than in the main thread none can come.
    """

    __slots__ = ("_came", "_handler")

    def __init__(self) -> None:
        self._handler: Any = None

    def __enter__(self) -> None:
        self._came: tuple[int, FrameType | None] | None = None
        if threading.current_thread() is threading.main_thread():
            handler = getsignal(_SIGINT)
            if callable(handler):
                self._handler = handler
                signal(_SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number, frame

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """From here on a Ctrl-C has its effect at once."""
        handler, self._handler = self._handler, None
        if handler is not None:
            signal(_SIGINT, handler)
            if self._came is not None:
                handler(*self._came)
