"""One collective call without a plan, as this rank understands it: a value, which says what is to be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI

from bitring.arrays import Array
from bitring.collectives.interop.operators import op_name, require_defined, require_op
from bitring.collectives.plan import HOST, library_reduces, memory_name
from bitring.collectives.runtime.agreement import Request
from bitring.collectives.selection.selection import check_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """``collective`` by ``algorithm`` on ``work``, a 1-D array, under ``op``, from or to ``root``.

    ``request``: what ranks agree on. ``work`` is None where only the MPI library reads this rank's arguments;
    ``sendbuf`` and ``recvbuf`` are what its call is given. ``plain``, handed what does ``before``, returns arrays
    instead that it cannot refuse. ``before`` copies to ``work``, ``after`` from there. ``own`` says whether bitring has
    the operation on these values, ``library`` whether the MPI library has it. ``packed`` makes the same call of plain
    memory, where only the library reads the arguments but can copy them there.
    """

    request: Request
    collective: str
    algorithm: str
    root: int = 0
    op: MPI.Op = field(default_factory=lambda: MPI.SUM)
    work: Array | None = None
    sendbuf: Any = None
    recvbuf: Any = None
    plain: Callable[[Callable[[], None]], tuple[Any, Any]] | None = None
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None
    own: bool = True
    library: bool = True
    packed: Callable[[Call], Call] | None = None


def read_call(function: str, collective: str, algorithm: str, read: Callable[[], dict[str, Any]]) -> Call:
    """The call of ``function`` with the fields of ``read``, of which ``terms`` must be identical on all ranks.

    What it raises is kept for the agreement, so that all ranks raise.
    """
    request, fields = Request(function), dict[str, Any]()
    try:
        check_name(algorithm, function)
        fields = read()
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        request.error = error
    work, terms = fields.get("work"), fields.pop("terms", {})
    request.library = work is None and request.error is None
    if request.error is None:
        memory = HOST if work is None else memory_name(work)
        request.terms = {**terms, "algorithm": algorithm, "memory": memory}
    return Call(request=request, collective=collective, algorithm=algorithm, **fields)


def operation(op: MPI.Op, work: Array, function: str) -> dict[str, Any]:
    """The fields that say who can reduce ``work`` under ``op``. Raises TypeError when nobody can."""
    require_op(op, function)
    own, library = op_name(op) != "user", library_reduces(work, op)
    if own:
        require_defined(op, work.dtype, function)
    elif not library:
        raise TypeError(
            f"{function}: op must be a predefined operation for {work.dtype} in {memory_name(work)}; "
            "got one made by MPI.Op.Create"
        )
    return {"op": op, "own": own, "library": library}
