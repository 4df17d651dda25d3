"""Batches and shard: parts of every rank make up the batch, for every world size; no MPI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitring.training.batches import Batches, shard

pytestmark = pytest.mark.single


@dataclass
class Rank:
    rank: int
    size: int


NOT_BATCHES: Any = 7


def ranks(size: int) -> list[Rank]:
    return [Rank(rank, size) for rank in range(size)]


def samples(count: int) -> tuple[Any, Any]:
    return np.arange(2.0 * count).reshape(count, 2), np.arange(count)


def test_batches_are_all_samples_in_order_again_and_again() -> None:
    x, y = samples(10)
    batches = Batches(x, y, size=4)
    assert len(batches) == 3
    for _ in range(2):
        parts = list(batches)
        assert [len(part) for part, _ in parts] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), x)
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), y)
    assert [len(Batches(*samples(n), size=5)) for n in (0, 1, 5, 6)] == [0, 1, 1, 2]
    assert Batches(x, y).size == 64
    with pytest.raises(FrozenInstanceError):
        batches.size = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


@given(count=st.integers(0, 50), batch=st.integers(1, 20), size=st.integers(1, 9), seed=st.integers(0, 3))
def test_parts_make_up_the_same_batches_for_every_world_size(count: int, batch: int, size: int, seed: int) -> None:
    x, y = samples(count)
    batches = Batches(x, y, size=batch)
    alone = list(shard(batches, Rank(0, 1), seed=seed, epoch=1))
    assert len(alone) == len(batches)
    everyone = [list(shard(batches, comm, seed=seed, epoch=1)) for comm in ranks(size)]
    assert {len(steps) for steps in everyone} == {len(alone)}
    for step, (whole_x, whole_y) in enumerate(alone):
        b = len(whole_x)
        assert b == min(batch, count - step * batch)
        for rank, steps in enumerate(everyone):
            part_x, part_y = steps[step]
            assert len(part_x) == len(part_y) == b * (rank + 1) // size - b * rank // size
            np.testing.assert_array_equal(part_x[:, 0], 2.0 * part_y)  # x and y stay together
        np.testing.assert_array_equal(np.concatenate([steps[step][0] for steps in everyone]), whole_x)
        np.testing.assert_array_equal(np.concatenate([steps[step][1] for steps in everyone]), whole_y)
    np.testing.assert_array_equal(np.sort(np.concatenate([part for _, part in alone])) if alone else y, y)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7])
def test_an_epoch_goes_on_from_its_middle(start: int) -> None:
    permuted = Batches(*samples(10), size=3)
    for batches in (permuted, list(permuted)):
        for rank in ranks(2):
            left = list(shard(batches, rank, seed=1, epoch=2, start=start))
            expected = list(shard(batches, rank, seed=1, epoch=2))[start:]
            assert len(left) == len(expected)
            for some, others in zip(left, expected, strict=True):
                np.testing.assert_array_equal(some[1], others[1])


def test_seed_and_epoch_make_the_order() -> None:
    batches = Batches(*samples(100), size=100)

    def order(seed: int, epoch: int) -> list[int]:
        ((_, y),) = shard(batches, Rank(0, 1), seed=seed, epoch=epoch)
        return y.tolist()

    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert order(1, 2) == order(1, 2)
    assert len({tuple(one) for one in orders}) == len(orders)
    assert list(range(100)) not in orders
    # Resumed runs continue with the order they had: it must stay what it is from one release to the next.
    assert order(0, 0)[:5] == np.random.default_rng([0, 0]).permutation(100)[:5].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_other_iterables_are_cut_in_their_order(size: int) -> None:
    def batches() -> Iterator[tuple[Any, ...]]:
        for count in (7, 0, 1, 4):
            x, y = samples(count)
            yield x, y, y * 10

    everyone = [list(shard(batches(), comm, seed=3, epoch=4)) for comm in ranks(size)]
    for step, whole in enumerate(batches()):
        for which, array in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([steps[step][which] for steps in everyone]), array)
    lists = [list(batch) for batch in batches()]
    assert len(list(shard(lists, Rank(0, size)))) == 4  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_more_ranks_than_samples_leave_some_empty() -> None:
    parts = [next(shard(Batches(*samples(2)), comm)) for comm in ranks(5)]
    assert [len(x) for x, _ in parts] == [0, 0, 1, 0, 1]
    assert all(x.shape[1:] == (2,) for x, _ in parts)


def test_parts_of_other_iterables_are_views() -> None:
    x, y = samples(6)
    ((part, _),) = shard([(x, y)], Rank(1, 2))
    assert np.shares_memory(part, x)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Batches(np.ones(3), np.ones(2)), ValueError, "Batches: arrays must have equal lengths, got 3, 2"),
        (
            lambda: Batches([1, 2], np.ones(2)),
            TypeError,
            "Batches: expected arrays with a first axis of samples, got",
        ),
        (lambda: Batches(np.ones(()), np.ones(2)), TypeError, "with a first axis of samples, got ndarray"),
        (lambda: Batches(np.ones(2), np.ones(2), size=0), ValueError, "Batches: size must be at least 1; got 0"),
        (
            lambda: shard([], Rank(0, 1), seed=-1),
            ValueError,
            "shard: seed must be at least 0; got -1",
        ),
        (
            lambda: shard([], Rank(0, 1), epoch=-2),
            ValueError,
            "shard: epoch must be at least 0; got -2",
        ),
        (lambda: shard([], Rank(0, 1), start=-3), ValueError, "shard: start must be at least 0; got -3"),
        (
            lambda: shard(NOT_BATCHES, Rank(0, 1)),
            TypeError,
            "shard: batches must be Batches or an iterable of tuples of arrays",
        ),
        (
            lambda: list(shard(np.ones((2, 3)), Rank(0, 1))),
            TypeError,
            "shard: batch 0: expected a tuple of arrays",
        ),
        (
            lambda: list(shard([()], Rank(0, 1))),
            TypeError,
            "shard: batch 0: expected a tuple of arrays",
        ),
        (
            lambda: list(shard([samples(2), (np.ones(3), np.ones(4))], Rank(0, 1))),
            ValueError,
            "shard: batch 1: arrays must have equal lengths, got 3, 4",
        ),
    ],
)
def test_errors_come_before_any_part(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        make()
