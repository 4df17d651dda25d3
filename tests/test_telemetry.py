"""What compressed plans tell of their runs, and what happens when a residual diverges."""

from __future__ import annotations

import logging
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from waiting import SharedClock

import bitring
import bitring.compression.plans.plan as plan_module
from bitring.compression.encoder import VALUE_DTYPES, residual_dtype
from bitring.compression.encoders.onebit import OneBit
from bitring.compression.encoders.threshold import Threshold
from bitring.compression.encoders.topk import TopK
from bitring.compression.exchange.owner_exchange import PortableOwnerExchange
from bitring.compression.exchange.run_stats import Norms, RunStats, sample, samples
from bitring.compression.plans import telemetry
from bitring.compression.plans.telemetry import (
    BEHIND,
    DIVERGED,
    OUT_OF_PROPORTION,
    Advice,
    Totals,
    Watch,
    telemetry_of,
)
from bitring.compression.plans.watched_plan import add_owed
from bitring.compression.reducers.randomk import RandomK

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
def test_the_slowest_is_named(comm, agree, monkeypatch, mpi_tmp_path, name):
    plan: Any = bitring.plan_allreduce(np.ones(5000, np.float32), comm=comm, compression=name, hierarchical=False)
    late = comm.size - 1
    clock = SharedClock(comm, mpi_tmp_path, monkeypatch, telemetry)
    for _ in range(3):
        clock.comes_last(late)
        plan()
    if comm.size > 1:
        agree(comm, plan.telemetry.slowest_rank == late, f"{plan.telemetry}")
        agree(comm, plan.telemetry.wait_seconds == (comm.rank != late), f"{plan.telemetry}")
    plan.free()


@each_with_residual
def test_a_residual_that_is_not_finite_makes_sums_exact(comm, agree, caplog, name):
    n = 5000
    x = np.ones(n, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=name, hierarchical=False, shapes=[(50, 100)])
    plan()
    if comm.size == 1:
        return
    if comm.rank == comm.size - 1:
        plan.state_dict()["residual"][17] = np.inf
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
        late = owed(comm, plan, n)
        plan()
        agree(comm, ("diverged" in bitring.explain(plan)) == exact, bitring.explain(plan))
        agree(comm, not exact or bool((x == sum(range(comm.size)) + late).all()), f"{ranks}: {x}")
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
    norms = Norms()
    norms.look_before(samples(x), samples(old))
    norms.look_after(samples(new))
    for found, wanted in ((norms.values, x), (norms.sums, x + old), (norms.residual, new)):
        assert found == pytest.approx(np.linalg.norm(wanted) ** 2, rel=1e-5)
    norms.look_after([np.array([np.inf, np.nan])])
    assert math.isnan(norms.residual)
    stats = RunStats()
    for residual, finite in ((new, True), (np.array([1.0, np.inf]), False), (new, False)):
        stats.look_at_all(residual)
        assert stats.finite == finite


def compressed(comm, compression, n, runs):
    """The sums of a plan's runs, the exact ones, and the plan; ``runs`` are functions of (rank, n)."""
    x = np.zeros(n, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=compression, hierarchical=False)
    got, exact = np.zeros(n), np.zeros(n)
    for run in runs:
        x[:] = run(comm.rank, n)
        mine = x.astype(np.float64)
        exact += comm.allreduce(mine)
        plan()
        got += x
    return got, exact, plan


