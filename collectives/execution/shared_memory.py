"""AllReduce through the memory that all ranks share, by the native engine."""

from __future__ import annotations

from bitring.arrays import Array
from bitring.collectives.execution.runner import Task
from bitring.collectives.interop.operators import op_name, ufunc_name
from bitring.collectives.interop.steps import Progress, Steps, run
from bitring.collectives.runtime.context import Context
from bitring.native import address_of, extension, kernel


class SharedRunner:
    """The reduction of the ranks' buffers through their shared memory."""

    scratch_nbytes = 0

    def __init__(self, context: Context, task: Task) -> None:
        assert context.common is not None
        flat, op = task.flat, task.op
        self._shared = context.common
        self._kernel = kernel(ufunc_name(op, flat.dtype), flat.dtype)
        assert self._kernel, f"no kernel for {op_name(op)} of {flat.dtype}"
        self._signature = task.signature
        small = flat.nbytes <= extension.SharedAllreduce.small(context.size)
        self.nbytes_sent = (context.size - 1) * flat.nbytes // (1 if small else context.size) * (1 if small else 2)
        self.bind(flat)

    def bind(self, buffer: Array) -> None:
        """See Runner."""
        self._buffer = buffer
        self.operands = [(address_of(buffer), buffer.size, buffer.itemsize, self._kernel)]
        self.operation: extension.SharedAllreduce | None = self.signed(self._signature)

    def signed(self, signature: int) -> extension.SharedAllreduce:
        """See SelfCheckingRunner."""
        region = self._shared.region_of(self._buffer)
        return extension.SharedAllreduce(self._shared.node, signature, self.operands, region)

    def unbind(self) -> None:
        """See Runner."""
        self._buffer = self.operation = None

    def steps(self, progress: Progress) -> Steps:
        """See Runner."""
        yield from run(self.operation, progress)

    def close(self) -> None:
        """See Runner."""
