"""DistributedOptimizer: any optimizer of PyTorch's, with schedules, scalers and closures; and the broadcasts."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import (  # noqa: E402
    Branches,
    batches,
    convnet,
    cross_entropy,
    dense,
    distance,
    mean_gradients,
    values,
)

import bitring.torch  # noqa: E402
from bitring.errors import MismatchError, PeerError  # noqa: E402
from bitring.torch import DistributedOptimizer  # noqa: E402


def raised(call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        call(*arguments, **options)
    except Exception as error:
        return error
    return None


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=2e-3),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize(
    ("name", "overlap"),
    [(name, overlap) for name in OPTIMIZERS for overlap in (True, False) if not (name == "lbfgs" and overlap)],
)  # L-BFGS's closure averages by itself: there is nothing to overlap
def test_as_in_one_process(comm, agree, name, overlap):
    rank, size = comm.rank, comm.size
    model, reference = dense(seed=rank), dense()
    optimizer = DistributedOptimizer(
        OPTIMIZERS[name](model.parameters()), model, comm=comm, overlap=overlap, bucket_bytes=500
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    inner = OPTIMIZERS[name](reference.parameters())
    inner_scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.97)
    data = [list(batches(20, seed=r)) for r in range(size)]
    for step in range(20):

        def closure(step: int = step) -> Any:
            optimizer.zero_grad()
            loss = cross_entropy(model, *data[rank][step])
            loss.backward()
            return torch.tensor(sum(comm.allgather(loss.item())) / size)

        def whole(step: int = step) -> Any:
            losses = []

            def backward(r: int) -> None:
                loss = cross_entropy(reference, *data[r][step])
                loss.backward()
                losses.append(loss.item())

            mean_gradients(reference, size, [1.0] * size, backward)
            return torch.tensor(sum(losses) / size)

        if name == "lbfgs":
            optimizer.step(closure)
            inner.step(whole)
        else:
            optimizer.zero_grad()
            cross_entropy(model, *data[rank][step]).backward()
            optimizer.step()
            whole()
            inner.step()
        scheduler.step()
        inner_scheduler.step()
    apart = distance(values(model), values(reference))
    agree(comm, apart <= 1e-5, f"{apart:.2e}")
    agree(comm, math.isclose(optimizer.param_groups[0]["lr"], inner.param_groups[0]["lr"]))
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1, "replicas differ")


@pytest.mark.parametrize("overlap", [True, False])
def test_several_passes(comm, agree, overlap):
    """backward_passes_per_step: gradients are summed over the passes, and exchanged once."""
    rank, size = comm.rank, comm.size
    model, reference = dense(), dense()
    optimizer = DistributedOptimizer(
        OPTIMIZERS["sgd"](model.parameters()), model, comm=comm, overlap=overlap, backward_passes_per_step=3
    )
    inner = OPTIMIZERS["sgd"](reference.parameters())
    data = [list(batches(9, seed=r)) for r in range(size)]
    for step in range(0, 9, 3):
        optimizer.zero_grad()
        for i in range(3):
            cross_entropy(model, *data[rank][step + i]).backward()
        optimizer.step()

        def passes(r: int, step: int = step) -> None:
            for i in range(3):
                cross_entropy(reference, *data[r][step + i]).backward()

        mean_gradients(reference, size, [1.0] * size, passes)
        inner.step()
    agree(comm, distance(values(model), values(reference)) < 1e-6 and optimizer.averager.steps == 3)
    for _ in range(3):
        cross_entropy(model, *data[rank][0]).backward()
    error = raised(lambda: cross_entropy(model, *data[rank][0]).backward())
    agree(comm, type(error) is RuntimeError and "once more than a step has room for" in str(error), repr(error))


def test_synchronize_clip_and_skip(comm, agree):
    rank = comm.rank
    model = dense()
    optimizer = DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), model, comm=comm)
    x, y = next(batches(seed=rank))
    cross_entropy(model, x, y).backward()
    optimizer.synchronize()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    agree(comm, len(set(comm.allgather(float(norm)))) == 1, "the norm is of the mean on all ranks")
    with optimizer.skip_synchronize():
        optimizer.step()
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1 and optimizer.averager.steps == 1)
    optimizer.zero_grad()
    with optimizer.averager.batch(weight=rank + 1):
        cross_entropy(model, x, y).backward()
    optimizer.step()  # does not average again
    agree(comm, optimizer.averager.steps == 2)
    with optimizer.no_sync():
        cross_entropy(model, x, y).backward()
    agree(comm, optimizer.averager.step is None)
    cross_entropy(model, x, y).backward()
    error = raised(optimizer.zero_grad)
    agree(comm, type(error) is RuntimeError and "before step() or synchronize()" in str(error), repr(error))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("overlap", [True, False])
def test_grad_scaler(comm, agree, overlap):
    """An overflow on one rank: all skip the step, and all scales stay alike."""
    model = dense()
    optimizer = DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), model, comm=comm, overlap=overlap)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step, (x, y) in enumerate(batches(6, seed=comm.rank)):
        optimizer.zero_grad()
        loss = cross_entropy(model, x, y)
        if step == 2 and comm.rank == comm.size - 1:
            loss = loss * 1e38 * 1e38
        scaler.scale(loss).backward()
        optimizer.synchronize()
        if step % 2:
            scaler.unscale_(optimizer)
        before = values(model)
        scaler.step(optimizer)
        scaler.update()
        agree(comm, torch.equal(before, values(model)) == (step == 2), f"step {step}")
        agree(comm, scaler.get_scale() == (16.0 if step < 2 else 8.0), f"step {step}: {scaler.get_scale()}")
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)
    if not overlap:
        scaler.scale(cross_entropy(model, *next(batches()))).backward()
        error = raised(scaler.step, optimizer)
        agree(comm, "call optimizer.synchronize() before scaler.unscale_" in str(error), repr(error))


def test_it_is_an_optimizer(comm, agree):
    model = dense()
    inner = OPTIMIZERS["adamw"](model[0].parameters())
    optimizer = DistributedOptimizer(inner, model, comm=comm)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 1.0})
    agree(comm, isinstance(optimizer, torch.optim.Optimizer) and optimizer.param_groups is inner.param_groups)
    cross_entropy(model, *next(batches())).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    agree(comm, optimizer.state is inner.state and len(optimizer.state_dict()["state"]) == 4)
    agree(comm, "AdamW" in repr(optimizer) and type(raised(pickle.dumps, optimizer)) is TypeError)


def test_broadcasts(comm, agree):
    root = comm.size - 1
    model = convnet(seed=comm.rank).to(torch.float32)
    model[2].running_mean.fill_(float(comm.rank))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * (comm.rank + 1))
    cross_entropy(model, *next(batches(seed=comm.rank))).backward()
    optimizer.step()
    bitring.torch.broadcast_parameters(model, root, comm=comm)
    bitring.torch.broadcast_optimizer_state(optimizer, root, comm=comm)
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)
    state = optimizer.state_dict()
    moments = values_of(state["state"])
    agree(comm, len(set(comm.allgather(moments))) == 1 and state["param_groups"][0]["lr"] == 0.1 * (root + 1))
    agree(
        comm,
        bool((model[2].running_mean != 0).any()) and model[1].weight.is_contiguous(memory_format=torch.channels_last),
    )
    for wrong, kind in ((comm.size, ValueError), ("0", TypeError)):
        error = raised(bitring.torch.broadcast_parameters, model, wrong, comm=comm)
        agree(comm, type(error) is kind and "broadcast_parameters" in str(error), repr(error))
    error = raised(bitring.torch.broadcast_parameters, 3, comm=comm)
    agree(comm, type(error) is TypeError and "module must be a torch.nn.Module; got int" in str(error))
    if comm.size > 1:
        error = raised(bitring.torch.broadcast_parameters, torch.nn.Linear(2, 2 + (comm.rank == 1)), comm=comm)
        agree(
            comm, type(error) is MismatchError and "module of rank 1 differs from rank 0's" in str(error), repr(error)
        )
        other = Branches() if comm.rank == 0 else dense()
        bad = torch.optim.Adam([{"params": [p]} for p in other.parameters()])
        error = raised(bitring.torch.broadcast_optimizer_state, bad, 0, comm=comm)
        agree(comm, type(error) is (PeerError if comm.rank == 0 else ValueError), repr(error))


def values_of(state: Any) -> bytes:
    return b"".join(t.double().numpy().tobytes() for each in state.values() for t in each.values())


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_closure_gives_the_mean_loss(comm, agree, search):
    """L-BFGS goes by the loss, too: all ranks call their closures as often as one process would."""
    every = [next(batches(seed=rank)) for rank in range(comm.size)]

    def train(model: Any, optimizer: Any, data: Any) -> tuple[Any, int, float]:
        calls = 0

        def closure() -> Any:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = torch.stack([cross_entropy(model, x.double(), y) for x, y in data]).mean()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(2)]
        return values(model), calls, losses[-1]

    def lbfgs(model: Any) -> Any:
        return torch.optim.LBFGS(model.parameters(), max_iter=12, tolerance_change=1e-4, line_search_fn=search)

    alone, model = dense().double(), dense().double()
    expected = train(alone, lbfgs(alone), every)
    optimizer = DistributedOptimizer(lbfgs(model), model, comm=comm)
    found = train(model, optimizer, [every[comm.rank]])
    agree(comm, found[1] == expected[1] and abs(found[2] - expected[2]) < 1e-6, f"{found[1:]} {expected[1:]}")
    agree(comm, distance(found[0], expected[0]) < 1e-5)
    optimizer.averager.free()


@pytest.mark.parametrize("after_backward", [True, False])
def test_a_closure_that_raises(comm, agree, after_backward):
    model = dense()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    bad = comm.size - 1
    x, y = next(batches(seed=comm.rank))

    def closure(fails: bool) -> Any:
        optimizer.zero_grad()
        if fails and not after_backward:
            raise KeyError("no data")
        loss = cross_entropy(model, x, y)
        loss.backward()
        if fails:
            raise KeyError("no data")
        return loss

    before = values(model)
    error = raised(optimizer.step, lambda: closure(comm.rank == bad))
    agree(comm, type(error) is (KeyError if comm.rank == bad else PeerError) and "no data" in str(error), repr(error))
    agree(comm, torch.equal(before, values(model)))
    optimizer.step(lambda: closure(False))
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)
    optimizer.averager.free()


def test_a_closure_may_average_by_itself(comm, agree):
    """A batch block in a closure, with a weight, is the one exchange of the call."""
    model = dense()
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, compression="onebit:block=64"
    )
    x, y = next(batches(seed=comm.rank))

    def closure() -> Any:
        optimizer.zero_grad()
        with optimizer.averager.batch(weight=1 + comm.rank):
            loss = cross_entropy(model, x, y)
            loss.backward()
        return loss.item()

    losses = comm.allgather(cross_entropy(model, x, y).item())
    expected = sum(loss * (1 + rank) for rank, loss in enumerate(losses)) / sum(range(1, comm.size + 1))
    found = optimizer.step(closure)
    agree(comm, optimizer.averager.steps == 1 and abs(found - expected) < 1e-6, f"{found} {expected}")
    optimizer.averager.free()


def test_going_back_to_a_checkpoint(comm, agree, mpi_tmp_path):
    """The number of steps that a checkpoint brings says nothing of what has been averaged here."""
    path = mpi_tmp_path / "run.pt"

    def made() -> tuple[Any, Any]:
        model = dense()
        return model, DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)

    def step(model: Any, optimizer: Any) -> None:
        x, y = next(batches(seed=comm.rank))
        optimizer.zero_grad()
        with optimizer.no_sync():
            cross_entropy(model, x, y).backward()
        optimizer.synchronize()
        optimizer.step()

    model, optimizer = made()
    step(model, optimizer)
    bitring.torch.save_checkpoint(path, optimizer.averager, model=model)
    for _ in range(2):
        step(model, optimizer)
    later, other = made()
    bitring.torch.load_checkpoint(path, other.averager, model=later)  # more steps than it has made
    bitring.torch.load_checkpoint(path, optimizer.averager, model=model)  # fewer
    for trained, by in ((later, other), (model, optimizer)):
        step(trained, by)
        agree(comm, by.averager.steps == 2, f"{by.averager.steps} steps")
        agree(comm, len(set(comm.allgather(values(trained).numpy().tobytes()))) == 1)
        by.averager.free()
    agree(comm, torch.equal(values(model), values(later)))
