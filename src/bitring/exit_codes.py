"""The commands' exit codes: one table, which help and documentation show and batch scripts decide by."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Numbers with their ``meaning``. A signal that ends the process is 128 + its number in a shell."""

    DONE = 0, "done, or complete already"
    FAILED = 1, "failed: training diverged, a checkpoint could not be written, a rank raised an error or died"
    USAGE = 2, "refused: a mistake in the arguments, or in what they name"
    SAVED = 75, "ended by SIGTERM or SIGUSR1, nothing is lost: run it again, as it says"
    INTERRUPTED = 130, "ended by Ctrl-C"

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        """A number that explains itself."""
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code
