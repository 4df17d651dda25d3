"""What compressed plans tell of their runs, and what happens when a residual diverges."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.compression.owner_exchange import Record
from bitring.compression.telemetry import DIVERGED, Totals, Watch, telemetry_of


def test_a_run(comm, agree):
    n = 300_000
    x = np.zeros(n, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression="onebit", hierarchical=False)
    if comm.size == 1:
        assert plan.telemetry is None
        return
    before = 0
    for step in range(4):
        x[:] = np.random.default_rng((comm.rank, step)).standard_normal(n)
        plan()
        t = plan.telemetry
        parts = t.encode_seconds + t.decode_seconds + t.wire_seconds
        agree(comm, math.isclose(parts, t.seconds, rel_tol=1e-6), f"{parts} is not {t.seconds}")
        agree(comm, min(t.encode_seconds, t.decode_seconds, t.wait_seconds) > 0, f"{t}")
        agree(comm, plan.bytes_sent - before == t.bytes_sent, f"{t}")
        before = plan.bytes_sent
        # One bit of a normal value leaves 1 - 2/pi of its square, however much residual is in it.
        agree(comm, abs(t.contraction - (1 - 2 / math.pi)) < 0.1, f"{t}")
        agree(comm, 0.5 < t.residual_ratio < 1.5, f"{t}")
        agree(comm, (t.slowest_rank is None) == (step == 0), f"{t}")
        slowest = comm.allgather(t.slowest_rank)
        agree(comm, len(set(slowest)) == 1, f"{slowest}")
    plan.free()


def test_the_slowest_is_named(comm, agree):
    plan: Any = bitring.plan_allreduce(np.ones(5000, np.float32), comm=comm, compression="onebit", hierarchical=False)
    late = comm.size - 1
    for _ in range(3):
        if comm.rank == late:
            time.sleep(0.1)
        plan()
    if comm.size > 1:
        agree(comm, plan.telemetry.slowest_rank == late, f"{plan.telemetry}")
        agree(comm, comm.rank == late or plan.telemetry.wait_seconds > 0.05, f"{plan.telemetry}")
    plan.free()


def test_a_residual_that_diverges_makes_sums_exact(comm, agree, caplog):
    n = 5000
    x = np.ones(n, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression="onebit", hierarchical=False)
    plan()
    if comm.size == 1:
        return
    state = plan.state_dict()
    if comm.rank == comm.size - 1:
        state["residual"][::2] = 1e6
    with caplog.at_level(logging.WARNING, "bitring"):
        for _ in range(3):
            x[:] = comm.rank
            plan()
    agree(comm, bool((x == sum(range(comm.size))).all()), f"{x}")
    said = [r.getMessage() for r in caplog.records if "diverged, so sums are exact now" in r.getMessage()]
    agree(comm, len(said) == (comm.rank == 0), f"{said}")
    agree(comm, "diverged" in bitring.explain(plan), bitring.explain(plan))
    agree(comm, not any(a.any() for a in plan.state_dict().values()), "a residual stayed")
    # Of ranks that load a state, all or none go on compressing.
    state = {name: np.full_like(a, 0.5) for name, a in plan.state_dict().items()}
    for ranks, exact in ((1, True), (comm.size, False)):
        if comm.rank < ranks:
            plan.load_state_dict(state)
        x[:] = comm.rank
        plan()
        agree(comm, (x[0] == sum(range(comm.size))) == exact, f"{ranks}: {x}")
        agree(comm, ("diverged" in bitring.explain(plan)) == exact, bitring.explain(plan))
    agree(comm, bool((x == sum(range(comm.size)) + 0.5 * (comm.size + 1)).all()), f"{x}")
    plan.free()


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
