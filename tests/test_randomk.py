"""Random sparsification: what is drawn, and how often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bitring
from bitring.compression.reducers.randomk import RandomK


def test_a_few_lines_of_numpy(comm: Any, agree: Any) -> None:
    """What arrives is the drawn values' sum, one of each cell, with what has gathered there since the last time."""
    n, cells = 1003, 101
    x = np.empty(n)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=RandomK(density=0.1))
    gathered, often, ok = np.zeros(n), np.zeros(n, int), True
    for step in range(200):
        every = [np.random.default_rng((r, step)).standard_normal(n) for r in range(comm.size)]
        gathered += np.sum(every, axis=0)
        x[:] = every[comm.rank]
        plan()
        if comm.size == 1:
            continue
        drawn = np.flatnonzero(x)
        starts = np.arange(cells) * n // cells
        ok = ok and np.array_equal(np.searchsorted(starts, drawn, "right"), np.arange(1, cells + 1))
        ok = ok and np.allclose(x[drawn], gathered[drawn], atol=1e-9)
        gathered[drawn] = 0
        often[drawn] += 1
    agree(comm, ok)
    if comm.size > 1:
        # Each value has one chance in ten a run: 20 of 200, and a standard deviation of 4.2.
        agree(comm, often.min() > 2 and often.max() < 42, f"{often.min()} {often.max()}")
        agree(comm, plan.state_dict()["runs"].tolist() == [200])
    plan.free()


def test_seeds_draw_other_values(comm: Any, agree: Any) -> None:
    drawn = []
    for seed in (0, 0, 1):
        x = np.ones(1000, np.float32)
        plan: Any = bitring.plan_allreduce(x, comm=comm, compression=RandomK(seed=seed))
        plan()
        drawn.append(tuple(np.flatnonzero(x)))
        plan.free()
    agree(comm, drawn[0] == drawn[1] and (comm.size == 1 or drawn[0] != drawn[2]))


def test_density_one_is_exact(comm: Any, agree: Any) -> None:
    x = np.full(77, comm.rank + 1.0)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=RandomK(density=1))
    plan()
    agree(comm, bool((x == comm.size * (comm.size + 1) / 2).all()))
    agree(comm, not plan.state_dict()["residual"].any())
    plan.free()


@pytest.mark.single
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"density": 0}, ValueError, "RandomK: density must be above 0 and at most 1; got 0"),
        ({"density": 1.5}, ValueError, "RandomK: density must be above 0 and at most 1; got 1.5"),
        ({"density": float("nan")}, ValueError, "RandomK: density must be above 0 and at most 1; got nan"),
        ({"density": "1"}, TypeError, "RandomK: density must be a number; got str"),
        ({"seed": 1.0}, TypeError, "RandomK: seed must be an int; got float"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        RandomK(**arguments)


@pytest.mark.gpu
def test_on_a_device(comm: Any, agree: Any) -> None:
    import cupy  # pyright: ignore[reportMissingImports]

    results: list[Any] = []
    for xp in (np, cupy):
        x = xp.zeros(3000, np.float32)
        plan: Any = bitring.plan_allreduce(x, comm=comm, compression="randomk")
        for step in range(5):
            x[:] = xp.asarray(np.random.default_rng((comm.rank, step)).standard_normal(3000).astype(np.float32))
            plan()
        results.append(x if xp is np else x.get())
        plan.free()
    agree(comm, bool(np.allclose(results[0], results[1], rtol=1e-5, atol=1e-6)))