def owed(comm, plan, n):
    """What all residuals hold."""
    state, mine = plan.state_dict(), np.zeros(n)
    mine += state["residual"]
    if "owner_residual" in state:
        first, last = plan.owned
        mine[first:last] += state["owner_residual"]
    return comm.allreduce(mine)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_residual_that_encoding_makes_larger_is_summed_exactly(comm, agree, monkeypatch, rank):
    """One rank sends four times the levels, and so leaves more than it was given."""
    n, block = 4096, 1024
    right = OneBit.encode

    def encode(self, values, residual, payload, seed=0):
        v = values.astype(residual.dtype) + residual
        used = right(self, values, residual, payload, seed)
        for k, first in enumerate(range(0, v.size, block)):
            at = slice(k * (8 + block // 8), k * (8 + block // 8) + 8)
            levels = 4 * payload[at].copy().view(np.float32)
            payload[at] = levels.view(np.uint8)
            here = v[first : first + block]
            residual[first : first + block] = here - np.where(here >= 0, levels[1], levels[0])
        return used

    monkeypatch.setattr(plan_module, "exchange_for", lambda *_: PortableOwnerExchange)
    if comm.rank == rank % comm.size:
        monkeypatch.setattr(OneBit, "encode", encode)
    runs = [lambda rank, n, k=k: np.random.default_rng((rank, k)).standard_normal(n) for k in range(20)]
    got, exact, plan = compressed(comm, OneBit(block), n, runs)
    if comm.size == 1:
        return
    agree(comm, "diverged" in bitring.explain(plan), bitring.explain(plan))
    agree(comm, not owed(comm, plan, n).any(), "a residual stayed")
    lost = np.abs(got - exact).max()
    agree(comm, lost < 1, f"{lost} of residuals of more than 10,000, known to seven digits")


@pytest.mark.parametrize(
    "compression", [OneBit(), Threshold(tau=2e6), TopK(density=1e-4), RandomK(density=1e-4)], ids=str
)
def test_a_residual_that_is_only_behind_goes_on(comm, agree, caplog, compression):
    """Something large comes once, in a part that the first sample may not have seen, and is sent late."""
    n = 1 << 17

    def first(rank, n):
        return np.where(np.arange(n) < n // 2, np.random.default_rng(rank).standard_normal(n) * 1e6, 1)

    with caplog.at_level(logging.WARNING, "bitring"):
        got, exact, plan = compressed(comm, compression, n, [first] + [lambda rank, n: 1] * 30)
    if comm.size == 1:
        return
    agree(comm, "diverged" not in bitring.explain(plan), bitring.explain(plan))
    lost = np.abs(got + owed(comm, plan, n) - exact).max()
    agree(comm, lost < 10, f"{lost} of some million")
    said = [record for record in caplog.records if "has not been sent yet" in record.getMessage()]
    agree(comm, len(said) <= (comm.rank == 0), f"{said}")


def test_what_stays_behind_is_said_once(comm, agree, caplog):
    """With a threshold that the values take long to come to."""
    n = 100
    with caplog.at_level(logging.WARNING, "bitring"):
        _, _, plan = compressed(comm, Threshold(tau=1e6), n, [lambda rank, n: 1] * 5)
        state = plan.state_dict()
        state["residual"][:] = 2e4
        for _ in range(3):
            plan._flat[:] = 1
            plan()
    said = [record for record in caplog.records if "has not been sent yet" in record.getMessage()]
    agree(comm, len(said) == (comm.size > 1 and comm.rank == 0), f"{said}")
    agree(comm, "diverged" not in bitring.explain(plan), bitring.explain(plan))
    if comm.size > 1:
        agree(comm, plan.telemetry.residual_ratio > 1e4, f"{plan.telemetry}")


@pytest.mark.parametrize("name", ["onebit", "linear", "fixed", "topk", "bfloat16", "sign"])
def test_a_sum_that_overflows_spoils_no_later_one(comm, agree, name):
    """Each rank's values are finite; the owner's residual is not."""
    n = 4096
    runs = [lambda rank, n: 1.0] * 2 + [lambda rank, n: 3e38] + [lambda rank, n: 1.0] * 3
    with np.errstate(over="ignore", invalid="ignore"):
        _, _, plan = compressed(comm, name, n, runs)
    if comm.size > 1:
        agree(comm, "diverged" in bitring.explain(plan), bitring.explain(plan))
        x = plan._flat
        x[:] = comm.rank
        plan()
        agree(comm, bool((x == sum(range(comm.size))).all()), f"{x}")
        left = (array for key, array in plan.state_dict().items() if "residual" in key)
        agree(comm, not any(array.any() for array in left), "a residual stayed")


@pytest.mark.parametrize("name", ["onebit", "powersgd", "randomk"])
def test_a_rank_alone_adds_what_it_is_handed(comm, agree, name):
    """As when training on several ranks goes on on one."""
    x = np.ones(6000, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=MPI.COMM_SELF, compression=name, shapes=[(60, 100)])
    state = {key: array.copy() for key, array in plan.state_dict().items()}
    state["residual"][:] = np.arange(6000)
    plan.load_state_dict(state)
    plan()
    agree(comm, bool((x == 1 + np.arange(6000)).all()), f"{x}")
    agree(comm, not plan.state_dict()["residual"].any(), "a residual stayed")
    plan()
    agree(comm, bool((x == 1 + np.arange(6000)).all()), f"{x}")


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.single
def test_add_owed(dtype):
    x = np.array([1, 2, 3, math.nan, ml_dtypes.finfo(dtype).max], dtype)
    owed = np.array([0.5, math.nan, 1e-4, 1, ml_dtypes.finfo(dtype).max], residual_dtype(dtype))
    before = owed.copy()
    left = add_owed(x, owed)
    exact = 3 + before[2]
    assert x[0] == 1.5
    assert x[1] == 2
    assert x[2] == exact.astype(dtype)
    assert owed[2] == exact - x[2].astype(owed.dtype)
    assert left == bool(owed[2])
    assert np.isnan(x[3])
    if x[4] != ml_dtypes.finfo(dtype).max:  # 16 bits hold the sum neither, float32 and float64 cannot make it
        raise AssertionError(x)
    assert not owed[[0, 1, 3, 4]].any()


@pytest.mark.single
def test_watch():
    far = OUT_OF_PROPORTION**2
    for owner in (False, True):
        watch = Watch()
        for norms, finite, state in [
            (Norms(0.0, 1e20, 1e20), True, 0),  # nothing to compare with
            (Norms(1.0, 1.0, 0.9), True, 0),
            (Norms(0.0, 1.0, 0.9), True, 0),  # a step without samples
            (Norms(0.0, 1.2 * far, 1.1 * far), True, BEHIND),
            (Norms(0.0, 0.9 * far, 1.1 * far), True, DIVERGED),
            (Norms(2.0, 0.9 * far, 1.1 * far), True, 0),
            (Norms(0.0, 1.0, 0.9), False, DIVERGED),
            (Norms(0.0, 1.0, 0.9), True, 0),
        ]:
            watch.look(RunStats(owner_norms=norms, finite=finite) if owner else RunStats(norms=norms, finite=finite))
            assert watch.state == state, norms


@pytest.mark.single
def test_totals():
    totals = Totals()
    for rank, ratio in ((None, 2.0), (1, 4.0), (1, None), (0, 6.0)):
        norms = Norms() if ratio is None else Norms(values=1.0, sums=2.0, residual=ratio**2)
        stats = RunStats(4.0, 1.0, 2.0, 10, norms)
        totals.add(telemetry_of(stats, 0.5, rank))
    taken = totals.taken()
    assert taken["encode_seconds"] == 4
    assert taken["decode_seconds"] == 8
    assert taken["wire_seconds"] == 4
    assert taken["wait_seconds"] == 2
    assert taken["bytes_sent"] == 40
    assert taken["slowest_rank"] == 1
    assert taken["residual_ratio"] == 4
    assert taken["owner_residual_ratio"] is None
    assert totals.taken() == {}
    totals.add(telemetry_of(RunStats(norms=Norms(1.0, 1.0, math.inf)), 0.5, None))
    assert totals.taken()["residual_ratio"] == math.inf


def test_a_residual_that_stays_large_brings_advice_once(comm, agree, caplog):
    """Of values so unlike each other that two levels leave nearly all; normal values bring none."""
    rng, n, runs = np.random.default_rng(comm.rank), 4096, Advice.RUNS
    said = {}
    for spread in (0, 4):
        other, counts = comm.Dup(), []
        with caplog.at_level(logging.WARNING, "bitring"):
            caplog.clear()
            for _ in range(2):  # plans
                x = np.ones(n, np.float32)
                plan = bitring.plan_allreduce(x, comm=other, compression="onebit")
                for _ in range(runs):
                    x[:] = rng.standard_normal(n) * rng.lognormal(sigma=spread, size=n)
                    plan()
                    counts.append(sum("costs accuracy" in record.getMessage() for record in caplog.records))
                plan.free()
        said[spread] = [counts.count(0), counts[-1]]
        other.Free()
    warned = comm.size > 1 and comm.rank == 0
    agree(comm, said == {0: [2 * runs, 0], 4: [runs - 1, 1] if warned else [2 * runs, 0]}, f"{said}")
    agree(comm, not warned or "lower learning rate" in caplog.text, caplog.text)
