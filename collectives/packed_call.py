"""A Bcast whose buffer only the MPI library reads, made one of plain memory to and from which the library copies.

For one that the other ranks make without asking first: they cannot hear that this one needs the library's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.call import Call
from bitring.collectives.interop.opaque import Opaque
from bitring.collectives.plan import HOST
from bitring.collectives.runtime.agreement import Request
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.tags import PACKED_TAG


def packed_bcast(context: Context, buf: Any, told: Opaque, root: int) -> Callable[[Call], Call] | None:
    """The call as one of plain memory; None where nobody can tell how many bytes that is."""
    if told.nbytes is None:
        return None
    nbytes, comm, rank = told.nbytes, context.comm, context.rank

    def packed(call: Call) -> Call:
        work = np.empty(nbytes, np.uint8)

        def copied(source: Any, target: Any) -> Callable[[], None]:
            return lambda: comm.Sendrecv(source, rank, PACKED_TAG, target, rank, PACKED_TAG)

        terms = {"nbytes": nbytes, "order": "C", "root": root, "algorithm": call.algorithm, "memory": HOST}
        return replace(
            call,
            request=Request(call.request.function, terms),
            work=work,
            before=copied(buf, [work, MPI.BYTE]) if rank == root else None,
            after=copied([work, MPI.BYTE], buf) if rank != root else None,
            packed=None,
        )

    return packed
