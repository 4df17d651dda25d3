"""The owner exchange against a few lines of NumPy that play all ranks."""

import contextlib
import gc
import itertools
import math
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import fake_device
import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring import arrays
from bitring.compression import encoder as encoder_module
from bitring.compression.encoder import Encoder, compressors, residual_dtype, write_out
from bitring.compression.encoders.fixed import Fixed
from bitring.compression.encoders.onebit import OneBit
from bitring.compression.exchange.layout import lay_out
from bitring.compression.exchange.owner_exchange import NativeOwnerExchange, PortableOwnerExchange, piece_seed
from bitring.compression.kernels.functions import DECODE
from bitring.compression.plans import plan as plan_module
from bitring.compression.reducers import powersgd
from bitring.native import native

LENGTHS = [0, 1, 63, 1024, 1025, 5003]


def gradient(rank: int, step: int, n: int, dtype: Any) -> Any:
    return np.random.default_rng((rank, step)).standard_normal(n).astype(dtype)


class Everyone:
    """All ranks of the exchange in one process."""

    def __init__(
        self,
        n: int,
        dtype: Any,
        size: int,
        boundaries: tuple[int, ...],
        encoder: Encoder,
        shapes: list[tuple[int, ...]] | None = None,
    ) -> None:
        cuts = itertools.pairwise(sorted({0, *boundaries, n}))
        layout = lay_out(encoder, [(b - a,) for a, b in cuts] if shapes is None else shapes, size)
        self.pieces = [piece for chunk in layout.segments for segment in chunk for piece in segment]
        self.size = size
        self.runs = 0
        self.residual = [np.zeros(n, residual_dtype(dtype)) for _ in range(size)]
        self.owner_residual = np.zeros(n, residual_dtype(dtype))
        self.owners = np.zeros(n, int)
        for rank, (a, b) in enumerate(layout.owned):
            self.owners[a:b] = rank

    def encoded(self, encoder: Encoder, values: Any, residual: Any, seed: int, start: int) -> Any:
        payload = np.empty(encoder.nbytes(values.size), np.uint8)
        return payload[: encoder.encode(values, residual, payload, piece_seed(seed, start))]

    def step(self, gradients: list[Any]) -> Any:
        self.runs += 1
        applied = np.zeros_like(gradients[0])
        for a, b, encoder in self.pieces:
            total = np.zeros(b - a, self.owner_residual.dtype)
            for rank, values in enumerate(gradients):
                seed = self.runs * self.size + rank
                payload = self.encoded(encoder, values[a:b], self.residual[rank][a:b], seed, a)
                encoder.decode(payload, total, accumulate=rank > 0)
            seed = ~(self.runs * self.size + int(self.owners[a]))
            encoder.decode(self.encoded(encoder, total, self.owner_residual[a:b], seed, a), applied[a:b])
        return applied


ENCODERS = [
    OneBit(block=64),
    *(made for made in (compressors.get(name)() for name in compressors.names()) if isinstance(made, Encoder)),
]


CASES = [
    *((n, dtype, ENCODERS[0]) for n in LENGTHS for dtype in (np.float32, np.float64, np.float16)),
    *((5003, dtype, encoder) for encoder in ENCODERS[1:] for dtype in (np.float32, np.float16)),
]


@pytest.mark.parametrize(("n", "dtype", "encoder"), CASES, ids=str)
def test_same_bits_as_all_ranks_in_one_process(
    comm: MPI.Intracomm, agree: Any, n: int, dtype: Any, encoder: Encoder
) -> None:
    rank, size = comm.rank, comm.size
    boundaries = (n // 3, n // 2)
    everyone = Everyone(n, dtype, size, boundaries, encoder)
    x = np.zeros(n, dtype)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=encoder, boundaries=boundaries, hierarchical=False)
    applied, given = np.zeros(n), np.zeros(n)
    for step in range(5):
        gradients = [gradient(r, step, n, dtype) for r in range(size)]
        x[:] = gradients[rank]
        plan()
        expected = everyone.step(gradients) if size > 1 else gradients[0]
        agree(comm, x.tobytes() == expected.tobytes(), f"step {step}: {x} is not {expected}")
        applied += x
        given += np.sum([g.astype(float) for g in gradients], axis=0)
    state = plan.state_dict()
    agree(comm, state["residual"].tobytes() == everyone.residual[rank].tobytes(), "residual")
    a, b = plan.owned
    agree(comm, state["owner_residual"].tobytes() == everyone.owner_residual[a:b].tobytes(), "owner_residual")
    # Nothing is lost: what was applied and all residuals make up the gradients.
    left = np.sum(everyone.residual, axis=0, dtype=float) + everyone.owner_residual
    tolerance = {np.float16: 0.1, np.float32: 1e-4, np.float64: 1e-6}[dtype]
    agree(comm, bool(np.allclose(applied + left, given, atol=tolerance, rtol=0)), "something was lost")


