"""The MPI library's own collectives, under the name ``mpi``.

There is no schedule: the call is handed on. Rounds and bytes are whatever the library chooses.
"""

from __future__ import annotations

from bitring.collectives.schedules.schedule import Algorithm


class Mpi(Algorithm):
    """The library's own call for every collective."""

    def chunks(self, size: int) -> int:
        """The buffer is handed over whole."""
        return 1
