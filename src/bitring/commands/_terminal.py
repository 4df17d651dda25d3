"""Whether somebody is watching."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

_LAUNCHERS = {"mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun"}
_DAEMONS = {"prted", "orted", "hydra_pmi_proxy", "hydra_bstrap_proxy"}
"""A launcher's part on another host, whose output goes through the network."""


def terminal_width() -> int | None:
    """Columns of the terminal that shows this process's output, or None when it goes to a file or a log.

    A rank's own output goes to its launcher, through a pipe or, with Open MPI, through a terminal that nobody sees;
    the launcher passes it on, so its output counts.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        pid = os.getppid()
        away = False
        while pid > 1:
            process = Path(f"/proc/{pid}")
            name = (process / "comm").read_text().strip()
            away |= name in _DAEMONS
            if name in _LAUNCHERS:
                with open(process / "fd" / "1", "rb", buffering=0) as output:
                    # A terminal that does not know its size has 0 columns.
                    return (os.get_terminal_size(output.fileno()).columns or 80) if output.isatty() else None
            pid = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        if away:
            return None
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
