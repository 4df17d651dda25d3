"""The choice of an exchange for each parameter: by predicted seconds, the same on all ranks, and its sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from test_transaction import raised

import bitring
from bitring.training.choices.structure import FACTORS, OWNERS, Structure
from bitring.training.prediction.cluster import Cluster

SHAPES = {"conv": (64, 3, 5, 5), "wide": (1000, 800), "bias": (1000,), "last": (10, 1000)}


def pick(batch: int, ranks: int, bandwidth: float = 1.25e8, encoder: str = "none") -> dict[str, Any]:
    picked = Structure(batch=batch, encoder=encoder).pick(SHAPES, Cluster(ranks, ranks, bandwidth, 1e-5))
    return {name: None if each.compressor is None else type(each.compressor).__name__ for name, each in picked.items()}


@pytest.mark.single
def test_factors_where_they_are_fewer_bytes():
    """By the inequality of the module; the small layer's time is messages."""
    assert pick(8, 4) == {"conv": None, "wide": "SufficientFactors", "bias": None, "last": None}
    assert pick(8, 4, 1.25e10)["wide"] == "RowOwners"  # products cost more than bytes
    assert pick(1000, 4)["wide"] is None
    assert pick(640, 64)["wide"] is None


@pytest.mark.single
def test_an_encoder_only_if_it_is_allowed_and_only_on_slow_networks():
    assert pick(1000, 4, 1.25e8, "onebit")["wide"] == "OneBit"
    assert pick(1000, 4, 1e12, "onebit")["wide"] != "OneBit"
    assert "OneBit" not in pick(1000, 4).values()


@pytest.mark.single
def test_what_was_weighed_is_told():
    picked = Structure(batch=8).pick(SHAPES, Cluster(4, 4, 1.25e8, 1e-5))["wide"]
    assert set(picked.seconds) == {"exact", FACTORS, OWNERS}
    assert picked.words.startswith(f"{FACTORS} ") and " ms, exact " in picked.words


@pytest.mark.single
def test_the_inequality_of_poseidon():
    """Without latency, and with infinitely fast processors, the bytes decide."""
    for samples, shape, ranks in [
        (32, (1000, 800), 4),
        (128, (4096, 9216), 8),
        (400, (500, 500), 2),
        (30, (100, 90), 6),
    ]:
        m, n = shape
        wins = (ranks - 1) * samples * (m + n) < 2 * (ranks - 1) / ranks * m * n
        picked = Structure(batch=samples).pick({"w": shape}, Cluster(ranks, ranks, 1e3, 0.0))["w"]
        factors = picked.seconds.get(FACTORS, math.inf)  # not weighed where the inequality is against them
        assert (factors < picked.seconds["exact"]) == wins, (samples, shape, ranks)


@pytest.mark.parametrize("compression", ["structure:batch=2", Structure(batch=2, bandwidth=1e9, latency=1e-5)])
def test_sums_are_the_dense_ones_to_rounding(comm, agree, compression):
    parameters = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    copies = {name: w.copy() for name, w in parameters.items()}
    trainer = bitring.DataParallel(parameters, bitring.SGD(lr=1.0), comm=comm, compression=compression)
    exact = bitring.DataParallel(copies, bitring.SGD(lr=1.0), comm=comm)
    agree(comm, set(trainer.picked) == set(SHAPES) and len(set(map(str, comm.allgather(trainer.picked)))) == 1)
    rng = np.random.default_rng(comm.rank)
    for _ in range(3):
        u, v = rng.standard_normal((2, 1000), np.float32), rng.standard_normal((2, 800), np.float32)
        gradients = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        trainer.step({**gradients, "wide": bitring.Factors(u, v)})
        exact.step({**gradients, "wide": bitring.Factors(u, v)})
    for name, w in parameters.items():
        agree(comm, np.allclose(w, copies[name], rtol=1e-5, atol=1e-5), name)
    for each in (trainer, exact):
        each.free()


def test_compression_for_comes_first(comm, agree):
    parameters = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    trainer = bitring.DataParallel(
        parameters, bitring.SGD(lr=1.0), comm=comm, compression="structure", compression_for={"w*": "onebit"}
    )
    agree(comm, trainer.compressors["wide"] == bitring.OneBit() and trainer.compressors["bias"] is None)
    trainer.free()


@pytest.mark.parametrize(
    ("compression", "said"),
    [
        ("structure:encoder=powersgd", "encoder must be an encoder's name"),
        ("structure:batch=0", "batch must be at least 1"),
        ("structure:bach=1", "unknown setting 'bach' of the choice structure"),
    ],
)
def test_mistakes(comm, agree, compression, said):
    parameters = {"w": np.zeros(3, np.float32)}
    error = raised(bitring.DataParallel, parameters, bitring.SGD(lr=1.0), comm=comm, compression=compression)
    agree(comm, isinstance(error, ValueError) and said in str(error), repr(error))
