"""Batches from a shared counter: each on one rank, once; and who may not claim."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.objects import allgather

X = np.arange(103.0)


@pytest.fixture
def world(comm: Any) -> Iterator[Any]:
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def test_each_batch_goes_to_one_rank_and_fast_ones_take_more(world, agree):
    """The last rank keeps its first batch until the others have nothing left to take."""
    w = {"w": np.zeros(3)}
    trainer = bitring.DataParallel(w, bitring.SGD(lr=1.0), comm=world, mode="asynchronous:scale=none")
    batches = bitring.Batches(X, X, 10)
    slow = world.size > 1 and world.rank == world.size - 1
    everyone: list[Any] = []
    for _ in range(2):  # a second pass of the same epoch
        mine = []
        taken = bitring.claimed(batches, trainer, seed=1, epoch=2)
        if slow:
            mine.append(next(taken))
        world.Barrier()
        for x, y in [] if slow else taken:
            trainer.step({"w": -np.ones(3)}, weight=len(x))
            mine.append((x, y))
        world.Barrier()
        if slow:
            trainer.step({"w": -np.ones(3)}, weight=10)
        agree(world, next(taken, None) is None)
        everyone = allgather(world, mine, "test")
        samples = np.concatenate([x for each in everyone for x, _ in each])
        agree(world, sorted(samples) == X.tolist(), str(samples))
        agree(world, all((x == y).all() and len(x) in (10, 3) for x, y in mine))
        counts = [len(each) for each in everyone]
        agree(world, sum(counts) == 11 and counts[-1] == (1 if world.size > 1 else 11), str(counts))
        trainer.synchronize()
    agree(world, bool((w["w"] == 22).all()), str(w))
    alone = [x for x, _ in bitring.shard(batches, _Alone(), seed=1, epoch=2)]
    agree(world, {tuple(x) for each in everyone for x, _ in each} == {tuple(x) for x in alone})
    trainer.free()


class _Alone:
    rank, size = 0, 1


def test_from_any_iterable_and_a_store(comm, agree):
    with bitring.ParameterStore({"w": np.zeros(2)}, "sgd", comm=comm) as store:
        taken = [int(x[0]) for (x,) in bitring.claimed(((np.full(2, i),) for i in range(9)), store, seed=0, epoch=0)]
    agree(
        comm, sorted(number for each in allgather(comm, taken, "test") for number in each) == list(range(9)), str(taken)
    )
    store.free()


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("sync", "claimed: in mode sync all ranks make equally many steps; bitring.shard gives each its part"),
        ("peers", "claimed: mode peers has no store to count in"),
    ],
)
def test_modes_that_cannot(comm, agree, mode, text):
    trainer = bitring.DataParallel({"w": np.zeros(3, np.float32)}, "sgd", comm=comm, mode=mode)
    said = ""
    try:
        bitring.claimed(bitring.Batches(X, X), trainer, seed=0, epoch=0)
    except ValueError as error:
        said = str(error)
    agree(comm, text in said, said)
    trainer.free()


@pytest.mark.single
@pytest.mark.parametrize("servers", [None, 1])
def test_a_store_has_room_for_many_rows_of_any_numbers(comm, servers):
    store = bitring.ParameterStore([np.zeros(3, np.float32)], bitring.SGD(lr=1.0), comm=comm, servers=servers)
    assert [store.claim((0, epoch, 0)) for epoch in range(1000)] == [0] * 1000
    assert [store.claim((seed,)) for seed in (10**18, 10**18 + 1, 10**18)] == [0, 0, 1]
    store.free()
