"""Prefetched batches: in order, ahead, with the errors in their place; random numbers belong to samples."""

import threading
import time
from typing import Any

import numpy as np
import pytest

import bitring

pytestmark = pytest.mark.single


def threads() -> int:
    return sum(thread.name == "bitring-prefetch" for thread in threading.enumerate())


def test_all_batches_in_order():
    batches = bitring.Batches(np.arange(10), np.arange(10) % 2, 3)
    got = list(bitring.prefetch(batches, lambda batch: (batch[0] * 2, batch[1])))
    for (x, y), (wanted, labels) in zip(got, batches, strict=True):
        np.testing.assert_array_equal(x, wanted * 2)
        np.testing.assert_array_equal(y, labels)


@pytest.mark.parametrize("depth", [1, 3])
def test_so_many_are_prepared_ahead(depth):
    made: list[int] = []

    def batches() -> Any:
        for i in range(20):
            made.append(i)
            yield i

    ahead = bitring.prefetch(batches(), depth=depth)
    assert next(ahead) == 0
    # Those in the queue, and one that waits for a place.
    wanted, until = 1 + depth + 1, time.monotonic() + 30
    while len(made) < wanted and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)  # more would come now
    assert len(made) == wanted
    assert list(ahead) == list(range(1, 20))


def test_it_works_beside_the_caller():
    inside = threading.Barrier(2, timeout=150)

    def transform(batch: int) -> int:
        inside.wait()
        return batch

    ahead = bitring.prefetch(range(2), transform)
    inside.wait()  # the thread is in transform while this one is here
    inside.wait()
    assert list(ahead) == [0, 1]


def test_an_error_comes_in_its_place():
    def transform(batch: int) -> int:
        if batch == 2:
            raise OSError("no such file")
        return batch

    ahead = bitring.prefetch(range(5), transform)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="no such file"):
        next(ahead)
    assert list(ahead) == []


def test_random_numbers_belong_to_samples():
    def noisy(batch: Any, random: Any) -> Any:
        return np.array([value + each.standard_normal() for value, each in zip(batch[0], random, strict=True)])

    x = np.zeros(12)
    runs = [np.concatenate(list(bitring.prefetch(bitring.Batches(x, x, size), noisy, seed=7))) for size in (1, 5, 12)]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])
    assert len(set(runs[0])) == 12


def test_the_thread_ends_when_it_is_forgotten():
    before = threads()
    ahead: Any = bitring.prefetch(iter(int, 1))
    assert next(ahead) == 0
    assert threads() == before + 1
    del ahead
    until = time.monotonic() + 30
    while threads() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == before


def test_bad_arguments():
    bad: Any = 3
    with pytest.raises(ValueError, match="prefetch: depth must be at least 1; got 0"):
        bitring.prefetch([], depth=0)
    with pytest.raises(TypeError, match="prefetch: batches must be an iterable; got int"):
        bitring.prefetch(bad)
    with pytest.raises(TypeError, match="prefetch: transform must be callable; got int"):
        bitring.prefetch([], bad)
    with pytest.raises(ValueError, match="prefetch: seed is for transform, which is None"):
        bitring.prefetch([], seed=1)
