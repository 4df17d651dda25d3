"""Shards in the memory of a node: updates and reads by every rank, under locks and without; shared words."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import numpy as np
import pytest

from bitring.collectives.communicator import Communicator
from bitring.collectives.node.shared_shards import SharedShards, new_shards
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import agreed_job, allgather
from bitring.native import native
from bitring.training.optimizer import NativeUpdate
from bitring.training.optimizers.adagrad import AdaGrad
from bitring.training.optimizers.sgd import SGD

pytestmark = pytest.mark.skipif(native() is None, reason="there is no native engine")

PLAIN = NativeUpdate("sgd", 1.0)
OPTIMIZERS = [
    SGD(lr=0.05),
    SGD(lr=0.05, weight_decay=0.1),
    SGD(lr=0.05, momentum=0.9),
    SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    AdaGrad(lr=0.05),
    AdaGrad(lr=0.05, eps=1e-6, weight_decay=0.1),
]


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def shards_of(
    world, shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32, slots: Any = (), limit: float = math.inf
) -> Any:
    context = context_of(world)
    context.prepare("a test")
    layout = {name: (shape, np.dtype(dtype)) for name, shape in shapes.items()}

    def steps(progress):
        return new_shards(context.common, context.node.comm, layout, slots, 8, None, limit, "a test", progress)

    shards = agreed_job(context, steps, "a test")
    assert isinstance(shards, SharedShards)
    return shards


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_updates_have_the_bits_of_the_optimizer(world, agree, optimizer, dtype):
    """Rank after rank updates the one array; as NumPy does with the same gradients in that order."""
    shapes = {"b": (), "w": (3, 12_009), "empty": (0, 4), "c": (7,)}
    shards = shards_of(world, shapes, dtype, optimizer.slots)
    mine = {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
    state = optimizer.init(mine)
    for step in range(2):
        for rank in range(world.size):
            random = np.random.default_rng(10 * step + rank)
            gradients = {name: np.array(random.normal(size=shape), dtype) for name, shape in shapes.items()}
            optimizer.update(mine, gradients, state)
            if rank == world.rank:
                shards.update(gradients, optimizer.native_update())
            world.Barrier()
    same = all(np.array_equal(shards.arrays[name], mine[name]) for name in shapes)
    same &= all(np.array_equal(shards.slots[slot][name], state[slot][name]) for slot in state for name in shapes)
    agree(world, same)


def test_nothing_is_lost(world, agree):
    """Everybody updates everything at the same time: sums of whole numbers have no order."""
    n, rounds = 200_007, 5
    shards = shards_of(world, {"a": (n,), "b": (5,)})
    gradients = {"a": np.full(n, world.rank + 1, np.float32), "b": np.full(5, -1, np.float32)}
    out = np.empty(n, np.float32)
    falls = True
    before = np.zeros(n, np.float32)
    for _ in range(rounds):
        shards.update(gradients, PLAIN)
        shards.read({"a": out})
        falls &= bool((out <= before - (world.rank + 1)).all())  # with its own update at least
        before[:] = out
    world.Barrier()
    total = rounds * world.size * (world.size + 1) // 2
    agree(world, falls, "a read lacks updates")
    agree(world, bool((shards.arrays["a"] == -total).all() and (shards.arrays["b"] == rounds * world.size).all()))


def test_rows_and_single_values(world, agree):
    """Of a sparse update only these values change, and their slots."""
    optimizer = AdaGrad(lr=0.1)
    shards = shards_of(world, {"w": (1000, 40)}, np.float64, optimizer.slots)
    w, squares, out = np.zeros((1000, 40)), np.zeros((1000, 40)), np.empty((50, 40))
    for rank in range(world.size):
        random = np.random.default_rng(rank)
        rows = np.sort(random.choice(1000, 50, replace=False))
        values = random.normal(size=(50, 40))
        at = np.sort(random.choice(40_000, 77, replace=False))
        single = random.normal(size=77)
        if rank == world.rank:
            shards.update({"w": values}, optimizer.native_update(), {"w": 40 * rows})
            shards.read({"w": out}, {"w": 40 * rows})
            shards.update({"w": single}, optimizer.native_update(), {"w": at})
            shards.update({"w": single[:0]}, optimizer.native_update(), {"w": at[:0]})
        squares[rows] += values * values
        w[rows] -= values / (np.sqrt(squares[rows]) + optimizer.eps) * optimizer.lr
        seen = w[rows].copy()
        squares.reshape(-1)[at] += single * single
        w.reshape(-1)[at] -= single / (np.sqrt(squares.reshape(-1)[at]) + optimizer.eps) * optimizer.lr
        if rank == world.rank:
            agree(world, np.array_equal(out, seen), "a read of rows gives other values")
        else:
            agree(world, True)
        world.Barrier()
    agree(world, np.array_equal(shards.arrays["w"], w) and np.array_equal(shards.slots["squares"]["w"], squares))


def test_sparse_updates_at_the_same_time_lose_nothing(world, agree):
    shards = shards_of(world, {"w": (20_000,)}, np.float64)
    counts = np.zeros(20_000)
    everyone = [np.sort(np.random.default_rng(rank).choice(20_000, 3000, replace=False)) for rank in range(world.size)]
    world.Barrier()
    for _ in range(10):
        shards.update({"w": np.ones(3000)}, PLAIN, {"w": everyone[world.rank]})
    world.Barrier()
    for at in everyone:
        counts[at] -= 10
    agree(world, np.array_equal(shards.arrays["w"], counts))


def test_racy_updates_are_the_same_one_after_the_other(world, agree):
    optimizer = SGD(lr=0.5, momentum=0.5)
    shards = shards_of(world, {"w": (70_000,)}, slots=optimizer.slots)
    w, v = np.zeros(70_000, np.float32), np.zeros(70_000, np.float32)
    out = np.empty_like(w)
    for rank in range(world.size):
        g = np.random.default_rng(rank).normal(size=w.size).astype(np.float32)
        optimizer.update({"w": w}, {"w": g}, {"velocity": {"w": v}})
        if rank == world.rank:
            shards.update({"w": g}, optimizer.native_update(), locked=False)
        world.Barrier()
    shards.read({"w": out}, locked=False)
    agree(world, np.array_equal(out, w))


def test_words_are_changed_under_their_lock_and_the_bell_wakes(world, agree):
    shards = shards_of(world, {"w": (1,)})
    words = shards.words
    for _ in range(200):
        with words.held() as values:
            values[3] += 1
            values[3:5] += values[3] % 2, 1
    with words.held() as values:
        values[0] += 1
    words.ring()
    until = time.monotonic() + 60
    while True:
        seen = words.bell
        if words.values[0] == world.size or time.monotonic() > until:
            break
        words.wait(seen, 0.5)
    agree(world, words.values[0] == world.size and words.values[4] == 200 * world.size, str(words.values))
    world.Barrier()
    seen, began = words.bell, time.monotonic()
    agree(world, not words.wait(seen, 0.02) and time.monotonic() - began >= 0.02, "a bell that nobody rang")


def test_a_held_lock_is_waited_for_until_the_limit(world, agree):
    """One rank keeps the words' lock; the others name it. With more patience they get it."""
    shards = shards_of(world, {"w": (1,)}, limit=0.2)
    text = ""
    if world.rank == 0:
        with shards.words.held():
            world.Barrier()
            world.Barrier()
    else:
        world.Barrier()
        with pytest.raises(TimeoutError) as raised, shards.words.held():
            pass
        text = str(raised.value)
        world.Barrier()
    said = r"a test has waited \d+ s for rank 0, which holds a lock \(BITRING_TIMEOUT=0\.2\)"
    agree(world, world.rank == 0 or re.search(said, text) is not None, text)
    shards.words._holders._limit = math.inf
    with shards.words.held():
        pass


