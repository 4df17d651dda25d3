"""Ranks of one process, and messages that arrive when the test says: schedules run by the real executor, without MPI.

``run`` gives every rank's transport a communicator of a :class:`Network`. Messages between two ranks with one tag
keep their order, as MPI promises; everything else is drawn at random from a seed: which rank runs next, which message
arrives next, when a rank hears of it. With ``rendezvous`` a send is over only when it is received, and its values are
read only then, which is the least that MPI promises.
"""

from __future__ import annotations

import random
import types
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitring.collectives.execution import portable as executor
from bitring.collectives.execution.portable import execute
from bitring.collectives.execution.transport import Transport
from bitring.collectives.interop.steps import Progress
from bitring.collectives.schedules.program import compile_program
from bitring.collectives.schedules.schedule import Algorithm, rounds


class DeadlockError(AssertionError):
    """Every rank waits."""


class Request:
    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.done = False


class Network:
    def __init__(self, size: int, seed: int, rendezvous: bool) -> None:
        self.random = random.Random(seed)
        self.rendezvous = rendezvous
        self.comms = [Comm(self, rank, size) for rank in range(size)]
        self.sends: dict[tuple[int, int, int], deque[Request]] = defaultdict(deque)
        self.receives: dict[tuple[int, int, int], deque[Request]] = defaultdict(deque)

    def deliver(self) -> bool:
        """Let one message arrive. Whether there was one."""
        ready = [key for key, waiting in self.sends.items() if waiting and self.receives[key]]
        if not ready:
            return False
        key = self.random.choice(ready)
        send, receive = self.sends[key].popleft(), self.receives[key].popleft()
        assert send.memory.nbytes == receive.memory.nbytes, f"{key}: the two ends differ in length"
        receive.memory[:] = send.memory
        send.done = receive.done = True
        return True

    def testsome(self, requests: list[Request]) -> list[int] | None:
        """MPI.Request.Testsome, but for completions that are told late."""
        return [k for k, request in enumerate(requests) if request.done and self.random.random() < 0.7]


class Comm:
    def __init__(self, network: Network, rank: int, size: int) -> None:
        self.network, self.rank, self.size = network, rank, size

    def Get_rank(self) -> int:  # noqa: N802
        return self.rank

    def _host(self, memory: Any) -> np.ndarray:
        """What a library that takes device memory reads: it knows nothing of the device's stream."""
        return np.asarray(getattr(memory, "_memory", memory))

    def Isend(self, memory: Any, peer: int, tag: int) -> Request:  # noqa: N802
        assert 0 <= peer < self.size and peer != self.rank and 0 <= tag < 32767
        host = self._host(memory)
        request = Request(host if self.network.rendezvous else host.copy())
        request.done = not self.network.rendezvous
        self.network.sends[self.rank, peer, tag].append(request)
        return request

    def Irecv(self, memory: Any, peer: int, tag: int) -> Request:  # noqa: N802
        assert 0 <= peer < self.size and peer != self.rank and 0 <= tag < 32767
        request = Request(self._host(memory))
        self.network.receives[peer, self.rank, tag].append(request)
        return request


def run(
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Algorithm,
    collective: str,
    buffers: list[Any],
    *,
    segment: int,
    seed: int = 0,
    rendezvous: bool = True,
    ufunc: str = "add",
    root: int = 0,
    make: Callable[..., Transport] = Transport,
) -> None:
    """Run the collective in place on ``buffers``, one 1-D array a rank, through ``make``'s transports."""
    size = len(buffers)
    network = Network(size, seed, rendezvous)
    monkeypatch.setattr(
        executor, "MPI", types.SimpleNamespace(Request=types.SimpleNamespace(Testsome=network.testsome))
    )
    waiting: list[tuple[Any, Progress]] = []
    for rank, buffer in enumerate(buffers):
        schedule = rounds(algorithm, collective, rank, size, root)
        program = compile_program(schedule, algorithm.chunks(size), buffer.size, segment)
        transport = make(network.comms[rank], program, buffer.dtype, ufunc, 0, False)
        transport.bind(buffer)
        progress = Progress()
        waiting.append((execute(transport, progress), progress))
    idle = 0
    while waiting:
        k = network.random.randrange(len(waiting))
        steps, progress = waiting[k]
        moves = progress.moves
        if next(steps, "over") == "over":
            waiting.pop(k)
            idle = 0
            continue
        arrived = [network.deliver() for _ in range(network.random.choice((0, 1, 1, 3)))]
        idle = 0 if any(arrived) or progress.moves != moves else idle + 1
        # Completions are told late, and a device's events pass after a few polls, so one idle turn proves nothing.
        if idle > 100 * len(waiting) and not network.deliver():
            peers = [sorted(progress.peers) for _, progress in waiting]
            raise DeadlockError(f"{len(waiting)} of {size} ranks wait for {peers}")
    assert not any(network.sends.values()) or not rendezvous
    assert not any(network.receives.values()), "a receive was posted that nobody sends to"
