"""Device buffers, staged and handed to MPI directly: on a fake device whose work is done late, and on a real one."""

from __future__ import annotations

import itertools
import time
import types
from typing import Any

import fake_device
import ml_dtypes
import numpy as np
import pytest
from fake_network import run

from bitring import arrays
from bitring.collectives.communicator import Communicator
from bitring.collectives.execution.transport import CudaAwareTransport, StagedTransport
from bitring.collectives.interop import cuda_aware
from bitring.collectives.plan import plan_exact
from bitring.collectives.schedules.schedule import algorithms, chunk_start

CASES = [(name, collective) for name in algorithms.names() for collective in algorithms.get(name).collectives()]
NAMES = [name for name in algorithms.names() if algorithms.get(name).collectives()]
PATHS = {"staged": "0", "cuda-aware": "1"}


class Fake:
    """Makes and reads arrays of the fake device."""

    array = staticmethod(fake_device.array)

    @staticmethod
    def get(x):
        return x.get()


class Real:
    """The same with CuPy."""

    @staticmethod
    def array(values):
        import cupy

        return cupy.asarray(values)

    @staticmethod
    def get(x):
        return x.get()


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("BITRING_CUDA_AWARE", PATHS[request.param])
    cuda_aware.cuda_aware.cache_clear()
    yield request.param
    cuda_aware.cuda_aware.cache_clear()