@dataclass(frozen=True)
class ByRows(Encoder):
    """Signs and a mean of abs(v) for each row of so many ``columns``; flat, rows of 32. In NumPy alone."""

    columns: int = 32
    block: int = 32

    def grain(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[1:]) if len(shape) > 1 else self.block

    def for_parts(self, shapes: Sequence[tuple[int, ...]]) -> list[Encoder]:
        return [ByRows(self.grain(shape), 2 * self.grain(shape)) if len(shape) > 1 else self for shape in shapes]

    def nbytes(self, n: int) -> int:
        return n + 4 * -(-n // self.columns)

    def encode(self, values: Any, residual: Any, payload: Any, seed: int = 0) -> int:
        at = 0
        for first in range(0, values.size, self.columns):
            v = values[first : first + self.columns] + residual[first : first + self.columns]
            mean = np.float32(np.abs(v).mean())
            residual[first : first + self.columns] = v - np.sign(v) * mean
            payload[at : at + 4] = mean.reshape(1).view(np.uint8)
            payload[at + 4 : at + 4 + v.size] = np.sign(v).astype(np.int8).view(np.uint8)
            at += 4 + v.size
        return at

    def decode(self, payload: Any, out: Any, accumulate: bool = False) -> None:
        at = 0
        for first in range(0, out.size, self.columns):
            here = out[first : first + self.columns]
            mean = payload[at : at + 4].copy().view(np.float32)
            write_out(payload[at + 4 : at + 4 + here.size].view(np.int8) * mean, here, accumulate)
            at += 4 + here.size


SHAPES: list[tuple[int, ...]] = [(50,), (9, 40), (3, 4, 5, 6), (1, 7), (0, 3), (100,), (64, 256), (5000,)]


@pytest.mark.parametrize("encoder", [ByRows(), OneBit(), OneBit(levels="rank_one"), OneBit(levels="row")], ids=str)
def test_panels_have_the_same_bits_as_all_ranks_in_one_process(comm: MPI.Intracomm, agree: Any, encoder: Any) -> None:
    rank, size, n = comm.rank, comm.size, sum(map(math.prod, SHAPES))
    everyone = Everyone(n, np.float32, size, (), encoder, SHAPES)
    x = np.zeros(n, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=encoder, shapes=SHAPES, hierarchical=False)
    for step in range(4):
        gradients = [gradient(r, step, n, np.float32) for r in range(size)]
        x[:] = gradients[rank]
        plan()
        expected = everyone.step(gradients) if size > 1 else gradients[0]
        agree(comm, x.tobytes() == expected.tobytes(), f"step {step}: {x} is not {expected}")
    sent = 4 * plan.expected_nbytes if size > 1 else 0
    agree(comm, plan.bytes_sent == sent, f"{plan.bytes_sent} bytes were sent, {sent} expected")
    state = plan.state_dict()
    a, b = plan.owned
    agree(comm, state["residual"].tobytes() == everyone.residual[rank].tobytes(), "residual")
    agree(comm, state["owner_residual"].tobytes() == everyone.owner_residual[a:b].tobytes(), "owner_residual")
    plan.free()


def test_the_shape_of_x_is_that_of_its_parameter(comm: MPI.Intracomm, agree: Any) -> None:
    """Unless boundaries tell of others: what they cut off is flat, and so is what has one inside."""
    if comm.size == 1:
        return
    sums: list[bytes] = []
    cases: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
        ((8, 30), {}),
        ((240,), {"shapes": [(8, 30)]}),
        ((240,), {"shapes": [(8, 30)], "boundaries": (0, 240)}),
        ((240,), {}),
        ((8, 30), {"boundaries": (0,), "shapes": [(240,)]}),
        ((8, 30), {"boundaries": (1,)}),
        ((240,), {"boundaries": (1,)}),
    )
    for shape, options in cases:
        x = gradient(comm.rank, 0, 240, np.float32).reshape(shape)
        plan = bitring.plan_allreduce(x, comm=comm, compression=ByRows(), hierarchical=False, **options)
        plan()
        sums.append(x.tobytes())
        plan.free()
    same = [[a == b for b in sums].index(True) for a in sums]
    agree(comm, same == [0, 0, 0, 3, 3, 5, 5], f"{same}")


