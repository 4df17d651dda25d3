"""A rank that dies in the midst of free modes and stores: who waits for it names it, and nobody else waits."""

from __future__ import annotations

import pytest

from bitring.native import native

pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(native() is None, reason="there is no native engine"),
]

SCRIPT = """
import os, time
import numpy as np
from mpi4py import MPI
import bitring
comm = bitring.Communicator(MPI.COMM_WORLD)
w = comm.empty(5000)
w[:] = 0
g = {"w": np.full(5000, -1, np.float32)}
hogwild = bitring.DataParallel({"w": w}, bitring.SGD(lr=1.0), comm=comm, mode="hogwild:locks=true")
peers = bitring.DataParallel({"w": np.zeros(5000, np.float32)}, bitring.SGD(lr=1.0), comm=comm.Dup(), mode="peers")
store = bitring.ParameterStore({"w": np.zeros(5)}, bitring.SGD(lr=1.0), comm=comm.Dup(), staleness=0)
for each in (hogwild, peers):
    each.step(g)
    each.synchronize()
store.synchronize()
if comm.rank == 2:
    hogwild._stepper.running._shards.words._words.acquire(1.0)
    os._exit(0)
def tell(what, call):
    began = time.monotonic()
    try:
        call()
        result = "went on"
    except Exception as error:
        result = f"{type(error).__name__} {getattr(error, 'ranks', None)}"
    print(f"rank {comm.rank}, {what}: {result}, {time.monotonic() - began < 60}", flush=True)
time.sleep(0.5)
tell("hogwild", lambda: [hogwild.step(g) for _ in range(20)])
MPI.COMM_WORLD.sendrecv(None, 1 - comm.rank, source=1 - comm.rank)  # neither hears of the other's NaN before
def nan():
    hogwild.step({"w": np.full(5000, np.nan, np.float32)})
    while True:
        hogwild.step(g)
tell("the lock", nan)
store.clock()
tell("store", store.get)
def steps():
    for _ in range(2000):
        peers.step(g)
        time.sleep(0.05)
tell("peers", steps)
tell("the end", hogwild.synchronize)
print(f"rank {comm.rank}, {w[0] >= 43}", flush=True)
os._exit(0)
"""


def test_the_others_go_on_or_name_it(on_survivors):
    done = on_survivors(SCRIPT)
    said = done.stdout + done.stderr
    for rank in (0, 1):
        assert f"rank {rank}, hogwild: went on, True" in done.stdout, said
        assert f"rank {rank}, the lock: NonFiniteError None, True" in done.stdout, said
        for what in ("store", "peers", "the end"):
            assert f"rank {rank}, {what}: DeadRankError (2,), True" in done.stdout, said
        assert f"rank {rank}, True" in done.stdout, said
    assert "rank 2 has died with a lock, which is taken over" in said
