"""Helper threads change no bits, and are there where cores are free: for a caller who waits, of ranks with several."""

import json
import os

import pytest
from mpi4py import MPI

from bitring.launcher import LOCAL_SIZE_VARIABLES
from bitring.native import native
from bitring.nodes import thread_share

pytestmark = [pytest.mark.single, pytest.mark.skipif(native() is None, reason="without the native engine")]

SCRIPT = """
import json
from pathlib import Path
import numpy as np
from mpi4py import MPI
import bitring
from bitring.compression.encoder import Encoder, compressors
from bitring.compression.exchange import owner_exchange
from bitring.compression.plans import plan as plans

def helpers():
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("bitring-helper")

comm = MPI.COMM_WORLD
n = 300_001
found = {}
for name in compressors.names():
    encoder = compressors.get(name)()
    if not isinstance(encoder, Encoder) or not encoder.has_functions:
        continue
    sums = []
    for kind in (owner_exchange.NativeOwnerExchange, owner_exchange.PortableOwnerExchange):
        x = np.zeros(n, np.float32)
        plans.exchange_for = lambda *_: kind
        plan = bitring.plan_allreduce(x, comm=comm, compression=encoder, boundaries=(1000, n // 2), hierarchical=False)
        for step in range(3):
            x[:] = np.random.default_rng((comm.rank, step)).standard_normal(n)
            plan()
        state = plan.state_dict()
        sums.append([x.tobytes(), state["residual"].tobytes(), state["owner_residual"].tobytes()])
        plan.free()
    found[name] = bool(comm.allreduce(sums[0] == sums[1], MPI.LAND))
found["helpers"] = comm.allgather(helpers())
if comm.rank == 0:
    print(json.dumps(found))
"""


@pytest.mark.parametrize("threads", [pytest.param("1", marks=pytest.mark.slow), "3", ""])
@pytest.mark.timeout(300)
def test_the_same_bits_with_helpers(on_ranks, threads: str):
    done = on_ranks(2, "-c", SCRIPT, env={"OMP_NUM_THREADS": threads}, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    helpers = found.pop("helpers")
    if threads:
        assert helpers == [int(threads) - 1] * 2
    else:  # of both ranks: two may be bound to a core each, or share all
        assert sum(helpers) + 2 <= max(2, min(32, len(os.sched_getaffinity(0))))
    assert all(found.values()), found
    assert {"onebit", "fixed", "topk"} <= set(found)


def test_ranks_outside_the_communicator_have_their_share(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    if cores != os.cpu_count():
        pytest.skip("bound to some of the node's cores, which are this process's alone")
    for name in ("OMP_NUM_THREADS", *LOCAL_SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert thread_share(MPI.COMM_SELF) == cores
    monkeypatch.setenv(LOCAL_SIZE_VARIABLES[0], str(cores))
    assert thread_share(MPI.COMM_SELF) == 1