@pytest.fixture(params=["fake", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request, monkeypatch, path):
    if request.param == "fake":
        monkeypatch.setitem(arrays.devices, "fake_device", fake_device.FakeDevice)
        yield Fake
        fake_device.stream.synchronize()
        arrays._made.pop("fake_device", None)
        return
    if path == "cuda-aware" and not cuda_aware._asked():
        pytest.skip("this MPI library does not take device memory")
    yield Real


@pytest.fixture(params=NAMES)
def world(request, comm, device):
    duplicate = Communicator(comm.Dup(), algorithm=request.param)
    yield duplicate
    duplicate.Free()


def mine(world, n: int, dtype=np.float32) -> np.ndarray:
    return (np.arange(n) % 5 + world.rank).astype(dtype)


def total(world, n: int, dtype=np.float32) -> np.ndarray:
    return (world.size * (np.arange(n) % 5) + sum(range(world.size))).astype(dtype)


SIZES = [0, 1, 7, 1009, 40_000]


@pytest.mark.parametrize("n", SIZES)
def test_allreduce(world, device, agree, n: int):
    from mpi4py import MPI

    x = device.array(mine(world, n))
    world.Allreduce(MPI.IN_PLACE, x)
    agree(world, np.array_equal(device.get(x), total(world, n)), f"in place: {device.get(x)[:8]}")
    x, y = device.array(mine(world, n)), device.array(np.zeros(n, np.float32))
    for _ in range(2):
        world.Allreduce(x, y)
    agree(world, np.array_equal(device.get(y), total(world, n)), f"out of place: {device.get(y)[:8]}")
    agree(world, np.array_equal(device.get(x), mine(world, n)), "the values to send were changed")


@pytest.mark.parametrize("n", [3, 40_000])
def test_nonblocking_persistent_and_plans(world, device, agree, n: int):
    from mpi4py import MPI

    x = device.array(mine(world, n))
    world.Iallreduce(MPI.IN_PLACE, x).Wait()
    agree(world, np.array_equal(device.get(x), total(world, n)), f"Iallreduce: {device.get(x)[:8]}")

    x, y = device.array(mine(world, n)), device.array(np.zeros(n, np.float32))
    request = world.Allreduce_init(x, y)
    for _ in range(2):
        request.Start()
        request.Wait()
        agree(world, np.array_equal(device.get(y), total(world, n)), f"Allreduce_init: {device.get(y)[:8]}")
    request.Free()

    x = device.array(mine(world, n))
    plan = plan_exact(x, world, MPI.SUM, world.algorithm)
    fresh = device.array(mine(world, n))
    for _ in range(3):
        x[:] = fresh  # the copy is still under way when the plan begins
        plan()
        agree(world, np.array_equal(device.get(x), total(world, n)), f"plan: {device.get(x)[:8]}")
    plan.free()


@pytest.mark.parametrize("n", SIZES)
def test_the_other_collectives(world, device, agree, n: int):
    size, rank, last = world.size, world.rank, world.size - 1
    x = device.array(mine(world, n) if rank == last else np.zeros(n, np.float32))
    world.Bcast(x, root=last)
    agree(world, np.array_equal(device.get(x), np.float32(np.arange(n) % 5 + last)), f"Bcast: {device.get(x)[:8]}")

    y = device.array(np.zeros(n, np.float32))
    world.Reduce(device.array(mine(world, n)), y if rank == last else None, root=last)
    agree(world, rank != last or np.array_equal(device.get(y), total(world, n)), f"Reduce: {device.get(y)[:8]}")

    gathered = device.array(np.zeros(n * size, np.float32))
    world.Allgather(device.array(mine(world, n)), gathered)
    want = np.concatenate([np.float32(np.arange(n) % 5 + r) for r in range(size)])
    agree(world, np.array_equal(device.get(gathered), want), f"Allgather: {device.get(gathered)[:8]}")

    y = device.array(np.zeros(n, np.float32))
    world.Reduce_scatter_block(device.array(mine(world, n * size)), y)
    want = total(world, n * size)[n * rank : n * (rank + 1)]
    agree(world, np.array_equal(device.get(y), want), f"Reduce_scatter_block: {device.get(y)[:8]}")


@pytest.mark.parametrize("n", [1, 1009])
def test_work_behind_and_before_a_broadcast(world, device, agree, n: int):
    """Work on the buffer that the stream has not yet come to happens before the broadcast, on every rank."""
    x = device.array(np.zeros(n, np.float32))
    for turn in range(3):
        x[:] = device.array(np.full(n, 10.0 * turn + world.rank, np.float32))
        world.Bcast(x, root=0)
        agree(world, bool((device.get(x) == 10.0 * turn).all()), f"{device.get(x)[:8]}")


def test_other_dtypes_and_operations(world, device, agree):
    from mpi4py import MPI

    dtypes = ["?", "b", "H", "i", "L", "e", "d", "F"] + ([ml_dtypes.bfloat16] if device is Fake else [])
    for dtype in [np.dtype(code) for code in dtypes]:
        op = MPI.LOR if dtype.kind == "b" else MPI.SUM if dtype.kind == "c" else MPI.MAX
        x = device.array((np.arange(9) % 2 * world.rank).astype(dtype))
        world.Allreduce(MPI.IN_PLACE, x, op)
        top = sum(range(world.size)) if op == MPI.SUM else world.size - 1
        want = (np.arange(9) % 2 * top).astype(dtype)
        agree(world, np.array_equal(device.get(x), want), f"{dtype}: {device.get(x)}")


def test_mistakes_with_device_memory(comm, device, agree):
    from mpi4py import MPI

    world = Communicator(comm.Dup(), algorithm="ring")
    x, host = device.array(np.zeros((4, 4))), np.zeros(16)

    def text(call) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    got = text(lambda: world.Allreduce(host, x))
    agree(world, "sendbuf and recvbuf must be in the same memory; one is on a device" in got, got)
    got = text(lambda: world.Allreduce(MPI.IN_PLACE, x[:, 1]))
    agree(world, "ValueError: Allreduce: recvbuf must be contiguous; got an array of shape (4,)" in got, got)
    got = text(lambda: world.Allreduce(MPI.IN_PLACE, x if world.rank else host.reshape(4, 4)))
    agree(world, world.size == 1 or "ranks disagree on memory" in got, got)
    own = MPI.Op.Create(lambda a, b, _: None, commute=True)
    got = text(lambda: world.Allreduce(MPI.IN_PLACE, x, own))
    agree(world, "TypeError: Allreduce: op must be a predefined operation for float64 in device memory" in got, got)
    own.Free()
    world.Free()


# In one process, in every order: what a forgotten synchronisation would do.

KINDS: dict[str, Any] = {"staged": StagedTransport, "cuda-aware": CudaAwareTransport}


@pytest.fixture
def simulate(monkeypatch):
    """``simulate(kind, name, collective, size, n)``: whether the sums on the fake device are right."""
    monkeypatch.setitem(arrays.devices, "fake_device", fake_device.FakeDevice)

    def simulate(kind, name: str, collective: str, size: int, n: int, segment: int, seed: int) -> bool:
        inputs = [(np.arange(n) % 7 + 100 * rank).astype(np.float64) for rank in range(size)]
        streams = [fake_device.Stream() for _ in inputs]  # each rank has a device of its own
        buffers = [fake_device.array(x, stream) for x, stream in zip(inputs, streams, strict=True)]

        def make(comm, *args):
            return kind(fake_device.FakeDevice(streams[comm.rank]), comm, *args)

        run(monkeypatch, algorithms.get(name)(), collective, buffers, segment=segment, seed=seed, make=make)
        results = [x.get() for x in buffers]
        starts = [chunk_start(n, size, c) for c in range(size + 1)]
        if collective == "broadcast":
            return all(np.array_equal(x, inputs[0]) for x in results)
        if collective == "allgather":
            want = np.concatenate([x[starts[r] : starts[r + 1]] for r, x in enumerate(inputs)])
            return all(np.array_equal(x, want) for x in results)
        want = np.sum(inputs, axis=0)
        if collective == "reduce":
            return np.array_equal(results[0], want)
        if collective == "reduce_scatter":
            chunks = [slice(*pair) for pair in itertools.pairwise(starts)]
            return all(np.array_equal(x[part], want[part]) for x, part in zip(results, chunks, strict=True))
        return all(np.array_equal(x, want) for x in results)

    yield simulate
    fake_device.stream.synchronize()
    arrays._made.pop("fake_device", None)


@pytest.mark.single
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "collective"), CASES)
def test_every_schedule_on_the_fake_device(simulate, kind: str, name: str, collective: str):
    for size in (2, 3, 5, 8):
        for n, segment in ((0, 3), (size - 1, 1), (41, 4)):
            for seed in range(2):
                assert simulate(KINDS[kind], name, collective, size, n, segment, seed), f"{size} ranks, {n} values"


