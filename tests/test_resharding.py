"""What ranks take from a checkpoint of another number of ranks; no MPI."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from bitring.training.checkpoints.resharding import Owned, Share, shares

pytestmark = pytest.mark.single

SHAPES = {
    ("parameters", "w"): (6,),
    ("optimizer", "v"): (6,),
    ("residual", "w"): (2, 3),
    ("mode", "residual", "w"): (6,),
    ("compression", "runs"): (1,),
}


def made(share: Share, file: dict[str, Any]) -> Any:
    parts = [
        sum((file[member][begin:end] for member in members), np.zeros(end - begin)) for members, begin, end in share
    ]
    return np.concatenate([*parts, np.zeros(0)])


@pytest.mark.parametrize(("old", "new"), list(itertools.product(range(1, 6), repeat=2)))
def test_what_is_owed_keeps_its_sum(old: int, new: int):
    """The owners' parts are cut anew; the rest comes from rank r mod p, or is the same everywhere."""
    rng = np.random.default_rng(old)
    file = {f"{path[0]}{rank}": rng.integers(0, 9, 6).astype(float) for path in SHAPES for rank in range(old)}
    file |= {"owed x": rng.random(6), "owed w": rng.random(5)}
    tables = [{path: f"{path[0]}{rank}" for path in SHAPES} for rank in range(old)]
    bounds = [11 * rank // new for rank in range(new + 1)]
    everyone = [
        shares(
            tables,
            {"x": "owed x", "w": "owed w"},
            SHAPES,
            {"0": Owned(("x", "w"), (6, 5), *bounds[rank : rank + 2])},
            rank,
            new,
        )
        for rank in range(new)
    ]
    owed = np.concatenate([made(each["owner_residual", "0"], file) for each in everyone])
    np.testing.assert_array_equal(owed, np.concatenate([file["owed x"], file["owed w"]]))
    for path in (("residual", "w"), ("mode", "residual", "w")):
        total = sum(made(each[path], file) for each in everyone)
        np.testing.assert_array_equal(total, sum(file[f"{path[0]}{rank}"] for rank in range(old)))
    for rank, each in enumerate(everyone):
        np.testing.assert_array_equal(made(each["optimizer", "v"], file), file[f"optimizer{rank % old}"])
        assert each["compression", "runs"][0].members == ("compression0",)
        if rank >= old:
            assert each["residual", "w"][0].members == ()