@pytest.mark.parametrize("encoder", [ByRows(), OneBit(levels="rank_one")], ids=str)
def test_lanes_keep_whole_rows_together(two_nodes: Any, agree: Any, encoder: Any) -> None:
    """Lanes cut parameters anywhere: what is no whole row is flat, nothing is lost, and all ranks get the same."""
    comm, n = two_nodes, sum(map(math.prod, SHAPES))
    x = comm.empty(n)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=encoder, shapes=SHAPES)
    applied, given = np.zeros(n), np.zeros(n)
    for step in range(4):
        x[:] = gradient(comm.rank, step, n, np.float32)
        given += comm.allreduce(x.astype(float))
        plan()
        agree(comm, len(set(comm.allgather(x.tobytes()))) == 1, "replicas differ")
        applied += x
    state = plan.state_dict()
    owed = state["residual"].astype(float)
    owed[slice(*plan.owned)] += state["owner_residual"]
    left = comm.allreduce(owed)
    agree(comm, bool(np.allclose(applied + left, given, atol=1e-3, rtol=0)), "something was lost")
    plan.free()


def test_nodes_sum_exactly_first(comm: MPI.Intracomm, agree: Any) -> None:
    """All ranks here are one node: nothing is left to compress, so the sum is exact, and no rank has residuals."""
    gradients = [gradient(r, 0, 5000, np.float64).round(8) for r in range(comm.size)]
    x = gradients[comm.rank].copy()
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression="onebit", hierarchical=True)
    plan.load_state_dict({name: np.full_like(a, 0.5) for name, a in plan.state_dict().items()})
    once = sum(gradients) + 0.5 * comm.size * sum(a.size > 0 for a in plan.state_dict().values())
    plan()
    agree(comm, bool(np.allclose(x, once, rtol=0, atol=1e-12)), f"{x} is not {once}")
    agree(comm, not any(a.any() for a in plan.state_dict().values()), "a residual stayed")
    agree(comm, comm.size == 1 or "on one node, whose sum is exact" in bitring.explain(plan), bitring.explain(plan))
    agree(comm, plan.telemetry is None, f"{plan.telemetry}")
    plan.free()


@pytest.mark.parametrize("n", [0, 1, 5003, 300_007])
def test_between_nodes(two_nodes: Any, agree: Any, n: int) -> None:
    """Nodes sum exactly, lanes exchange: nothing is lost, all ranks get the same bits, and residuals can be moved."""
    comm, rng = two_nodes, np.random.default_rng(two_nodes.rank)
    x = comm.empty(n)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression="onebit")
    applied, given = np.zeros(n), np.zeros(n)
    for step in range(6):
        sent = plan.bytes_sent
        x[:] = rng.standard_normal(n)
        given += comm.allreduce(x.astype(float))
        if step == 3:  # what is elsewhere is added there
            states = comm.allgather({name: a.copy() for name, a in plan.state_dict().items()})
            moved = states[(comm.rank + 1) % comm.size]["residual"]
            plan.load_state_dict({"residual": moved, "owner_residual": plan.state_dict()["owner_residual"]})
        plan()
        agree(comm, len(set(comm.allgather(x.tobytes()))) == 1, "replicas differ")
        agree(comm, plan.telemetry.bytes_sent == plan.bytes_sent - sent, f"{plan.telemetry}, {plan.bytes_sent - sent}")
        applied += x
    state = plan.state_dict()
    owed = state["residual"].astype(float)
    owed[slice(*plan.owned)] += state["owner_residual"]
    left = comm.allreduce(owed)
    agree(comm, bool(np.allclose(applied + left, given, atol=1e-3, rtol=0)), "something was lost")
    agree(comm, n < 2 or bool(left.any()), "nothing was encoded")
    owned = sorted(comm.allgather(plan.owned))
    agree(comm, sum(b - a for a, b in owned) == n, f"{owned} do not make up {n}")
    plan.free()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_rank_alone_adds_what_it_is_handed(comm: MPI.Intracomm, agree: Any, dtype: Any) -> None:
    """Residuals of more ranks, which a checkpoint has brought: what the dtype cannot hold stays owed."""
    alone = MPI.Intracomm(comm.Split(comm.rank))
    x = np.ones(3000, dtype)
    plan = bitring.plan_allreduce(x, comm=alone, compression="onebit")
    tiny = 2.0**-13
    plan.load_state_dict({name: np.full_like(a, 0.25 + tiny) for name, a in plan.state_dict().items()})
    plan()
    state = plan.state_dict()
    owed = state["residual"] + state["owner_residual"]
    agree(comm, bool((x + owed == 1.5 + 2 * tiny).all()) and x[0] >= 1.5, f"{x} {state}")
    x[:] = 0
    plan()
    agree(comm, bool((x == owed).all()) and not any(a.any() for a in state.values()), f"{x} {state}")
    plan.free()
    alone.Free()