def test_a_lock_left_by_the_dead_is_taken_over(world, agree, monkeypatch, caplog):
    """Whoever died in an update keeps nobody waiting, and is named."""
    if world.size == 1:
        pytest.skip("needs another rank")
    shards = shards_of(world, {"w": (30_000,)})
    group = context_of(world).common
    monkeypatch.setattr(group, "dead", lambda member: member == 0)
    if world.rank == 0:
        shards.words._words.acquire(1.0)  # and never releases it
        world.Barrier()
        world.Barrier()
    else:
        world.Barrier()
        for _ in range(3):
            with shards.words.held() as values:
                values[1] += 1
        world.Barrier()
    agree(world, shards.words.values[1] == 3 * (world.size - 1), str(shards.words.values))
    named = allgather(world, "rank 0 has died" in caplog.text, "test")  # by those of the others who met it
    agree(world, any(named) and not named[0], caplog.text)
    world.Barrier()


def test_united_memory_is_one_and_is_parted_again(world, agree):
    context = context_of(world)
    x = world.empty(300_000)
    x[:] = world.rank
    group = context.common
    if group is None:
        return
    region = group.region_of(x)
    group.unite(region)
    world.Barrier()
    agree(world, bool((x == 0).all()), "other values than the first rank's")
    world.Barrier()
    x[world.rank] = world.rank + 5
    world.Barrier()
    agree(world, all(x[rank] == rank + 5 for rank in range(world.size)))
    world.Barrier()
    if world.rank == world.size - 1:
        x[:] = 3
    world.Barrier()
    group.part_again(region)
    world.Barrier()
    agree(world, bool((x == 3).all()), "the values were lost")
    world.Barrier()
    x[:] = world.rank
    world.Barrier()
    agree(world, bool((x == world.rank).all()), "still one")
    world.Barrier()
    from mpi4py import MPI

    world.Allreduce(MPI.IN_PLACE, x)
    agree(world, bool((x == world.size * (world.size - 1) / 2).all()), "it is not reduced")
