"""Kernels are compiled by one rank of a node; the others load what it left in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpi4py import MPI

from bitring.collectives.agreement import Request
from bitring.collectives.plan import run_agreement
from bitring.collectives.state import State


def once_a_node(node: MPI.Intracomm, compile_kernels: Callable[[], None]) -> None:
    """Call ``compile_kernels`` on the first rank of ``node``, then on the others. Collective."""
    for turn in (True, False):
        if turn == (node.Get_rank() == 0):
            compile_kernels()
        everyone = node.Ibarrier()
        while not everyone.Test():
            time.sleep(0.001)  # a library's own barrier would spin on the core that compiles


def compile_together(state: State, compile_kernels: Callable[[], None]) -> None:
    """``once_a_node`` on every node, for a plan. What it raises on one rank is raised on all. Collective."""
    request = Request("plan_allreduce")

    def compile_or_tell() -> None:
        try:
            compile_kernels()
        except Exception as error:  # the other ranks wait for their turn, and must not go on without this one
            request.error = error

    once_a_node(state.node.comm, compile_or_tell)
    run_agreement(state, request)
