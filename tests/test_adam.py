"""Adam and 1-bit Adam: their definitions, and training with them: replicas, failures, checkpoints, placements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bitring
from bitring.arrays import BFLOAT16
from bitring.errors import NonFiniteError, PeerError
from bitring.training.data_parallel import DataParallel
from bitring.training.optimizers.adam import Adam
from bitring.training.optimizers.onebit_adam import OneBitAdam
from bitring.training.step.undo import arrays_in

SHAPES = {"a": (40, 51), "b": (7,), "c": (5000,), "d": ()}


def gradients_of(rank: int, step: int, dtype: Any = np.float32) -> dict[str, Any]:
    random = np.random.default_rng([rank, step])
    return {name: np.asarray(random.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def new_trainer(comm: Any, optimizer: Any, **more: Any) -> DataParallel:
    return DataParallel(gradients_of(99, 0), optimizer, comm=comm, bucket_bytes=9000, **more)


def weight_of(rank: int, step: int) -> int:
    return (rank + step) % 3 + 1


def train(trainer: DataParallel, steps: int) -> None:
    for _ in range(steps):
        trainer.step(gradients_of(trainer.rank, trainer.steps), weight=weight_of(trainer.rank, trainer.steps))


def mean(size: int, step: int) -> dict[str, Any]:
    weights = [weight_of(rank, step) for rank in range(size)]
    parts = [gradients_of(rank, step, np.float64) for rank in range(size)]
    return {
        name: sum(w * g[name] for w, g in zip(weights, parts, strict=True)) / sum(weights)  # type: ignore[misc]
        for name in SHAPES
    }


def everything(trainer: DataParallel) -> list[Any]:
    kept = [(at, x.tobytes()) for at, x in arrays_in(trainer.live())]
    return [kept, [{k: x.tobytes() for k, x in plan.state_dict().items()} for plan in trainer.plans], trainer.steps]


def raised(call: Any, *arguments: Any, **named: Any) -> Any:
    try:
        call(*arguments, **named)
    except Exception as error:
        return error
    return None


def adam(w: Any, m: Any, v: Any, g: Any, t: int, s: Adam) -> tuple[Any, Any, Any]:
    """One step as the module writes it."""
    if not s.decoupled:
        g = g + s.weight_decay * w
    m = s.beta1 * m + (1 - s.beta1) * g
    v = s.beta2 * v + (1 - s.beta2) * g**2
    if s.decoupled:
        w = w - s.lr * s.weight_decay * w
    return w - s.lr * (m / (1 - s.beta1**t)) / (np.sqrt(v / (1 - s.beta2**t)) + s.eps), m, v


@pytest.mark.single
@pytest.mark.parametrize(
    "settings", [Adam(), Adam(lr=0.1, beta1=0.5, weight_decay=0.1), Adam(weight_decay=0.1, decoupled=True)], ids=str
)
@pytest.mark.parametrize("shape", [(), (0,), (7, 3), (65537,)], ids=str)
def test_equals_the_definition(settings, shape):
    rng = np.random.default_rng(0)
    w = np.array(rng.standard_normal(shape))
    expected, m, v = w.copy(), np.zeros(shape), np.zeros(shape)
    state = settings.init({"w": w})
    for t in range(1, 6):
        g = np.array(rng.standard_normal(shape))
        settings.update({"w": w}, {"w": g}, state)
        expected, m, v = adam(expected, m, v, g, t, settings)
    np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(state["variance"]["w"], v, rtol=1e-12)


@pytest.mark.single
def test_known_values():
    """The first step is lr long, whatever the gradient; the second is m̂/√v̂ of gradients 3 and 1."""
    w = np.array([1.0])
    settings = Adam(lr=0.1, eps=1e-12)
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.array([3.0])}, state)
    assert w[0] == pytest.approx(0.9)
    settings.update({"w": w}, {"w": np.array([1.0])}, state)
    m, v = (0.9 * 0.3 + 0.1) / 0.19, (0.999 * 0.009 + 0.001) / (1 - 0.999**2)
    assert w[0] == pytest.approx(0.9 - 0.1 * m / v**0.5)


@pytest.mark.single
def test_after_a_restart_the_momentum_is_corrected_anew():
    w = np.zeros(3)
    settings = Adam(lr=0.1)
    state = settings.init({"w": w})
    for _ in range(20):
        settings.update({"w": w}, {"w": np.ones(3)}, state)
    settings.restart(state)
    before, variance = w.copy(), state["variance"]["w"].copy()
    assert not state["momentum"]["w"].any() and variance.all()
    settings.update({"w": w}, {"w": np.ones(3)}, state)
    np.testing.assert_allclose(before - w, 0.1, rtol=1e-6)


@pytest.mark.single
@pytest.mark.parametrize("settings", [Adam(), OneBitAdam(freeze_step=1)], ids=str)
def test_float16_has_no_eps(settings):
    """Where squares vanish there is no step: not NaN, and none of any size."""
    w = np.ones(3, np.float16)
    state = settings.init({"w": w})
    for _ in range(3):
        settings.update({"w": w}, {"w": np.array([0, 1e-4, 1], np.float16)}, state)
    assert w[0] == 1 and w[1] == 1 and 0.98 < w[2] < 1


@pytest.mark.single
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Adam(lr=0), "Adam: lr must be above 0 and finite; got 0"),
        (lambda: Adam(beta2=1.0), "Adam: beta2 must be at least 0 and below 1; got 1.0"),
        (lambda: Adam(eps=0), "Adam: eps must be above 0 and finite; got 0"),
        (lambda: Adam(decoupled=True), "Adam: decoupled=True needs weight_decay > 0, got weight_decay=0"),
        (lambda: OneBitAdam(freeze_step=0), "OneBitAdam: freeze_step must be at least 1; got 0"),
    ],
    ids=str,
)
def test_wrong_settings(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.single
def test_as_text():
    assert bitring.training.optimizer.optimizers.get("onebit_adam") is bitring.OneBitAdam  # type: ignore[attr-defined]
    trainer = DataParallel([np.ones(3)], "adam:lr=1e-3,weight_decay=0.1,decoupled=true")
    assert trainer.optimizer == bitring.Adam(lr=1e-3, weight_decay=0.1, decoupled=True)


@pytest.mark.parametrize("at_once", [True, False])
def test_training_is_that_of_one_process_and_replicas_are_equal(comm, agree, at_once):
    settings = Adam(lr=0.01, weight_decay=0.01)
    trainer = new_trainer(comm, settings)
    w = gradients_of(99, 0, np.float64)
    state = settings.init(w)
    for step in range(20):
        gradients = gradients_of(comm.rank, step)
        if at_once:
            trainer.step(gradients, weight=weight_of(comm.rank, step))
        else:
            trainer.begin(weight=weight_of(comm.rank, step))
            for name in reversed(list(gradients)):
                trainer.ready(name, gradients[name])
            trainer.step()
        settings.update(w, mean(comm.size, step), state)
    apart = max(np.abs(trainer.parameters[name] - w[name]).max() for name in SHAPES)
    agree(comm, apart < 1e-5, f"{apart:.2e}")
    agree(comm, len(set(comm.allgather(str(everything(trainer)[0])))) == 1, "replicas differ")
    trainer.free()


class FailingAdam(Adam):
    """Raises in the middle of an update."""

    fail = False

    def apply(self, w: Any, g: Any, slots: Any, t: Any, u: Any) -> None:
        super().apply(w, g, slots, t, u)
        if FailingAdam.fail:
            raise RuntimeError("in the optimizer")


@pytest.mark.parametrize("optimizer", [Adam(), OneBitAdam(freeze_step=2), FailingAdam()], ids=repr)
def test_a_step_that_fails_leaves_all_as_it_was(comm, agree, optimizer):
    compression = "onebit" if isinstance(optimizer, OneBitAdam) else None
    trainer, other = (new_trainer(comm, optimizer, compression=compression) for _ in range(2))
    bad = comm.size - 1
    for _ in range(4):
        train(trainer, 1)
        train(other, 1)
        before = everything(trainer)
        gradients = gradients_of(comm.rank, 50)
        if isinstance(optimizer, FailingAdam):
            FailingAdam.fail = comm.rank == bad
            kind: Any = RuntimeError if comm.rank == bad else PeerError
        else:
            kind = NonFiniteError
            if comm.rank == bad:
                gradients["c"][3] = np.nan
        error = raised(trainer.step, gradients)
        FailingAdam.fail = False
        agree(comm, type(error) is kind, repr(error))
        agree(comm, everything(trainer) == before, "something has changed")
    agree(comm, everything(trainer) == everything(other))
    for each in (trainer, other):
        each.free()


@pytest.mark.parametrize("mode", ["sync", "delayed", "local:tau=2", "block_momentum:tau=2"])
def test_a_resumed_run_goes_on_bit_for_bit_also_on_one_rank(comm, agree, mpi_tmp_path, mode):
    trainer = new_trainer(comm, "adam", mode=mode)
    train(trainer, 5)
    bitring.save_checkpoint(mpi_tmp_path / "run", trainer)
    other = new_trainer(comm, "adam", mode=mode)
    bitring.load_checkpoint(mpi_tmp_path / "run", other)
    agree(comm, everything(other) == everything(trainer))
    for each in (trainer, other):
        train(each, 4)
    agree(comm, everything(other) == everything(trainer))
    state = trainer.state_dict()
    new = new_trainer(comm, "adam", mode=mode)
    new.load_state_dict(state)
    agree(comm, everything(new) == everything(trainer))
    mine = comm.Split(comm.rank, 0)
    alone = new_trainer(mine, "adam", mode=mode)
    bitring.load_checkpoint(mpi_tmp_path / "run", alone)
    counts = {int(x) for x in alone.live()["optimizer"]["variance_updates"].values()}
    agree(comm, counts == {5}, repr(counts))
    train(alone, 2)
    for each in (trainer, other, new, alone):
        each.free()
    mine.Free()


def test_local_ranks_count_their_own_updates_and_broadcast_makes_them_equal(comm, agree, mpi_tmp_path):
    """A rank without samples makes no update; a checkpoint keeps each rank's count."""
    trainer = new_trainer(comm, "adam", mode="local:tau=3")
    for step in range(3):
        trainer.step(gradients_of(comm.rank, step), weight=float(step < 2 or comm.rank == 0))
    counted = {int(x) for x in trainer.live()["optimizer"]["variance_updates"].values()}
    agree(comm, counted == {3 if comm.rank == 0 else 2}, repr(counted))
    bitring.save_checkpoint(mpi_tmp_path / "run", trainer)
    other = new_trainer(comm, "adam", mode="local:tau=3")
    bitring.load_checkpoint(mpi_tmp_path / "run", other)
    agree(comm, everything(other) == everything(trainer))
    other.broadcast(root=comm.size - 1)
    agree(comm, len(set(comm.allgather(str(everything(other)[0])))) == 1, "replicas differ")
    counted = {int(x) for x in other.live()["optimizer"]["variance_updates"].values()}
    agree(comm, counted == {3 if comm.size == 1 else 2}, repr(counted))
    for each in (trainer, other):
        each.free()


