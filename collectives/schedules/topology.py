"""Topology: the places of a communicator's ranks, as far as a choice of algorithm depends on them."""

from __future__ import annotations

from typing import NamedTuple


class Topology(NamedTuple):
    """The places of a communicator's ranks; identical on all of them.

    ``lanes``: ranks of the smallest node. ``shared``: the ranks of each node share memory. ``native``: all ranks run
    the native engine. Zero nodes: not known yet.
    """

    size: int
    nodes: int = 0
    lanes: int = 0
    shared: bool = False
    native: bool = False
