"""Where the ranks of a communicator are, as far as a choice of algorithm depends on it."""

from __future__ import annotations

from typing import NamedTuple


class Topology(NamedTuple):
    """Where the ranks of a communicator are; the same on all of them.

    ``lanes``: ranks of the smallest node. ``shared``: the ranks of each node share memory. ``native``: all ranks run
    the native engine. Zero nodes: not known yet.
    """

    size: int
    nodes: int = 0
    lanes: int = 0
    shared: bool = False
    native: bool = False
