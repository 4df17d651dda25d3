"""Whether somebody is watching."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

_LAUNCHERS = {"mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun"}


def terminal_width() -> int | None:
    """Columns of the terminal that shows this process's output, or None when it goes to a file or a log.

    A rank's own output is a pipe to its launcher, which passes on what it reads, so the launcher's output counts.
    """
    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    with contextlib.suppress(OSError, ValueError, IndexError):
        pid = os.getppid()
        while pid > 1:
            process = Path(f"/proc/{pid}")
            if (process / "comm").read_text().strip() in _LAUNCHERS:
                with open(process / "fd" / "1", "rb", buffering=0) as output:
                    # A terminal that does not know its size has 0 columns.
                    return (os.get_terminal_size(output.fileno()).columns or 80) if output.isatty() else None
            pid = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return None
