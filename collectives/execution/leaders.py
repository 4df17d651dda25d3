"""Small collectives across nodes in the messages of a roll call, by the native engine."""

from __future__ import annotations

from bitring.arrays import Array
from bitring.collectives.execution.runner import Task
from bitring.collectives.interop.operators import op_name, ufunc_name
from bitring.collectives.interop.steps import Progress, Steps, run
from bitring.collectives.runtime.context import Context
from bitring.native import address_of, extension, kernel


class LeadersRunner:
    """A collective on the ranks' buffers, as the AllReduce that it is a part of.

    What moves values, and reduces none, is an AllReduce of bits: each rank gives its own, and zeros for the rest.
    """

    scratch_nbytes = 0

    def __init__(self, context: Context, task: Task) -> None:
        assert context.roll_call is not None
        flat, op, n = task.flat, task.op, task.flat.size
        self._roll_call = context.roll_call
        self._signature = task.signature
        self._own = 0, n
        ufunc = ufunc_name(op, flat.dtype)
        if task.collective == "broadcast":
            self._own, ufunc = (0, n if context.rank == task.root else 0), "bitwise_or"
        elif task.collective == "allgather":
            self._own, ufunc = (n * context.rank // context.size, n * (context.rank + 1) // context.size), "bitwise_or"
        self._kernel = kernel(ufunc, flat.dtype)
        assert self._kernel, f"no kernel for {op_name(op)} of {flat.dtype}"
        leads = context.node.rank == 0
        rounds = (context.topology.nodes - 1).bit_length() if leads or not context.topology.shared else 0
        self.nbytes_sent = flat.nbytes * (rounds + context.node.size - 1)
        self.bind(flat)

    def bind(self, buffer: Array) -> None:
        """See Runner."""
        self._buffer = buffer
        self.operation: extension.LeadersAllreduce | None = extension.LeadersAllreduce(
            self._roll_call, self._signature, address_of(buffer), buffer.size, buffer.itemsize, self._kernel, *self._own
        )

    def signed(self, signature: int) -> extension.LeadersAllreduce:
        """See SelfCheckingRunner."""
        assert self.operation is not None
        self.operation.sign(signature)
        return self.operation

    def unbind(self) -> None:
        """See Runner."""
        self._buffer = self.operation = None

    def steps(self, progress: Progress) -> Steps:
        """See Runner."""
        yield from run(self.signed(self._signature), progress)

    def close(self) -> None:
        """See Runner."""
