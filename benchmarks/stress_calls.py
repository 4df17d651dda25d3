"""One call of a stress run: made on a communicator, and its result held against what it must be.

A call's arguments, good or bad, and the values that each rank gives follow from the ``Call`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from stress_steps import Call


class Arena:
    """A communicator in use. ``comm`` is a bitring.Communicator, or one of mpi4py's own where ``raw``."""

    def __init__(self, comm: Any, raw: bool) -> None:
        from mpi4py import MPI

        import bitring

        self.raw = MPI.Intracomm(comm)
        self.comm = self.raw if raw else bitring.Communicator(self.raw)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.plans: list[tuple[Any, Any]] = []
        self._ours: dict[str, Any] = {}

    def communicator(self, algorithm: str) -> Any:
        """A Communicator of it, the same one each time."""
        import bitring

        if algorithm not in self._ours:
            self._ours[algorithm] = bitring.Communicator(self.raw, algorithm)
        return self._ours[algorithm]

    def make_plans(self) -> None:
        """Those that are kept. Collective when first called."""
        import numpy as np

        import bitring

        kinds: tuple[dict[str, Any], ...] = ({}, {"algorithm": "ring"}, {"compression": "onebit"}, {"algorithm": "mpi"})
        for options in () if self.plans else kinds:
            x = np.zeros(100, np.float32)
            self.plans.append((bitring.plan_allreduce(x, comm=self.comm, **options), x))

    def free(self) -> None:
        """Collective."""
        self.plans.clear()
        self._ours.clear()
        self.raw.Free()


