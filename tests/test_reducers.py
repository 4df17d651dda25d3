"""What every registered reducer must do; a new file in compression/ is covered the moment it exists."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bitring
from bitring.compression.compressor import compressors
from bitring.compression.encoder import VALUE_DTYPES, Encoder
from bitring.compression.reducer import Reducer
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import save_checkpoint
from bitring.training.data_parallel import DataParallel
from bitring.training.optimizers.sgd import SGD

REDUCERS = [cls for name in compressors.names() if issubclass(cls := compressors.get(name), Reducer)]
SHAPES = [(30, 41), (17,), (8, 3, 5), (0, 4), (2, 3), (64, 20)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)

each_reducer = pytest.mark.parametrize("make", REDUCERS, ids=lambda cls: cls.__name__)
each_dtype = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: dtype.name)


def gradient(rank: int, step: int, dtype: Any, n: int = SIZE) -> Any:
    return np.random.default_rng((rank, step)).standard_normal(n).astype(dtype)


def new_plan(x: Any, comm: Any, make: Any, **more: Any) -> Any:
    return bitring.plan_allreduce(x, comm=comm, compression=make(), shapes=SHAPES, **more)


def raised(call: Any, *arguments: Any, **named: Any) -> Any:
    try:
        call(*arguments, **named)
    except Exception as error:
        return error
    return None


def test_registered_beside_the_encoders() -> None:
    names = {
        "powersgd": "PowerSGD",
        "randomk": "RandomK",
        "sufficient_factors": "SufficientFactors",
        "row_owners": "RowOwners",
    }
    assert names.items() <= {name: compressors.get(name).__name__ for name in bitring.compressors()}.items()
    assert not any(issubclass(cls, Encoder) for cls in REDUCERS)
    assert bitring.PowerSGD is compressors.get("powersgd")


@each_reducer
def test_settings_are_frozen_and_equal_by_value(make: Any) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    with pytest.raises(AttributeError):
        make().seed = 1


@each_reducer
@each_dtype
def test_same_bits_everywhere_and_nothing_is_lost(comm: Any, agree: Any, make: Any, dtype: Any) -> None:
    """What was decoded, plus all ranks' residuals, is the sum of all gradients, to rounding."""
    x = np.empty(SIZE, dtype)
    plan = new_plan(x, comm, make)
    applied, given, most = np.zeros(SIZE), np.zeros(SIZE), 0.0
    for step in range(5):
        x[:] = gradient(comm.rank, step, dtype)
        given += np.sum([gradient(r, step, np.float64).astype(dtype).astype(float) for r in range(comm.size)], axis=0)
        plan()
        agree(comm, x.tobytes() == comm.bcast(x.tobytes()), f"step {step}")
        applied += x
        most = max(most, float(np.abs(x.astype(float)).max()))
    state = plan.state_dict()
    for key, array in state.items():
        if key != "residual":
            agree(comm, array.tobytes() == comm.bcast(array.tobytes()), key)
    left = comm.allreduce(state["residual"].astype(float)) if "residual" in state else 0
    tolerance = 40 * float(ml_dtypes.finfo(dtype).eps) * most
    error = float(np.abs(applied + left - given).max())
    agree(comm, error < tolerance, f"{error} with tolerance {tolerance}")
    if "residual" in state and comm.size > 1:
        agree(comm, bool(state["residual"].any()), "there must be a residual")
    plan.free()


@each_reducer
def test_zeros_stay_zero(comm: Any, agree: Any, make: Any) -> None:
    """And what comes after them is summed as if they had not been."""
    x = np.zeros(SIZE, np.float32)
    plan = new_plan(x, comm, make)
    for _ in range(2):
        plan()
        agree(comm, not x.any(), str(x))
    given = np.zeros(SIZE)
    for step in range(2):
        x[:] = gradient(comm.rank, step, np.float32)
        given += x
        plan()
    agree(comm, bool(x.any()) and bool(np.isfinite(x).all()))
    plan.free()


@each_reducer
def test_state_goes_back_in_time(comm: Any, agree: Any, make: Any) -> None:
    x = np.empty(SIZE, np.float32)
    plan = new_plan(x, comm, make)

    def run(steps: range) -> bytes:
        for step in steps:
            x[:] = gradient(comm.rank, step, np.float32)
            plan()
        return x.tobytes()

    run(range(3))
    state = {key: array.copy() for key, array in plan.state_dict().items()}
    later = run(range(3, 6))
    plan.load_state_dict(state)
    agree(comm, run(range(3, 6)) == later)
    error = raised(plan.load_state_dict, {**state, "odd": x})
    agree(comm, isinstance(error, ValueError) and "load_state_dict: state must hold" in str(error), repr(error))
    for key, array in state.items():
        error = raised(plan.load_state_dict, {**state, key: array[:0]})
        agree(comm, isinstance(error, ValueError) and f"{key} must have shape" in str(error), repr(error))
    plan.free()


