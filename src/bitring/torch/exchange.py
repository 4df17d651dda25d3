"""An exchange: the buckets of one step, whose sums over all ranks are begun strictly in order and end together."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from bitring.collectives.communicator import Communicator
from bitring.errors import NonFiniteError
from bitring.torch.bucket import Bucket, Entry, make_buckets
from bitring.torch.tensors import all_finite
from bitring.training.step.bucket_sizes import OVERLAP_BYTES
from bitring.waited import Waited

OnDone = Callable[[BaseException | None], None]


class Exchange:
    """Sums over the ranks of ``comm`` of values like ``entries``. Collective, as are the steps.

    A step: ``begin``, ``load`` for each bucket in order, ``finish``; ``take_part`` instead of what is left where this
    rank has given up. ``undo`` takes back what the step has changed in what plans carry from step to step.
    """

    def __init__(self, comm: Communicator, entries: Sequence[Entry], algorithm: str, bucket_bytes: int) -> None:
        self.entries = list(entries)
        self.buckets = make_buckets(comm, entries, algorithm, bucket_bytes)
        self.nbytes = sum(bucket.flat.nbytes for bucket in self.buckets)
        self.compressed = any(bucket.compressed for bucket in self.buckets)
        self.begun = 0
        """Number of buckets loaded in this step."""
        self._ended = 0

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others so far."""
        return sum(bucket.plan.bytes_sent for bucket in self.buckets)

    def free(self) -> None:
        """Free the plans."""
        for bucket in self.buckets:
            bucket.plan.free()

    def begin(self) -> None:
        """A new step begins: from here on ``undo`` takes changes back."""
        self.begun = self._ended = 0
        for bucket in self.buckets:
            if bucket.compressed:
                bucket.plan.mark()

    def load(self, gradients: Sequence[Any], scale: float, start: bool, on_done: OnDone | None = None) -> None:
        """Fill the next bucket, see ``Bucket.load``; ``start``: its run begins now, beside the caller.

        ``on_done``: as ``Plan.start`` has it.
        """
        bucket = self.buckets[self.begun]
        bucket.load(gradients, scale)
        self._send(bucket, start, on_done)

    def _send(self, bucket: Bucket, start: bool, on_done: OnDone | None = None) -> None:
        bucket.leave()
        self.begun += 1  # before what can fail: others wait for this run, and hear why it cannot begin
        if start:
            bucket.plan.start(on_done)

    def finish(self) -> None:
        """Wait for the sums of all buckets that were loaded, which are in the views then.

        Raises the first thing that went wrong, on all ranks alike, when all have ended. Where some are compressed, NaN
        or Inf in any is a NonFiniteError.
        """
        failure: Exception | None = None
        while self._ended < self.begun:
            bucket = self.buckets[self._ended]
            self._ended += 1
            try:
                bucket.plan.wait() if bucket.plan.started else bucket.plan()
                bucket.arrive()
                if self.compressed and not bucket.compressed and not all_finite([bucket.tensor]):
                    raise NonFiniteError(f"the mean of the gradients of {', '.join(bucket.names)} holds NaN or Inf")
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def take_part(self, seconds: float) -> bool:
        """Run what is left of a step that this rank has given up, with zeros: the others wait for it.

        What comes of it is of no use. Whether it was over within ``seconds``.
        """
        waited = Waited()
        with contextlib.suppress(Exception):  # whatever it is, the other ranks have it, too
            while self.begun < len(self.buckets):
                self.buckets[self.begun].tensor.zero_()
                self._send(self.buckets[self.begun], start=True)
        for bucket in self.buckets[self._ended : self.begun]:
            with contextlib.suppress(Exception):
                if not bucket.plan.started:
                    bucket.plan.start()
                while bucket.plan.started and not math.isinf(seconds) and not bucket.plan.test():
                    if waited.look() > seconds:
                        return False
                    time.sleep(1e-4)
                if bucket.plan.started:
                    bucket.plan.wait()
        self._ended = self.begun
        return True

    def undo(self) -> None:
        """Take back what runs have changed since ``begin`` in what the plans carry from run to run."""
        for bucket in self.buckets:
            if bucket.compressed:
                bucket.plan.undo()


def overlap_pays(exchange: Exchange, nodes: int) -> bool:
    """Whether exchanging beside back-propagation is worth waking another thread for."""
    return nodes > 1 or exchange.nbytes >= OVERLAP_BYTES