def test_what_16_bits_cannot_hold_stays_owed(two_nodes: Any, agree: Any) -> None:
    """A residual of values that other ranks exchange is added to this one's, and not rounded away there."""
    n, tiny = 300, 2.0**-12
    plan: Any = bitring.plan_allreduce(np.ones(n, np.float16), comm=two_nodes, compression="onebit")
    plan.load_state_dict({name: np.full_like(a, tiny) for name, a in plan.state_dict().items()})
    plan()
    elsewhere = plan.state_dict()["residual"]
    first, last = plan._route.extent
    elsewhere[first:last] = tiny
    agree(two_nodes, bool((elsewhere == tiny).all()), f"{elsewhere}")
    plan.free()


MIXED = """
import os, sys
if (os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
    os.environ["BITRING_NATIVE"] = "0"
import numpy as np
from mpi4py import MPI
import bitring
comm, n = MPI.COMM_WORLD, 1 << 19
for name in ("onebit", "topk"):
    x = np.zeros(n, np.float32)
    plan = bitring.plan_allreduce(x, comm=comm, compression=name, hierarchical=False)
    total, exact = np.zeros(n), np.zeros(n)
    for step in range(3):
        x[:] = np.random.default_rng((comm.rank, step)).standard_normal(n)
        exact += comm.allreduce(x.astype(float))
        plan()
        total += x
    state = plan.state_dict()
    owed = state["residual"].astype(float)
    owed[slice(*plan.owned)] += state["owner_residual"]
    assert np.allclose(total + comm.allreduce(owed), exact, atol=1e-4), name
    plan.free()
"""


@pytest.mark.single
def test_ranks_with_and_without_the_native_engine(on_ranks: Any) -> None:
    """Messages of the two exchanges differ for chunks of more than one segment."""
    done = on_ranks(2, "-c", MIXED)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.single
@pytest.mark.skipif(native() is None, reason="there is no native engine here")
def test_native_operations_leave_python_to_other_threads() -> None:
    """A thread that waits for MPI's lock with Python's in hand hangs with one that polls the other way round."""
    n = 1 << 24
    exchange = NativeOwnerExchange(MPI.COMM_SELF, np.ones(n, np.float32), lay_out(Fixed(block=n), [(n,)], 1), 0)
    exchange.bind(np.ones(n, np.float32))
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.is_set():
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(10):  # the other thread may have no core for a while
            exchange.prepare()
            exchange.operation.begin()
            began = time.perf_counter()
            exchange.operation.advance()  # encodes all of it
            took = time.perf_counter() - began
            while not exchange.operation.over:
                exchange.operation.advance()
            if any(began + took / 4 < at < began + 3 * took / 4 for at in ticks):
                return
            ticks.clear()
    finally:
        over.set()
        thread.join()
    pytest.fail("no other thread ran in the middle of native code")


@pytest.mark.parametrize("compression", ["onebit", "powersgd"])
@pytest.mark.parametrize("argument", ["check_finite", "hierarchical"])
def test_flags_must_be_bools(comm: MPI.Intracomm, agree: Any, compression: str, argument: str) -> None:
    last = comm.rank == comm.size - 1
    wrong: dict[str, Any] = {argument: np.ones(2)} if last else {}
    x = np.ones((8, 8), np.float32)
    try:
        bitring.plan_allreduce(x, comm=comm, compression=compression, **wrong)
        text = ""
    except (TypeError, bitring.PeerError) as error:
        text = f"{type(error).__name__}: {error}"
    said = text.startswith("TypeError" if last else "PeerError") and f"{argument} must be a bool" in text
    agree(comm, said, text)