@each_reducer
@pytest.mark.parametrize("n", [0, 1, 7])
def test_without_shapes_and_few_values(comm: Any, agree: Any, make: Any, n: int) -> None:
    x = np.full(n, comm.rank + 1.0)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=make(), hierarchical=True)
    plan()
    left = plan.state_dict().get("residual", np.zeros(n))
    total = comm.size * (comm.size + 1) / 2
    agree(comm, bool((x + comm.allreduce(left) == total).all()), f"{x} {left}")
    plan.free()


@each_reducer
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_non_finite_raises_everywhere_and_changes_nothing(comm: Any, agree: Any, make: Any, bad: float) -> None:
    x = gradient(comm.rank, 0, np.float32)
    plan = new_plan(x, comm, make)
    plan()
    before = {key: array.copy() for key, array in plan.state_dict().items()}
    x[:] = 1
    if comm.rank == comm.size - 1:
        x[123] = bad
    error = raised(plan)
    if comm.size > 1:
        agree(
            comm, isinstance(error, bitring.NonFiniteError) and f"on rank {comm.size - 1};" in str(error), repr(error)
        )
        agree(comm, x[0] == 1, "x was changed")
    agree(comm, all(np.array_equal(array, before[key]) for key, array in plan.state_dict().items()), "state")
    x[:] = 1
    plan()
    plan.free()


@each_reducer
@pytest.mark.parametrize("algorithm", ["ring", "binomial_tree", "mpi"])
def test_the_exact_sums_run_the_algorithm_asked_for(comm: Any, agree: Any, make: Any, algorithm: str) -> None:
    x = gradient(comm.rank, 0, np.float32)
    plan = new_plan(x, comm, make, algorithm=algorithm)
    plan.start()
    plan.wait()
    agree(comm, x.tobytes() == comm.bcast(x.tobytes()))
    agree(comm, f" by {algorithm};" in bitring.explain(plan), bitring.explain(plan))
    agree(comm, (plan.bytes_sent > 0) == (comm.size > 1))
    plan.free()


def test_a_matrix_brings_its_own_shape(comm: Any, agree: Any) -> None:
    x = np.ones((40, 50), np.float32)
    plan = bitring.plan_allreduce(x, comm=comm, compression="powersgd")
    agree(comm, "1 of 1 parameters travel as" in bitring.explain(plan), bitring.explain(plan))
    plan()
    agree(comm, np.allclose(x, comm.size, rtol=1e-5), f"{x}")
    plan.free()


@each_reducer
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"shapes": [(3,), (4, 5)]}, "shapes must have x's 24 values in all; got 23"),
        ({"shapes": [24]}, r"shapes must be one shape for each parameter; got [24]"),
        ({"shapes": [(-4, -6)]}, r"no side of a shape can be negative; got [(-4, -6)]"),
        ({"op": "MAX"}, "compression is for sums (op=MPI.SUM); got MAX"),
        ({"algorithm": "rings"}, "unknown algorithm 'rings'; known: binomial_tree"),
        ({"x": np.ones(24, np.int32)}, "compression is for float16, bfloat16, float32, float64; got int32"),
    ],
)
def test_bad_arguments(comm: Any, agree: Any, make: Any, arguments: dict[str, Any], text: str) -> None:
    from mpi4py import MPI

    given: dict[str, Any] = {"x": np.ones(24, np.float32), "comm": comm, "compression": make(), **arguments}
    if "op" in given:
        given["op"] = MPI.MAX
    error = raised(bitring.plan_allreduce, **given)
    agree(
        comm,
        isinstance(error, (TypeError, ValueError)) and text in str(error),
        repr(error),
    )


def test_ranks_that_differ_are_named(comm: Any, agree: Any) -> None:
    odd = comm.rank == comm.size - 1
    for text, compression, shapes in (
        ("compression", "onebit" if odd else "powersgd", None),
        ("compression", "powersgd" if odd else "onebit", None),
        ("compression", bitring.PowerSGD(matrix_rank=2 if odd else 3), None),
        ("shapes", "powersgd", [(4, 6)] if odd else [(6, 4)]),
    ):
        error = raised(
            bitring.plan_allreduce, np.ones(24, np.float32), comm=comm, compression=compression, shapes=shapes
        )
        wanted = f"plan_allreduce: ranks disagree on {text}: rank " if comm.size > 1 else "None"
        agree(comm, wanted in repr(error) or wanted in str(error), repr(error))


# In training

PARAMETERS = {"a": (40, 51), "b/c": (7,), "c": (30, 3, 4), "d": (60, 25), "none": (0, 2), "e": ()}


def new_trainer(comm: Any, make: Any, **more: Any) -> Any:
    dtypes = {"d": np.float64}
    parameters = {
        name: np.full(shape, comm.rank + 1, dtypes.get(name, np.float32)) for name, shape in PARAMETERS.items()
    }
    return DataParallel(parameters, SGD(lr=0.1, momentum=0.9), comm=comm, compression=make(), **more)


