"""A communication hook for DistributedDataParallel: its buckets are averaged by bitring, exactly or compressed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.context import given_comm
from bitring.collectives.runtime.jointly import raise_everywhere
from bitring.compression.compressor import Compressor
from bitring.errors import uncopyable
from bitring.torch.bucket import Entry
from bitring.torch.exchange import Exchange
from bitring.torch.options import Options, device_of
from bitring.torch.residuals import Kept, give, take
from bitring.torch.tensors import array_dtype, memory_order


class CommHook:
    """The state of ``comm_hook``, for one DistributedDataParallel module: ``comm``'s ranks are the process group's.

    ``compression`` and ``algorithm`` are as ``GradientAverager`` has them; residuals follow the parameters when
    DistributedDataParallel makes its buckets anew, and are in ``state_dict``. Collective. Raises as
    ``GradientAverager`` does.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        compression: Compressor | str | None = None,
        *,
        algorithm: str = "auto",
    ) -> None:
        base = given_comm(comm, "CommHook")
        error: Exception | None = None
        try:
            self._options = Options(compression=compression, algorithm=algorithm)
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        raise_everywhere(base, "CommHook", error)
        self.comm = Communicator(base).Dup()
        self._exchanges: dict[tuple[str, ...], Exchange] = {}
        self._names: dict[int, tuple[str, Any]] = {}  # of parameters, in the order in which they were first seen
        self._kept = Kept()

    def __reduce__(self) -> Any:
        raise uncopyable(self, "make one in each process")

    @property
    def bytes_sent(self) -> int:
        """Payload bytes of gradients that this rank has sent to others, by the buckets that there are now."""
        return sum(exchange.bytes_sent for exchange in self._exchanges.values())

    def residuals(self) -> Kept:
        """What compressed exchanges carry from step to step. Collective."""
        kept = Kept()
        for exchange in self._exchanges.values():
            kept.add(take(self.comm, exchange))
        return kept

    def state_dict(self) -> dict[str, Any]:
        """What compressed exchanges carry, as tensors, for this rank alone: each rank keeps its own. Collective."""
        kept = self.residuals() if self._exchanges else self._kept
        return {
            "ranks": self.comm.Get_size(),
            "rank": self.comm.Get_rank(),
            "residual": _tensors(kept.residual),
            "owner_residual": _tensors(kept.owner_residual),
            "alike": _tensors(kept.alike),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the hook would that had this state on this rank, also before the first step. Collective.

        Parameters are told apart by the order in which DistributedDataParallel showed them first: it is to be made of
        the same model, in the same way. Raises ValueError on all ranks for a state of another rank.
        """
        mine = self.comm.Get_size(), self.comm.Get_rank()
        error = None
        if (state["ranks"], state["rank"]) != mine:
            text = f"rank {state['rank']} of {state['ranks']}, this is rank {mine[1]} of {mine[0]}"
            error = ValueError(f"CommHook.load_state_dict: the state is of {text}")
        raise_everywhere(self.comm, "CommHook.load_state_dict", error, alike=(ValueError,))
        self._kept = Kept(*(_arrays(state[kind]) for kind in ("residual", "owner_residual", "alike")))
        for exchange in self._exchanges.values():
            give(exchange, self._kept)

    def free(self) -> None:
        """Free plans, memory and communicator. Collective."""
        if self.comm == MPI.COMM_NULL:
            return
        for exchange in self._exchanges.values():
            exchange.free()
        self._exchanges.clear()
        self.comm.Free()

    def _name(self, p: Any) -> str:
        """A name that is the same on all ranks, as long as their buckets are."""
        return self._names.setdefault(id(p), (str(len(self._names)), p))[0]

    def exchange_for(self, parameters: list[Any]) -> Exchange:
        """The exchange of a bucket of these parameters, made when it is first seen. Collective then."""
        names = tuple(map(self._name, parameters))
        if names not in self._exchanges:
            taken = set(names)
            if any(taken & set(others) for others in self._exchanges):  # buckets were made anew
                self._kept = self.residuals()
                for exchange in self._exchanges.values():
                    exchange.free()
                self._exchanges.clear()
            entries = [
                Entry(
                    name,
                    array_dtype(p.dtype, "comm_hook: a parameter"),
                    tuple(p.shape),
                    memory_order(p),
                    device_of(p, "comm_hook"),
                    self._options.compressor_of(name, p.numel()),
                )
                for name, p in zip(names, parameters, strict=True)
            ]
            # In the bucket's own order: the sum is handed back as a whole.
            exchange = Exchange(self.comm, entries[::-1], self._options.algorithm, 1 << 62)
            give(exchange, self._kept)
            self._exchanges[names] = exchange
        return self._exchanges[names]


def _tensors(arrays: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _arrays(tensors: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def comm_hook(state: CommHook, bucket: Any) -> Any:
    """For ``ddp.register_comm_hook(CommHook(comm, ...), comm_hook)``: a Future of the mean of ``bucket``'s gradients.

    An error of an exchange is raised by backward(), as RuntimeError with its text.
    """
    buffer = bucket.buffer()
    if buffer.layout != torch.strided:
        raise TypeError(
            "comm_hook: gradients of Embedding(..., sparse=True) are not exchanged by it; make the module with "
            "sparse=False, or use GradientAverager"
        )
    exchange = state.exchange_for(bucket.parameters())
    future: Any = torch.futures.Future()
    by_name: dict[str, Any] = {}
    start = 0
    for entry in reversed(exchange.entries):  # bucket.gradients() does not mind in which order memory holds them
        by_name[entry.name] = entry.view(buffer[start : start + entry.values])
        start += entry.values
    exchange.begin()
    left, lock, errors = [len(exchange.buckets)], threading.Lock(), list[BaseException]()

    def done(error: BaseException | None) -> None:
        with lock:
            left[0] -= 1
            if error is not None:
                errors.append(error)
            if left[0]:
                return
        if errors:
            future.set_exception(errors[0])
            return
        whole = exchange.buckets[0]
        if len(exchange.buckets) == 1:
            whole.arrive()
            future.set_result(whole.tensor)
            return
        for part in exchange.buckets:
            part.arrive()
            torch._foreach_copy_([by_name[name] for name in part.names], part.views)
        future.set_result(buffer)

    scale = 1 / state.comm.Get_size()
    for part in exchange.buckets:
        exchange.load([by_name[name] for name in part.names], scale, True, done)
    return future


comm_hook.__annotations__ = {}  # DistributedDataParallel wants its own classes there, not their names, or nothing