def test_boundaries_must_be_ints(comm: MPI.Intracomm, agree: Any) -> None:
    wrong: list[Any] = [["a"], [2.5]]
    for boundaries in wrong:
        try:
            bitring.plan_allreduce(np.ones(5, np.float32), comm=comm, compression="onebit", boundaries=boundaries)
            text = ""
        except TypeError as error:
            text = str(error)
        agree(comm, "boundaries must be positions in x, ints; got" in text, text)


@pytest.mark.parametrize("native", [True, False])
def test_a_rank_that_fails_alone(
    comm: MPI.Intracomm, agree: Any, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """It says so, the others do not wait for it, and no later exchange takes what is left of this one for its own."""
    if comm.size == 1:
        return
    last = comm.size - 1
    if comm.rank == last:
        refused = DECODE(lambda *_: -1)
        monkeypatch.setattr(encoder_module, "decode_function", lambda *_: refused)
    if not native:
        monkeypatch.setattr(plan_module, "exchange_for", lambda *_: PortableOwnerExchange)
    other = comm.Dup()
    x = np.ones(5000, np.float32)
    plan = bitring.plan_allreduce(x, comm=other, compression="topk:block=512", hierarchical=False)
    said: list[str] = []
    for _ in range(2):
        try:
            plan()
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    texts = ("payload that came is not one of", "payload must have been encoded for")
    wanted = texts if comm.rank == last else (f"PeerError: {plan.what}: rank {last} has failed in it",)
    agree(comm, len(said) == 2 and any(text in said[0] for text in wanted), f"{said}")
    agree(comm, "RuntimeError: " in said[1] and "unusable since" in said[1], f"{said}")


@pytest.mark.parametrize("broken", ["kernels", "x"])
@pytest.mark.parametrize("compression", ["onebit", "powersgd"])
def test_one_rank_that_cannot_make_a_plan(
    comm: MPI.Intracomm, agree: Any, monkeypatch: pytest.MonkeyPatch, compression: str, broken: str
) -> None:
    class Broken:
        def __dlpack_device__(self) -> Any:
            raise BufferError("no room to compile")

    def fail(*_: Any) -> None:
        raise OSError("no room to compile")

    last = comm.size - 1
    x: Any = np.ones(100, np.float32)
    if comm.rank == last and broken == "kernels":
        monkeypatch.setattr(OneBit, "warm_up", fail)
        monkeypatch.setattr(powersgd, "warm_up", fail)
    if comm.rank == last and broken == "x":
        x = Broken()
    said: Any = None
    try:
        bitring.plan_allreduce(x, comm=comm, compression=compression, shapes=[(10, 10)])
    except Exception as error:
        said = error
    if (comm.size, compression, broken) == (1, "powersgd", "kernels"):
        agree(comm, said is None, f"{said!r}")  # one rank needs none
        return
    kind = type(said).__name__
    wanted = {"kernels": "OSError", "x": "TypeError"}[broken] if comm.rank == last else "PeerError"
    agree(comm, kind == wanted and "no room to compile" in str(said), f"{said!r}")


def test_device_memory_wants_kernels_for_it(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arrays.devices, "fake_device", fake_device.FakeDevice)
    x = fake_device.array(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="Sign: arrays must be in host memory, it has no kernels for a device"):
        bitring.plan_allreduce(x, comm=comm, compression="sign")
    arrays._made.pop("fake_device", None)


def test_bytes_sent_counts_payloads(comm: MPI.Intracomm, agree: Any) -> None:
    n, size = 64 << 10, comm.size
    plan = bitring.plan_allreduce(np.ones(n, np.float32), comm=comm, compression="onebit", hierarchical=False)
    plan()
    plan()
    payload = bitring.OneBit().nbytes(n)
    total = comm.allreduce(plan.bytes_sent)
    agree(comm, total == 2 * 2 * (size - 1) * payload, f"{total} bytes sent by all")
    plan.free()


@pytest.mark.parametrize("dtype", [np.float32, arrays.BFLOAT16], ids=str)
@pytest.mark.parametrize("hierarchical", [False, True])
def test_past_the_engine_as_through_it(comm: MPI.Intracomm, agree: Any, dtype: Any, hierarchical: bool) -> None:
    """The same bits, counts and residuals, also around a run that one rank refuses, and one that is taken back."""
    x, y = np.zeros((2, 5000), dtype)
    plans: list[Any] = [
        bitring.plan_allreduce(each, comm=comm, compression="onebit:block=512", hierarchical=hierarchical)
        for each in (x, y)
    ]
    plans[1]._past_engine = None  # that one goes through the engine
    rng = np.random.default_rng(comm.rank)
    for run in range(6):
        x[:] = y[:] = rng.standard_normal(x.size)
        if run == 2 and comm.rank == comm.size - 1:
            x[-1] = y[-1] = np.inf
        raised = [False, False]
        for k, plan in enumerate(plans):
            if run == 4:
                plan.mark()
            try:
                plan()
            except bitring.NonFiniteError:
                raised[k] = True
            if run == 4:
                plan.undo()
        agree(comm, raised == [run == 2] * 2, f"run {run}: {raised}")
        agree(comm, x.tobytes() == y.tobytes(), f"run {run}: sums differ")
        states = [plan.state_dict() for plan in plans]
        same = all(states[0][name].tobytes() == states[1][name].tobytes() for name in states[0])
        agree(comm, same, f"run {run}: residuals differ")
        told = [(p.bytes_sent, None if p.telemetry is None else p.telemetry.residual_ratio) for p in plans]
        agree(comm, repr(told[0]) == repr(told[1]), f"run {run}: {told}")
    for plan in plans:
        plan.free()


@pytest.mark.parametrize("hierarchical", [False, True])
def test_a_plan_that_nobody_has_any_more_is_gone_at_once(comm: MPI.Intracomm, agree: Any, hierarchical: bool) -> None:
    plan = bitring.plan_allreduce(np.ones(9, np.float32), comm=comm, compression="sign", hierarchical=hierarchical)
    plan()
    plan.start()
    plan.wait()
    alive = weakref.ref(plan)
    gc.disable()
    try:
        del plan
        gone = alive() is None
    finally:
        gc.enable()
    agree(comm, gone, "it is part of a cycle")


def test_an_interrupt_in_a_run_past_the_engine_leaves_residuals_as_they_were(comm: MPI.Intracomm, agree: Any) -> None:
    own: Any = bitring.Communicator(comm.Dup())
    x = gradient(comm.rank, 0, 3000, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=own, compression="onebit", hierarchical=False)
    plan()
    before = {name: a.copy() for name, a in plan.state_dict().items()}
    x[:] = gradient(comm.rank, 1, 3000, np.float32)
    run: Any = getattr(plan, "_run_past_engine", None)
    interrupts = comm.rank == comm.size - 1

    def interrupted() -> Any:
        run()
        raise KeyboardInterrupt  # as where a signal came meanwhile

    if interrupts and run is not None:
        plan._run_past_engine = interrupted
    raised = False
    with contextlib.suppress(bitring.PeerError):  # where the others were late
        try:
            plan()
        except KeyboardInterrupt:
            raised = True
    same = all(np.array_equal(before[name], a) for name, a in plan.state_dict().items())
    agree(comm, raised == (interrupts and run is not None) and (same or not raised), f"{raised}, {same}")


def test_a_plan_of_a_communicator_that_was_freed_says_so(comm: MPI.Intracomm) -> None:
    own: Any = bitring.Communicator(comm.Dup())
    plan: Any = bitring.plan_allreduce(np.ones(9, np.float32), comm=own, compression="sign", hierarchical=False)
    plan()
    own.Free()
    with pytest.raises(RuntimeError, match="unusable since it was freed"):
        plan()


def test_who_is_refused_changes_nothing_of_a_run_that_another_thread_is_in(
    comm: MPI.Intracomm, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: Any = bitring.plan_allreduce(
        np.ones(9, np.float32), comm=comm, compression="sign", hierarchical=False, check_finite=False
    )
    plan()
    touched: list[str] = []
    if plan._past_engine is not None:
        monkeypatch.setattr(plan, "_fast_path", SimpleNamespace(inside=1))
        monkeypatch.setattr(plan, "_prepare", lambda: touched.append("prepared"))
        plan._pass_engine()
    agree(comm, not touched, f"{touched}")
    plan.free()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_raises_everywhere_and_changes_nothing(comm: MPI.Intracomm, agree: Any, bad: float) -> None:
    culprit = comm.size - 1
    x = gradient(comm.rank, 0, 3000, np.float32)
    plan = bitring.plan_allreduce(x, comm=comm, compression="onebit", hierarchical=False)
    plan()
    before = {name: a.copy() for name, a in plan.state_dict().items()}
    x[:] = 1
    if comm.rank == culprit:
        x[1234] = bad
    message = ""
    try:
        plan()
    except bitring.NonFiniteError as error:
        message = str(error)
    agree(comm, f"NaN or Inf on rank {culprit}" in message, message)
    agree(comm, x[0] == 1, "x was changed")
    same = all((a == before[name]).all() for name, a in plan.state_dict().items())
    agree(comm, same, "residuals were changed")
    x[:] = 1
    plan()
    plan.free()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"compression": "twobit"}, "unknown compressor 'twobit'; known: "),
        ({"compression": 3}, "compression must be None, a registered name ("),
        ({"compression": "onebit", "op": MPI.MAX}, "compression is for sums (op=MPI.SUM); got MAX"),
        ({"compression": "onebit", "algorithm": "rings"}, "unknown algorithm 'rings'; known: binomial_tree"),
    ],
)
def test_bad_arguments(comm: MPI.Intracomm, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        bitring.plan_allreduce(np.ones(4, np.float32), comm=comm, **arguments)
    assert text in str(caught.value)


def test_compression_is_for_floats(comm: MPI.Intracomm) -> None:
    with pytest.raises(TypeError, match="compression is for float16, bfloat16, float32, float64; got int32"):
        bitring.plan_allreduce(np.ones(4, np.int32), comm=comm, compression="onebit")


@pytest.mark.parametrize("differs", ["compression", "boundaries"])
def test_ranks_that_differ_are_named(comm: MPI.Intracomm, agree: Any, differs: str) -> None:
    odd = comm.rank == comm.size - 1
    arguments: dict[str, Any] = {
        "compression": OneBit(block=128 if odd and differs == "compression" else 64),
        "boundaries": (7,) if odd and differs == "boundaries" else (8,),
    }
    message = ""
    try:
        bitring.plan_allreduce(np.ones(100, np.float32), comm=comm, **arguments)
    except bitring.MismatchError as error:
        message = str(error)
    wanted = f"plan_allreduce: ranks disagree on {differs}: rank " if comm.size > 1 else ""
    agree(comm, wanted in message, message)


def test_state_of_another_shape_is_refused(comm: MPI.Intracomm) -> None:
    plan = bitring.plan_allreduce(np.ones(100, np.float32), comm=comm, compression="onebit")
    with pytest.raises(ValueError, match=r"residual must have shape \(100,\) and dtype float32; got \(99,\)"):
        plan.load_state_dict({**plan.state_dict(), "residual": np.zeros(99, np.float32)})
    with pytest.raises(ValueError, match=r"state must hold \['owner_residual', 'residual'\]; got \['residual'\]"):
        plan.load_state_dict({"residual": np.zeros(100, np.float32)})


def test_kernels_run_beside_a_loop(comm: MPI.Intracomm, agree: Any) -> None:
    """Started plans of both kinds, in order, on the progress thread."""
    n = 100_003
    x, y = np.ones(n, np.float32), np.full(n, 2.0, np.float64)
    plans = [bitring.plan_allreduce(x, comm=comm, compression="onebit"), bitring.plan_allreduce(y, comm=comm)]
    for _ in range(3):
        x[:], y[:] = 1, 2
        for plan in plans:
            plan.start()
        for plan in reversed(plans):
            plan.wait()
        agree(comm, bool((x == comm.size).all() and (y == 2 * comm.size).all()), f"{x} {y}")
    for plan in plans:
        plan.free()


@pytest.mark.parametrize(
    ("here", "there", "text"),
    [
        (
            "onebit",
            None,
            "disagree on compression: rank {last} gave OneBit(block=1024, levels='auto'), rank 0 gave none",
        ),
        (
            None,
            "onebit",
            "disagree on compression: rank {last} gave none, rank 0 gave OneBit(block=1024, levels='auto')",
        ),
        ("powersgd", "onebit", "disagree on compression: rank {last} gave PowerSGD("),
    ],
)
def test_ranks_that_differ_in_compression(comm: MPI.Intracomm, agree: Any, here: Any, there: Any, text: str) -> None:
    if comm.size == 1:
        return
    last = comm.size - 1
    said = ""
    try:
        bitring.plan_allreduce(np.ones(4, np.float32), comm=comm, compression=here if comm.rank == last else there)
    except bitring.MismatchError as error:
        said = str(error)
    agree(comm, text.format(last=last) in said, said)
