"""One model of all ranks of a node, updated where it is: conservation, sparse gradients, NaN, leaving, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.collectives.communicator import Communicator
from bitring.native import native
from bitring.training.optimizer import Elementwise
from bitring.training.step import shared_replica

pytestmark = pytest.mark.skipif(native() is None, reason="there is no native engine")

SHAPES = {"w": (37, 500), "b": (11,)}


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def shared(world, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: Any = np.float32) -> dict[str, Any]:
    parameters = {name: world.empty(shape, dtype) for name, shape in shapes.items()}
    for w in parameters.values():
        w[...] = 1
    return parameters


def trainer_of(world, optimizer: Any = "sgd", mode: Any = "hogwild", **rest: Any) -> Any:
    return bitring.DataParallel(rest.pop("parameters", None) or shared(world), optimizer, comm=world, mode=mode, **rest)


def gradients_of(trainer, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=w.shape).astype(w.dtype) for name, w in trainer.parameters.items()}


def outcome(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("locks", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [bitring.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), bitring.AdaGrad(lr=0.1), bitring.SGD(lr=0.3)],
    ids=repr,
)
def test_one_rank_that_steps_is_the_optimizer_bit_for_bit(world, agree, optimizer, locks):
    """And the others, which make no step, see it where it is."""
    trainer = trainer_of(world, optimizer, bitring.Hogwild(locks=locks))
    mine = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    state = optimizer.init(mine)
    for step in range(4):
        gradients = gradients_of(trainer, step)
        if world.rank == world.size - 1:
            trainer.step(gradients, weight=step + 1)
        optimizer.update(mine, gradients, state)
    trainer.synchronize()
    agree(world, all(np.array_equal(trainer.parameters[name], mine[name]) for name in mine))
    agree(world, trainer.clocks == [0.0] * (world.size - 1) + [4.0], str(trainer.clocks))
    kept = trainer.state_dict()["optimizer"]
    agree(world, all(np.array_equal(kept[slot][name], state[slot][name]) for slot in state for name in mine))
    trainer.free()


@pytest.mark.parametrize("given", ["dense", "rows", "values"])
def test_every_update_counts_under_locks(world, agree, given):
    """Whole numbers, each rank as many steps as it likes."""
    trainer = trainer_of(world, bitring.SGD(lr=1.0), "hogwild:locks=true")
    wanted = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    for rank in range(world.size):
        for step in range(3 + 2 * rank):
            random = np.random.default_rng([rank, step])
            gradients: dict[str, Any] = {"b": np.full(11, rank - 1, np.float32)}
            if given == "dense":
                gradients["w"] = random.integers(-3, 4, SHAPES["w"]).astype(np.float32)
            elif given == "rows":
                rows = random.integers(0, 37, 8)
                gradients["w"] = bitring.Sparse(rows, random.integers(-3, 4, (8, 500)).astype(np.float32), SHAPES["w"])
            else:
                at = random.integers(0, 37 * 500, 300)
                gradients["w"] = bitring.Sparse(at, random.integers(-3, 4, 300).astype(np.float32), SHAPES["w"])
            for name, g in gradients.items():
                wanted[name] -= g if isinstance(g, np.ndarray) else g.dense()
            if rank == world.rank:
                trainer.step(gradients)
    trainer.synchronize()
    agree(world, all(np.array_equal(trainer.parameters[name], wanted[name]) for name in wanted))
    agree(world, trainer.clocks == [3.0 + 2 * rank for rank in range(world.size)], str(trainer.clocks))
    trainer.free()


def test_racy_updates_are_few_to_be_lost(world, agree):
    trainer = trainer_of(world, bitring.SGD(lr=1.0), parameters=shared(world, {"w": (100_000,)}))
    g = {"w": np.full(100_000, -1, np.float32)}
    for _ in range(10):
        trainer.step(g)
    trainer.synchronize()
    w = trainer.parameters["w"] - 1
    made = 10 * world.size
    agree(world, bool((w <= made).all() and (w >= 1).all() and w.mean() > 0.5 * made), f"{w.min()}, {w.mean()}")
    trainer.free()


def test_a_sparse_gradient_touches_nothing_else(world, agree):
    """Nor momentum, nor weight decay."""
    optimizer = bitring.SGD(lr=0.5, momentum=0.9, weight_decay=0.1)
    trainer = trainer_of(world, optimizer)
    if world.rank == 0:
        trainer.step(gradients_of(trainer, 0))
    trainer.synchronize()
    before, velocity = (trainer.state_dict()[part] for part in ("parameters", "optimizer"))
    rows = np.array([30, 2], np.int32)
    values = np.stack([np.full(500, 3.0, np.float32), np.full(500, 2.0, np.float32)])
    if world.rank == 0:
        trainer.step({"w": bitring.Sparse(rows, values, (37, 500)), "b": bitring.Sparse([], np.zeros(0, "f"), (11,))})
    trainer.synchronize()
    w, v = before["w"], velocity["velocity"]["w"]
    v[rows] = v[rows] * np.float32(0.9) + (w[rows] * np.float32(0.1) + values)
    w[rows] -= v[rows] * np.float32(0.5)
    agree(world, np.array_equal(trainer.parameters["w"], w) and np.array_equal(trainer.parameters["b"], before["b"]))
    agree(world, np.array_equal(trainer.state_dict()["optimizer"]["velocity"]["w"], v))
    trainer.free()


@pytest.mark.parametrize("mode", ["sync", "hogwild"])
def test_other_modes_see_a_sparse_gradient_as_it_would_be_dense(world, agree, mode):
    trainer = trainer_of(world, bitring.SGD(lr=1.0), mode)
    sparse = bitring.Sparse([5, 3, 5], np.array([1, 2, 4], np.float32), (37, 500))
    trainer.step({"w": sparse, "b": np.zeros(11, np.float32)})
    trainer.synchronize()
    wanted = np.ones(18_500, np.float32)
    wanted[[3, 5]] -= np.array([2, 5], np.float32) * (1 if mode == "sync" else world.size)
    same = np.array_equal(trainer.parameters["w"].reshape(-1), wanted)
    agree(world, same or (mode == "hogwild" and world.size > 1))
    trainer.free()


def test_what_is_no_sparse_gradient():
    ones = np.ones(2, np.float32)
    arguments: Any
    for arguments, kind, text in [
        (
            ([0.5, 1], ones, (3,)),
            TypeError,
            "Sparse: indexes must be integers in one dimension; got float64 of shape (2,)",
        ),
        (([0, 3], ones, (3,)), ValueError, "from 0 to 2, of the 3 values of shape (3,); got 0 to 3"),
        (([-1, 1], ones, (3,)), ValueError, "got -1 to 1"),
        (([0, 1], np.ones((2, 4)), (3, 5)), ValueError, "values must have shape (2,), or (2, 5) for rows; got (2, 4)"),
        (([0, 9], np.ones((2, 5)), (3, 5)), ValueError, "from 0 to 2, of the 3 rows of shape (3, 5); got 0 to 9"),
        (([0], ones, (3,)), ValueError, "values must have shape (1,), or (1,) for rows; got (2,)"),
        (([0, 1], ones, "3"), TypeError, "shape must be a tuple of ints, the parameter's; got '3'"),
    ]:
        with pytest.raises(kind) as raised:
            bitring.Sparse(*arguments)
        assert text in str(raised.value)


def test_not_finite_is_raised_once_by_each_rank_at_its_next_step(world, agree):
    trainer = trainer_of(world, bitring.SGD(lr=1.0))
    gradients = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    trainer.step(gradients)
    trainer.synchronize()
    world.Barrier()  # whoever is still in synchronize could hear there of what comes now
    bad = {name: g.copy() for name, g in gradients.items()}
    bad["b"][3] = math.inf
    raised = 0
    if world.rank == world.size - 1:
        trainer.step(bad)
    world.Barrier()
    for _ in range(3):
        kind, text = outcome(lambda: trainer.step(gradients))
        raised += kind == "NonFiniteError" and text.endswith(
            f"(step 1): the gradient of 'b' holds Inf on rank {world.size - 1}"
        )
        agree(world, kind in ("", "NonFiniteError"), text)
    agree(world, raised == 1, str(raised))
    if world.rank == 0:
        trainer.step({**gradients, "w": bitring.Sparse([1], np.array([np.nan], np.float32), (37, 500))})
    kind, text = outcome(trainer.synchronize)
    agree(world, kind == "NonFiniteError" and "'w' holds NaN on rank 0" in text, text)
    trainer.synchronize()
    agree(world, all(bool((w == 1).all()) for w in trainer.parameters.values()))
    trainer.free()


def test_bad_arguments_are_that_ranks_alone(world, agree):
    trainer = trainer_of(world, bitring.SGD(lr=1.0))
    kind, text = outcome(lambda: trainer.step({"w": np.zeros((37, 500), np.float32)}))
    agree(world, kind == "ValueError" and "missing: ['b']" in text, text)
    kind, text = outcome(lambda: trainer.step(gradients_of(trainer, 0), weight=-1))
    agree(world, kind == "ValueError" and "weight must be finite and >= 0, got -1" in text, text)
    agree(world, trainer.steps == 0)
    trainer.synchronize()
    trainer.free()


def test_begin_and_ready(world, agree):
    trainer = trainer_of(world, bitring.SGD(lr=1.0), "hogwild:locks=true")
    with trainer.begin(weight=2):
        for name, shape in reversed(SHAPES.items()):
            trainer.ready(name, np.ones(shape, np.float32))
        trainer.step()
    trainer.synchronize()
    agree(world, all(bool((w == 1 - world.size).all()) for w in trainer.parameters.values()))
    with pytest.raises(ZeroDivisionError), trainer.begin():
        raise ZeroDivisionError
    kind, text = outcome(lambda: trainer.ready("w", np.ones((37, 500), np.float32)))
    agree(world, kind == "RuntimeError" and "no step is open" in text, text)
    trainer.begin()
    kind, text = outcome(trainer.synchronize)
    agree(world, kind == "RuntimeError" and "a step is open since begin" in text, text)
    trainer.synchronize()
    agree(world, trainer.steps == 1)
    trainer.free()


def test_who_leaves_may_still_synchronize_save_and_free(world, agree, mpi_tmp_path):
    with trainer_of(world, bitring.SGD(lr=1.0)) as trainer:
        if world.rank:
            trainer.leave()
            trainer.leave()
        else:
            trainer.step({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
        trainer.synchronize()
        agree(world, trainer.clocks == [1.0] + [math.inf] * (world.size - 1), str(trainer.clocks))
    kind, text = outcome(lambda: trainer.step(gradients_of(trainer, 0)))
    agree(world, kind == "RuntimeError" and "this rank has left" in text, text)
    bitring.save_checkpoint(mpi_tmp_path / "left.npz", trainer)
    agree(world, all(bool((w == 0).all()) for w in trainer.parameters.values()))
    trainer.free()
    collective = trainer_of(world, mode="sync")
    kind, text = outcome(collective.leave)
    agree(world, kind == "RuntimeError" and "in mode sync all ranks make equally many steps" in text, text)
    collective.free()


def test_a_checkpoint_at_any_moment_goes_on(world, agree, mpi_tmp_path):
    """With unequal numbers of steps; another trainer, whose memory is elsewhere, takes it up."""
    path = mpi_tmp_path / "hogwild.npz"
    optimizer = bitring.SGD(lr=0.1, momentum=0.9)
    trainer, other = trainer_of(world, optimizer), trainer_of(world, optimizer)
    for step in range(2 + world.rank):
        trainer.step(gradients_of(trainer, step))
    bitring.save_checkpoint(path, trainer, epoch=3)
    state = trainer.state_dict()
    for step in range(2 + world.rank):
        trainer.step(gradients_of(trainer, step))
    agree(world, bitring.load_checkpoint(path, other)["epoch"] == 3)
    trainer.load_state_dict(state)
    for each in (trainer, other):
        got = each.state_dict()
        for part in ("parameters", "optimizer"):
            flat = (
                [(got[part], state[part])]
                if part == "parameters"
                else [(got[part]["velocity"], state[part]["velocity"])]
            )
            agree(world, all(np.array_equal(a[name], b[name]) for a, b in flat for name in SHAPES), part)
    agree(world, trainer.steps == 2 + world.rank)
    trainer.free()
    other.free()


def test_numbers_are_claimed_once(world, agree):
    trainer = trainer_of(world)
    mine = [trainer.claim((0, epoch)) for epoch in (0, 1) for _ in range(20)]
    everyone = world.allgather(mine)
    for part in (slice(0, 20), slice(20, 40)):
        agree(world, sorted(np.concatenate([each[part] for each in everyone])) == list(range(20 * world.size)))
    trainer.free()


def test_after_free_every_rank_has_its_own(world, agree):
    trainer = trainer_of(world, bitring.SGD(lr=1.0))
    trainer.step({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
    parameters = trainer.parameters
    trainer.free()
    agree(world, all(bool((w == 1).all()) for w in parameters.values()))
    for w in parameters.values():
        w[...] = world.rank + 2
    world.Barrier()
    agree(world, all(bool((w == world.rank + 2).all()) for w in parameters.values()))
    again = trainer_of(world, bitring.SGD(lr=1.0), parameters=parameters)
    agree(world, all(bool((w == 2).all()) for w in parameters.values()), "the first rank's values are taken")
    again.free()


def test_parameters_of_one_array(world, agree):
    """Two of them in one piece of shared memory, at the same places on all ranks; at others they are refused."""
    flat = world.empty(1000)
    flat[:] = 1
    trainer = trainer_of(world, bitring.SGD(lr=1.0), parameters={"a": flat[:300].reshape(3, 100), "b": flat[500:]})
    trainer.step({"a": np.full((3, 100), 1, np.float32), "b": np.full(500, 2, np.float32)}, weight=world.rank == 0)
    trainer.synchronize()
    agree(world, bool((flat[:300] == 0).all() and (flat[300:500] == 1).all() and (flat[500:] == -1).all()))
    trainer.free()
    if world.size > 1:
        flat = world.empty(1000)
        place = 100 * world.rank
        kind, text = outcome(lambda: trainer_of(world, parameters={"a": flat[place : place + 10]}))
        agree(world, kind == "ValueError" and "is another part of the shared memory on rank" in text, f"{kind} {text}")


class Plain(Elementwise):
    """Without a native kernel."""

    @property
    def slots(self) -> tuple[str, ...]:
        return ()

    def apply(self, w: Any, g: Any, slots: Any, t: Any, u: Any) -> None:
        w -= g


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ({"compression": "onebit"}, "nothing travels, so compression must be None, got OneBit("),
        ({"optimizer": Plain()}, "needs an optimizer with a native kernel, SGD or AdaGrad; got Plain("),
        ({"check_every": 3}, "check_every must be 0 in mode hogwild, in which ranks do not make the same steps, got 3"),
        ({"warmup_steps": 2}, "warmup_steps must be 0 in mode hogwild"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_refused_on_all_ranks(world, agree, rest, text):
    kind, said = outcome(lambda: trainer_of(world, **rest))
    agree(world, kind == "ValueError" and text in said, f"{kind}: {said}")


def test_parameters_in_ones_own_memory_are_refused_with_the_line_to_write(world, agree):
    if world.size == 1:
        pytest.skip("alone a rank needs no shared memory")
    parameters = {**shared(world), "mine": np.ones((2, 3), np.float32)}
    kind, text = outcome(lambda: trainer_of(world, parameters=parameters))
    line = "parameters['mine'] = bitring.Communicator(comm).empty((2, 3), 'float32')"
    agree(world, kind == "ValueError" and "the parameter 'mine' must be in memory" in text and line in text, text)
    exec(line, {"bitring": bitring, "comm": world, "parameters": parameters})
    parameters["mine"][...] = 5
    trainer = trainer_of(world, bitring.SGD(lr=1.0), parameters=parameters)
    trainer.free()
    if world.rank == 0:
        parameters["mine"] = np.ones((2, 3), np.float32)
    kind, text = outcome(lambda: trainer_of(world, parameters=parameters))
    agree(world, kind == "ValueError" and "'mine' must be in memory" in text, f"{kind}: {text}")


def test_types_that_have_no_kernel_are_refused(world, agree):
    for parameters in (
        shared(world, dtype=np.float16),
        {"w": world.empty((4, 6)).T},
    ):
        kind, text = outcome(lambda: trainer_of(world, parameters=parameters))  # noqa: B023
        agree(world, kind == "ValueError" and "must be float32 or float64 and C-contiguous, got float" in text, text)


def test_without_the_native_engine_it_is_refused(world, agree, monkeypatch):
    parameters = shared(world)
    monkeypatch.setattr(shared_replica, "native", lambda: None)
    kind, text = outcome(lambda: trainer_of(world, parameters=parameters))
    agree(world, kind == "ValueError" and "needs the native engine" in text, text)


def test_between_nodes_it_is_refused(apart, agree):
    kind, text = outcome(lambda: trainer_of(apart))
    agree(apart, kind == "ValueError" and f"these are on {apart.size} nodes" in text, text)


def test_other_modes_on_other_ranks_are_found(world, agree):
    if world.size == 1:
        pytest.skip("needs another rank")
    kind, _ = outcome(lambda: trainer_of(world, mode=bitring.Hogwild(locks=world.rank == 0)))
    agree(world, kind == "MismatchError", kind)
