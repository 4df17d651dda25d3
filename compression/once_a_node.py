"""Kernels are compiled by one rank of a node; the others load what it left in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpi4py import MPI


def once_a_node(node: MPI.Intracomm, compile_kernels: Callable[[], None]) -> None:
    """Call ``compile_kernels`` on the first rank of ``node``, then on the others. Collective."""
    for turn in (True, False):
        if turn == (node.Get_rank() == 0):
            compile_kernels()
        everyone = node.Ibarrier()
        while not everyone.Test():
            time.sleep(0.001)  # a library's own barrier would spin on the core that compiles