MUTANTS = {
    ("staged", "prepare"): "the copy out of the device",
    ("staged", "apply"): "the copy to the device",
    ("cuda-aware", "prepare"): "the values to send",
    ("cuda-aware", "apply"): "the reduction",
}


@pytest.mark.single
@pytest.mark.parametrize(("kind", "method"), MUTANTS)
def test_a_transport_that_forgets_an_event_gives_wrong_sums(simulate, kind: str, method: str):
    forgetful = type("Forgetful", (KINDS[kind],), {})

    def forget(self, index):
        getattr(KINDS[kind], method)(self, index)

    setattr(forgetful, method, forget)
    # Enough segments that scratch and staging memory are used again.
    assert not all(simulate(forgetful, "ring", "allreduce", 3, 200, 3, seed) for seed in range(5))


@pytest.mark.single
def test_a_receive_in_place_that_does_not_wait_for_earlier_work_gives_wrong_values(simulate):
    class Hasty(CudaAwareTransport):
        def prepare(self, index):
            return super().prepare(index) if self.program.messages[index].sends else None

    assert not all(simulate(Hasty, "ring", "broadcast", 3, 41, 4, seed) for seed in range(5))


def test_the_fake_device_is_late_and_jealous():
    x = fake_device.array(np.ones(3))
    assert x._memory[0] == 55
    event = fake_device.Event(fake_device.stream)
    polls = [event.done for _ in range(fake_device.POLLS + 1)]
    assert polls == [False] * fake_device.POLLS + [True]
    assert x._memory[0] == 1
    with pytest.raises(TypeError, match="implicit conversion"):
        np.asarray(x)
    assert isinstance(fake_device, types.ModuleType)


def test_a_started_plan_uses_the_device_of_the_thread_that_started_it(comm, device):
    """CUDA's current device and stream are each thread's own; the fake device refuses any others."""
    from mpi4py import MPI

    duplicate = Communicator(comm.Dup(), algorithm="ring")
    x = device.array(mine(duplicate, 5000))
    plan = plan_exact(x, duplicate, MPI.SUM, "ring")
    plan.start()
    while not plan.test():
        time.sleep(0.001)
    np.testing.assert_array_equal(device.get(x), total(duplicate, 5000))
    plan.free()
    duplicate.Free()
