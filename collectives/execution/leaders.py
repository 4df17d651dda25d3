"""Small collectives across nodes in the messages of a roll call, by the native engine."""

from __future__ import annotations

from bitring.arrays import Array
from bitring.collectives.execution.runner import Task
from bitring.collectives.interop.operators import op_name, ufunc_name
from bitring.collectives.interop.steps import Progress, Steps, run
from bitring.collectives.runtime.context import Context
from bitring.native import address_of, extension, kernel


class LeadersRunner:
    """A collective on the ranks' buffers."""

    scratch_nbytes = 0

    def __init__(self, context: Context, task: Task) -> None:
        assert context.roll_call is not None
        flat, op = task.flat, task.op
        self._roll_call = context.roll_call
        self._signature = task.signature
        self._collective = extension.Collective[task.collective]
        self._root = task.root
        moves = task.collective in ("broadcast", "allgather")
        self._kernel = 0 if moves else kernel(ufunc_name(op, flat.dtype), flat.dtype)
        assert moves or self._kernel, f"no kernel for {op_name(op)} of {flat.dtype}"
        self._stride = flat.size // context.size if task.collective in ("allgather", "reduce_scatter") else 0
        own = context.rank * self._stride * flat.itemsize
        self._source_offset = own if task.collective == "allgather" else 0
        self._target_offset = own if task.collective == "reduce_scatter" else 0
        leads = context.node.rank == 0
        rounds = (context.topology.nodes - 1).bit_length() if leads or not context.topology.shared else 0
        self.nbytes_sent = flat.nbytes * (rounds + context.node.size - 1)
        self.bind(flat)

    def bind(self, buffer: Array) -> None:
        """See Runner."""
        self._buffer, address = buffer, address_of(buffer)
        self.operation: extension.LeadersCollective | None = extension.LeadersCollective(
            self._roll_call,
            self._signature,
            self._collective,
            address + self._source_offset,
            address + self._target_offset,
            buffer.size,
            buffer.itemsize,
            self._kernel,
            self._root,
            self._stride,
        )

    def signed(self, signature: int) -> extension.LeadersCollective:
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
