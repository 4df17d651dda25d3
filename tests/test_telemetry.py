"""What compressed plans tell of their runs, and what happens when a residual diverges."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.compression.record import Record, pieces, sample
from bitring.compression.telemetry import DIVERGED, Totals, Watch, telemetry_of

SHAPE = (300, 1000)

# What a run leaves of the square of values that are normal, however much residual is in them, and how sure that is.
LEFT = {
    "onebit": (1 - 2 / math.pi, 0.1),
    "powersgd": (1, 0.06),  # four ranks of 300
    "randomk": (0.9, 0.02),
    "sufficient_factors": (math.nan, 0),
}

each_compressor = pytest.mark.parametrize("name", LEFT)
each_with_residual = pytest.mark.parametrize("name", [name for name, (left, _) in LEFT.items() if left > 0])


@each_compressor
def test_a_run(comm, agree, name):
    x = np.zeros(math.prod(SHAPE), np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=name, hierarchical=False, shapes=[SHAPE])
    contraction, tolerance = LEFT[name]
    before = 0
    for step in range(4):
        random = np.random.default_rng((comm.rank, step))
        if name == "sufficient_factors":
            plan.take(0, bitring.Factors(*(random.standard_normal((5, side), np.float32) for side in SHAPE)))
        else:
            x[:] = random.standard_normal(x.size)
        plan()
        t = plan.telemetry
        if comm.size == 1:
            assert t is None
            continue
        parts = t.encode_seconds + t.decode_seconds + t.wire_seconds
        agree(comm, math.isclose(parts, t.seconds, rel_tol=1e-6), f"{parts} is not {t.seconds}")
        agree(comm, min(t.encode_seconds, t.decode_seconds, t.wait_seconds) > 0, f"{t}")
        agree(comm, plan.bytes_sent - before == t.bytes_sent, f"{t}")
        before = plan.bytes_sent
        if math.isnan(contraction):
            agree(comm, math.isnan(t.contraction) and math.isnan(t.residual_ratio), f"{t}")
        else:
            agree(comm, abs(t.contraction - contraction) < tolerance and t.contraction < 1, f"{t}")
            # With what the runs before left.
            ratio = math.sqrt(sum(contraction**k for k in range(1, step + 2)))
            agree(comm, ratio / 1.3 < t.residual_ratio < ratio * 1.3, f"{t} where {ratio} was expected")
        agree(comm, (t.slowest_rank is None) == (step == 0), f"{t}")
        slowest = comm.allgather(t.slowest_rank)
        agree(comm, len(set(slowest)) == 1, f"{slowest}")
    plan.free()


@each_compressor
def test_the_slowest_is_named(comm, agree, name):
    plan: Any = bitring.plan_allreduce(np.ones(5000, np.float32), comm=comm, compression=name, hierarchical=False)
    late = comm.size - 1
    for _ in range(3):
        if comm.rank == late:
            time.sleep(0.1)
        plan()
    if comm.size > 1:
        agree(comm, plan.telemetry.slowest_rank == late, f"{plan.telemetry}")
        agree(comm, comm.rank == late or plan.telemetry.wait_seconds > 0.05, f"{plan.telemetry}")
    plan.free()


@each_with_residual
def test_a_residual_that_diverges_makes_sums_exact(comm, agree, caplog, name):
    n = 5000
    x = np.ones(n, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=name, hierarchical=False, shapes=[(50, 100)])
    plan()
    if comm.size == 1:
        return
    state = plan.state_dict()
    if comm.rank == comm.size - 1:
        state["residual"][:] = 1e6 * np.random.default_rng(0).standard_normal(n)
    with caplog.at_level(logging.WARNING, "bitring"):
        for _ in range(3):
            x[:] = comm.rank
            plan()
    agree(comm, bool((x == sum(range(comm.size))).all()), f"{x}")
    said = [r.getMessage() for r in caplog.records if "diverged, so sums are exact now" in r.getMessage()]
    agree(comm, len(said) == (comm.rank == 0), f"{said}")
    agree(comm, "diverged" in bitring.explain(plan), bitring.explain(plan))
    left = (array for key, array in plan.state_dict().items() if "residual" in key)
    agree(comm, not any(array.any() for array in left), "a residual stayed")
    agree(comm, plan.telemetry is None, f"{plan.telemetry}")
    # Of ranks that load a state, all or none go on compressing.
    state = {name: np.full_like(a, 0.5) if "residual" in name else a.copy() for name, a in plan.state_dict().items()}
    for ranks, exact in ((1, True), (comm.size, False)):
        if comm.rank < ranks:
            plan.load_state_dict(state)
        x[:] = comm.rank
        plan()
        agree(comm, ("diverged" in bitring.explain(plan)) == exact, bitring.explain(plan))
        agree(comm, not exact or x[0] == sum(range(comm.size)), f"{ranks}: {x}")
    plan.free()


@pytest.mark.parametrize("name", ["powersgd", "sufficient_factors"])
def test_of_a_trainer(comm, agree, name):
    rng = np.random.default_rng(comm.rank)
    trainer = bitring.DataParallel({"w": np.zeros((200, 300))}, bitring.SGD(lr=0.1), comm=comm, compression=name)
    for _ in range(2):
        trainer.step({"w": bitring.Factors(rng.standard_normal((9, 200)), rng.standard_normal((9, 300)))})
    told: Any = trainer.telemetry()
    if comm.size == 1:
        assert told == {}
    else:
        agree(comm, told["bytes_sent"] == trainer.bytes_sent, f"{told}")
        agree(comm, (told["contraction"] is None) == (name == "sufficient_factors"), f"{told}")
        agree(comm, min(told[f"{part}_seconds"] for part in ("encode", "wire", "decode", "wait")) > 0, f"{told}")
    trainer.free()


@pytest.mark.single
@pytest.mark.parametrize(
    ("n", "share"), [(0, 1), (1, 1), (131_071, 1), (131_072, 1 / 2), (1_048_576, 1 / 16), (9_999_999, 1 / 16)]
)
def test_samples(n, share):
    """All of a small array; of a large one pieces from all over it, each once in sixteen runs."""
    x = np.zeros(n, np.int8)
    for run in range(16):
        parts = sample(x, run)
        assert abs(sum(part.size for part in parts) - n * share) <= 8192
        for part in parts:
            part += 1
    assert (x == 16 * share).all()


@pytest.mark.single
def test_norms():
    x, old, new = np.random.default_rng(0).standard_normal((3, 20_000)).astype(np.float32)
    record = Record()
    record.look_before(pieces(x), pieces(old))
    record.look_after(pieces(new))
    for found, wanted in ((record.values, x), (record.sums, x + old), (record.residual, new)):
        assert found == pytest.approx(np.linalg.norm(wanted) ** 2, rel=1e-5)
    record.look_after([np.array([np.inf, np.nan])])
    assert math.isnan(record.residual)


@pytest.mark.single
def test_watch():
    watch = Watch()
    for values, residual, diverged in [
        (0.0, 1e20, False),  # nothing to compare with
        (1.0, 0.9, False),
        (0.0, 0.9, False),  # a step without samples
        (0.0, 1.1 * DIVERGED**2, True),
        (2.0, 1.1 * DIVERGED**2, False),
        (0.0, math.nan, True),
        (0.0, math.inf, True),
    ]:
        watch.look(Record(values=values, residual=residual))
        assert watch.diverged == diverged, (values, residual)


@pytest.mark.single
def test_totals():
    totals = Totals()
    for rank, ratio in ((None, 2.0), (1, 4.0), (1, math.nan), (0, 6.0)):
        record = Record(4.0, 1.0, 2.0, 10, values=1.0, sums=2.0, residual=ratio**2)
        totals.add(telemetry_of(record, 0.5, rank))
    taken = totals.taken()
    assert taken["encode_seconds"] == 4
    assert taken["decode_seconds"] == 8
    assert taken["wire_seconds"] == 4
    assert taken["wait_seconds"] == 2
    assert taken["bytes_sent"] == 40
    assert taken["slowest_rank"] == 1
    assert taken["residual_ratio"] == 4
    assert totals.taken() == {}