class Calls:
    """One rank's calls. ``side``: a communicator of mpi4py's, of the same ranks."""

    def __init__(self, side: Any) -> None:
        from mpi4py import MPI

        self._side, self._rank = side, side.Get_rank()
        self._sums = MPI.Op.Create(_add, commute=True)

    def outcome(self, arena: Arena, call: Call) -> str:
        """What comes of the call."""
        return outcome(lambda: self.make(arena, call))

    def make(self, arena: Arena, call: Call) -> str:
        """The call, to its end: "right", or what is wrong with the sum."""
        return self.begin(arena, call, beside=False)()

    def begin(self, arena: Arena, call: Call, beside: bool) -> Callable[[], str]:
        """Begin the call; what is returned waits for it. ``beside``: a plan that is kept is started."""
        import numpy as np
        from mpi4py import MPI

        import bitring

        if call.bad == "shape":
            arena.communicator("auto").empty((-1,), call.dtype)
        elif call.function == "empty" and call.bad:
            arena.communicator("auto").empty(3, object)
        rank, size, ours = arena.rank, arena.size, arena.communicator(call.algorithm)
        name = call.function
        blocks = size if name == "Reduce_scatter_block" else 1
        everyone = [values(call, r, blocks) for r in range(size)]
        x, op = everyone[rank], self._sums if call.op == "user" else getattr(MPI, call.op)
        total = reduced(call, everyone)
        root = 99 if call.bad == "root" else call.root % size
        algorithm = "unknown" if call.bad == "algorithm" else call.algorithm

        def buffer(like: Any, filled: bool) -> Any:
            y: Any = like.copy(order="K") if filled else np.zeros_like(like)
            if call.bad == "swapped":
                y = y.astype(y.dtype.newbyteorder())
            elif call.bad == "object":
                y = np.array([object()] * 3, object)
            elif call.bad == "strided":
                y = np.zeros(2 * y.size, y.dtype)[::2]
            elif call.bad == "short":
                y = y.reshape(-1)[:-1]
            elif call.bad == "list":
                y = [[1, 2], [3]]
            elif call.bad == "nan":
                y[0] = np.nan
            if call.bad == "read_only":
                y.flags.writeable = False
            return y

        def right(got: Any, want: Any, nearly: bool = False) -> str:
            same = np.allclose(got, want, rtol=1e-3) if nearly else np.array_equal(got, want)
            return "right" if same else f"wrong: {np.ravel(got)[:5]}, not {np.ravel(want)[:5]}"

        if name in ("Allreduce", "Iallreduce", "persistent"):
            y = buffer(x, call.in_place)
            send = MPI.IN_PLACE if call.in_place else x
            if name == "Allreduce":
                ours.Allreduce(send, y, op)
                return lambda: right(y, total)
            if name == "Iallreduce":
                request = ours.Iallreduce(send, y, op)
                return lambda: (self._wait(request, call.mixed), right(y, total))[1]

            def runs() -> str:
                persistent, said = ours.Allreduce_init(send, y, op), ""
                for _ in range(2):
                    if call.in_place:
                        y[...] = x
                    persistent.Start()
                    persistent.Wait()
                    said = right(y, total)
                persistent.Free()
                return said

            return runs
        if name in ("plan", "started", "compressed"):
            y = buffer(x, filled=True)

            def planned() -> str:
                options: dict[str, Any] = {"compression": "onebit"} if name == "compressed" else {"op": op}
                plan, said = bitring.plan_allreduce(y, comm=arena.comm, algorithm=algorithm, **options), ""
                for _ in range(2):
                    y[...] = x
                    if call.bad == "nan":
                        y[0] = np.nan
                    if name == "started":
                        plan.start()
                        plan.wait()
                    else:
                        plan()
                    said = right(y, total, name == "compressed")
                if call.in_place:
                    plan.free()
                return said

            return planned
        if name == "kept":
            plan, y = arena.plans[call.index]
            if not plan.started:
                y[:] = rank + 1
            if beside:
                plan.start()
            return lambda: (plan.wait() if plan.started else plan(), right(y, size * (size + 1) / 2, True))[1]
        if name in ("Allgather", "Iallgather"):
            whole = np.stack(everyone)
            y = buffer(np.zeros_like(whole), False)
            send = MPI.IN_PLACE if call.in_place else x
            if call.in_place and not call.bad:
                y[rank] = x
            request = getattr(ours, name)(send, y)
            return lambda: (request is None or self._wait(request, False), right(y, whole))[1]
        if name == "empty":
            shared = ours.empty(call.shape, call.dtype)
            shared[...] = x
            ours.Allreduce(MPI.IN_PLACE, shared, op)
            return lambda: right(shared, total)
        if name == "trainer":
            w = np.zeros_like(x)

            def train() -> str:
                trainer = bitring.DataParallel({"w": w}, bitring.SGD(lr=1.0), comm=arena.comm)
                trainer.step({"w": buffer(x, filled=True)})
                trainer.free()
                return right(-w * size, total, True)

            return train
        return lambda: self._blocking(ours, arena, call, x, op, root, algorithm, buffer, right, everyone)

    def _blocking(
        self,
        ours: Any,
        arena: Arena,
        call: Call,
        x: Any,
        op: Any,
        root: int,
        algorithm: str,
        buffer: Any,
        right: Any,
        everyone: Any,
    ) -> str:
        import numpy as np
        from mpi4py import MPI

        import bitring

        rank, total = arena.rank, reduced(call, everyone)
        if call.function == "allreduce":
            y = buffer(x, call.in_place)
            mean: Any = "yes" if call.bad == "mean" else call.mean
            out = bitring.allreduce(
                y if call.in_place else x, y, op=op, comm=arena.comm, algorithm=algorithm, mean=mean
            )
            return right(out, total / arena.size if call.mean else total, call.mean)
        if call.function == "Reduce":
            y = buffer(x, call.in_place)
            send = MPI.IN_PLACE if call.in_place and rank == root else x
            ours.Reduce(y if call.bad == "list" else send, y, op, root)
            return right(y, total) if rank == root else "right"
        if call.function == "Bcast":
            y = buffer(x, rank == root)
            ours.Bcast(y, root)
            return right(y, everyone[root])
        block = slice(rank * x.size // arena.size, (rank + 1) * x.size // arena.size)
        y = buffer(x if call.in_place else x[block], call.in_place)
        ours.Reduce_scatter_block(MPI.IN_PLACE if call.in_place else x, y, op)
        return right(np.ravel(y)[: block.stop - block.start], total[block])

    def _wait(self, request: Any, mixed: bool) -> None:
        from mpi4py import MPI

        if not mixed:
            request.Wait()
            return
        import numpy as np

        x = np.zeros(1)
        beside = self._side.Irecv(x, self._rank, 7), self._side.Isend(np.ones(1), self._rank, 7)
        MPI.Request.Waitall([beside[0], request, beside[1]])


def _add(a: Any, b: Any, datatype: Any) -> None:
    import numpy as np

    np.frombuffer(b, np.float64)[:] += np.frombuffer(a, np.float64)


def values(call: Call, rank: int, blocks: int = 1) -> Any:
    """What rank ``rank`` gives: small whole numbers."""
    import numpy as np

    if call.function == "compressed":
        return np.full(call.shape, rank + 1, call.dtype)
    shape = (call.shape[0] * blocks, *call.shape[1:])
    x = (np.arange(math.prod(shape)) * 7 + rank * 3) % 4 + 1
    return np.array(x.reshape(shape), call.dtype, order=call.order)  # type: ignore[call-overload]


def reduced(call: Call, everyone: Sequence[Any]) -> Any:
    """What becomes of all ranks' values."""
    import numpy as np

    reduce = {"SUM": np.sum, "user": np.sum, "PROD": np.prod, "MAX": np.max, "MIN": np.min}[call.op]
    return reduce(np.stack(everyone).astype("f8"), axis=0).astype(call.dtype)


def outcome(call: Callable[[], str]) -> str:
    """What ``call`` returns, or its error."""
    try:
        return call()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