def train(trainer: Any, steps: int) -> None:
    for _ in range(steps):
        rng = np.random.default_rng((trainer.rank, trainer.steps))
        gradients = {name: (w - rng.standard_normal(w.shape)).astype(w.dtype) for name, w in trainer.parameters.items()}
        trainer.step(gradients, weight=(trainer.rank + trainer.steps) % 3)


def owed(trainer: Any) -> dict[str, Any]:
    """All that the ranks of a trainer still owe, by parameter; collective."""
    left = {}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        state = plan.state_dict()
        if "residual" in state:
            left |= {
                name: trainer.comm.allreduce(part.astype(float)) for name, part in bucket.unflatten(state["residual"])
            }
    return left


def common(trainer: Any) -> dict[str, Any]:
    """What else the plans keep, by parameter."""
    kept = {}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        for key, array in plan.state_dict().items():
            kind, _, number = key.partition("/")
            if kind != "residual":
                kept[f"{kind} {list(bucket.shapes)[int(number)] if number else ''}"] = array.copy()
    return kept


@each_reducer
@pytest.mark.parametrize("mode", ["sync", bitring.Local(tau=3)], ids=str)
def test_a_resumed_run_continues_bit_for_bit(comm: Any, agree: Any, mpi_tmp_path: Any, make: Any, mode: Any) -> None:
    path = mpi_tmp_path / "run.npz"
    through, resumed = (new_trainer(comm, make, mode=mode, warmup_steps=2) for _ in range(2))
    train(through, 6)
    agree(comm, through.digest() == comm.bcast(through.digest()))
    save_checkpoint(path, through)
    state = through.state_dict()
    train(through, 6)
    train(resumed, 1)
    load_checkpoint(path, resumed)
    train(resumed, 6)
    agree(comm, resumed.digest() == through.digest() == comm.bcast(through.digest()), "from the file")
    resumed.load_state_dict(state)
    train(resumed, 6)
    agree(comm, resumed.digest() == through.digest(), "from the state")
    for trainer in (through, resumed):
        trainer.free()


@each_reducer
def test_on_other_numbers_of_ranks_and_other_buckets(comm: Any, agree: Any, mpi_tmp_path: Any, make: Any) -> None:
    """What is owed keeps its sum, what is alike on all ranks stays, replicas stay equal."""
    path = mpi_tmp_path / "run.npz"
    some = comm.size // 2 + 1
    for old, new in sorted({(1, comm.size), (comm.size, 1), (comm.size, some), (some, comm.size)}):
        writers = comm.Split(0 if comm.rank < old else 1, comm.rank)
        kept: Any = None
        if comm.rank < old:
            trainer = new_trainer(writers, make)
            train(trainer, 7)
            save_checkpoint(path, trainer)
            kept = owed(trainer), common(trainer), trainer.digest()
            trainer.free()
        left, same, digest = comm.bcast(kept)
        readers = comm.Split(0 if comm.rank < new else 1, comm.rank)
        ok, found = True, ""
        if comm.rank < new:
            trainer = new_trainer(readers, make, bucket_bytes=100)
            load_checkpoint(path, trainer)
            ok, found = trainer.digest() == digest, "parameters"
            for name, array in owed(trainer).items():
                ok, found = ok and np.allclose(array, left[name], rtol=1e-5, atol=1e-5), f"{found} {name}"
            for name, array in common(trainer).items():
                ok, found = ok and np.array_equal(array, same[name]), f"{found} {name}"
            train(trainer, 3)
            ok = ok and len(set(readers.allgather(trainer.digest()))) == 1
            trainer.free()
        agree(comm, ok, f"{old} -> {new}: {found}")
        readers.Free()
        writers.Free()


@each_reducer
@pytest.mark.parametrize("model", ["softmax", "mlp"])
def test_trains_the_digits_about_as_well_as_the_exact_exchange(comm: Any, agree: Any, make: Any, model: str) -> None:
    pytest.importorskip("sklearn")
    if comm.size > 2:
        pytest.skip("on two ranks; more would take long")
    data = bitring.load("digits")
    batches = bitring.Batches(data.x_train, data.y_train, 96)
    epochs, accuracies = 12, []
    for compression in (None, make()):
        arguments: Any = data.input_shape, data.classes
        net = bitring.Softmax(*arguments) if model == "softmax" else bitring.MLP(*arguments, hidden=(64,))
        trainer = DataParallel(net.parameters, SGD(momentum=0.9), comm=comm, compression=compression)
        product = bitring.Factors if isinstance(compression, bitring.SufficientFactors) else None
        for epoch in range(epochs):
            for x, y in bitring.shard(batches, comm, seed=0, epoch=epoch):
                lr = 0.05 * (1 - trainer.steps / len(batches) / epochs)
                trainer.optimizer = SGD(lr=lr, momentum=0.9)
                trainer.step(net.loss_and_gradients(x, y, product=product)[1], weight=len(x))
        agree(comm, trainer.digest() == comm.bcast(trainer.digest()))
        accuracies.append(net.accuracy(data.x_test, data.y_test))
        trainer.free()
    exact, compressed = accuracies
    agree(comm, exact > 0.92 and compressed >= exact - 0.04, str(accuracies))
