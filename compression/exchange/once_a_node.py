"""Kernels are compiled by one rank of a node; the others load what it left in the cache."""

from __future__ import annotations

from collections.abc import Callable

from bitring.collectives.plan import run_agreement
from bitring.collectives.runtime.agreement import Request
from bitring.collectives.runtime.context import Context

COMPILE_SECONDS = 600.0
"""Ranks wait so long for the one that compiles, whatever BITRING_TIMEOUT says: it is at work, or its death is seen."""


def once_a_node(context: Context, compile_kernels: Callable[[], None], function: str) -> None:
    """Call ``compile_kernels`` on the first rank of each node, then on the others. Collective.

    What it raises on one rank is raised on all; ``function`` is the caller's name.
    """
    context.prepare(function)
    for turn in (True, False):
        request = Request(function)
        if turn == (context.node.rank == 0):
            try:
                compile_kernels()
            except Exception as error:  # the other ranks wait, and must not go on without this one
                request.error = error
        # A wait that spins would be on the core that compiles.
        run_agreement(context, request, gentle=True, patience=COMPILE_SECONDS)