def test_placements(comm, agree):
    """A split model is updated as a whole one, and its state goes on under another placement."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 7)), rng.integers(0, 5, 12)
    losses, states = {}, {}
    for placement in ("data", "hybrid"):
        model = bitring.MLP((7,), 5, (9, 6, 3), dtype=np.float64, seed=1)
        trainer = bitring.ModelParallel(model, "adam:lr=0.01", comm=comm, placement=placement)
        for _ in range(4):
            trainer.step(x, y)
        states[placement] = trainer.state_dict()
        if placement == "hybrid":
            trainer.load_state_dict(states["data"])
        losses[placement] = [trainer.step(x, y) for _ in range(3)]
        trainer.free()
    agree(comm, np.allclose(losses["data"], losses["hybrid"], rtol=1e-9), repr(losses))
    counts = [{int(n) for n in states[p]["optimizer"]["variance_updates"].values()} for p in states]
    agree(comm, counts == [{4}, {4}], repr(counts))


def onebit_reference(size: int, settings: OneBitAdam, steps: int) -> dict[str, Any]:
    """The frozen formulas in one process, momentum exact."""
    w = gradients_of(99, 0, np.float64)
    m, v = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for step in range(steps):
        t, g = step + 1, mean(size, step)
        for name in SHAPES:
            m[name] = settings.beta1 * m[name] + (1 - settings.beta1) * g[name]
            if t <= settings.freeze_step:
                v[name] = settings.beta2 * v[name] + (1 - settings.beta2) * g[name] ** 2
            root = np.sqrt(v[name] / (1 - settings.beta2 ** min(t, settings.freeze_step))) + settings.eps
            w[name] = w[name] * (1 - settings.lr * settings.weight_decay)
            moved = settings.lr * m[name] / (1 - settings.beta1**t) / root
            longest = settings.lr if t > settings.freeze_step else np.inf
            w[name] -= np.where(v[name] > 0, np.clip(moved, -longest, longest), 0)
    return w


@pytest.mark.single
@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16], ids=str)
def test_a_step_after_the_freeze_is_at_most_lr_long(dtype):
    """Where the variance is tiny at the freeze, whatever comes then would make steps of any length."""
    settings = OneBitAdam(lr=0.125, freeze_step=1)
    w = np.zeros(3, dtype)
    state = settings.init({"w": w})
    settings.update({"w": w}, {"w": np.array([2**-12, 1, 0], dtype)}, state)
    before = w.copy()
    settings.update({"w": w}, {"w": np.array([-3, 0.125, 1], dtype)}, state)
    np.testing.assert_allclose((w - before).astype(float), [0.125, -0.125 * 0.125 / 0.19, 0], rtol=0.02)


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_the_momentum_travels_from_the_freeze_on(comm, agree, compression):
    settings = OneBitAdam(lr=0.01, freeze_step=5, weight_decay=0.1)
    trainer = new_trainer(comm, settings, compression=compression)
    train(trainer, 5)
    sent = trainer.bytes_sent
    w = onebit_reference(comm.size, settings, 5)
    apart = max(np.abs(trainer.parameters[name] - w[name]).max() for name in SHAPES)
    agree(comm, apart < 1e-5, f"before the freeze the exchange is exact: {apart:.2e}")
    variance = {name: x.copy() for name, x in trainer.live()["optimizer"]["variance"].items()}
    train(trainer, 5)
    agree(comm, all(np.array_equal(x, variance[n]) for n, x in trainer.live()["optimizer"]["variance"].items()))
    agree(comm, len(set(comm.allgather(str(everything(trainer)[0])))) == 1, "replicas differ")
    w = onebit_reference(comm.size, settings, 10)
    apart = max(np.abs(trainer.parameters[name] - w[name]).max() for name in SHAPES)
    agree(comm, apart < (1e-5 if compression is None else 0.1), f"{apart:.2e}")
    if compression is not None and comm.size > 1:
        less = trainer.bytes_sent - sent
        agree(comm, less < sent / 10, f"{sent} bytes before, {less} after")
        agree(comm, any(x.any() for plan in trainer.plans for x in plan.state_dict().values()), "no residuals")
    trainer.free()


def test_one_bit_makes_no_step_where_the_variance_is_zero(comm, agree, mpi_tmp_path):
    """And it resumes bit for bit, before the freeze and after it; handed over one by one the bits are the same."""
    settings = OneBitAdam(lr=0.01, freeze_step=4)

    def gradients(step: int) -> dict[str, Any]:
        made = gradients_of(comm.rank, step)
        made["a"][:, 5:9] = 0
        return made

    trainer, other = (new_trainer(comm, settings, compression="onebit") for _ in range(2))
    first = trainer.parameters["a"].copy()
    for step in range(10):
        if step in (2, 7):
            bitring.save_checkpoint(mpi_tmp_path / f"run{step}", trainer)
            other.free()
            other = new_trainer(comm, settings, compression="onebit")
            bitring.load_checkpoint(mpi_tmp_path / f"run{step}", other)
        if step == 5:  # nobody has samples: no update, and it does not count
            trainer.step(gradients(step), weight=0)
            other.step(gradients(step), weight=0)
        trainer.step(gradients(step))
        other.begin()
        for name, each in gradients(step).items():
            other.ready(name, each)
        other.step()
        agree(comm, everything(other) == everything(trainer), f"step {step}")
    moved = trainer.parameters["a"] != first
    agree(comm, not moved[:, 5:9].any() and moved[:, :5].all())
    for each in (trainer, other):
        each.free()


def test_what_one_bit_adam_is_not_for(comm, agree):
    for mode in ("local", "delayed"):
        error = raised(new_trainer, comm, "onebit_adam", mode=mode)
        agree(comm, type(error) is ValueError and "mode must be 'sync' with the optimizer OneBitAdam(" in str(error))
    error = raised(bitring.ParameterStore, {"w": np.ones(3)}, "onebit_adam", comm=comm)
    said = "ParameterStore: optimizer must be an optimizer of gradients; got OneBitAdam(" in str(error)
    agree(comm, type(error) is ValueError and said, repr(error))
    trainer = new_trainer(comm, "adam")
    error = raised(setattr, trainer, "optimizer", OneBitAdam())
    agree(
        comm, type(error) is ValueError and "must keep the slots ['momentum', 'variance', " in str(error), repr(error)
    )
    trainer.optimizer = Adam(lr=0.5)
    train(trainer, 1)
    trainer.free()
