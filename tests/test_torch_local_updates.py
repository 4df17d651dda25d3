"""LocalUpdates: steps alone, outer steps together, against the formulas in one process."""

from __future__ import annotations

from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import batches, cross_entropy, dense, distance, values  # noqa: E402

import bitring  # noqa: E402
from bitring.errors import NonFiniteError, PeerError  # noqa: E402
from bitring.torch import LocalUpdates  # noqa: E402


def raised(call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        call(*arguments, **options)
    except Exception as error:
        return error
    return None


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=5e-3)


def in_one_process(
    size: int, steps: int, tau: int, outer: Any, weights: list[float], delay: int, blend: float, fragments: int = 1
) -> Any:
    """All ranks' models, one after the other; ``outer``: learning rate, momentum, Nesterov.

    Parameter number i is of fragment i mod ``fragments``, whose blocks end so much of ``tau`` earlier.
    """
    lr, momentum, nesterov = outer
    models = [dense() for _ in range(size)]
    optimizers = [adamw(model) for model in models]
    data = [list(batches(steps, seed=r)) for r in range(size)]
    start = [p.detach().clone() for p in models[0].parameters()]
    velocity = [torch.zeros_like(p) for p in start]
    mean: list[Any] = [0.0] * len(start)
    sent_at = [0] * len(start)
    for step in range(1, steps + 1):
        for model, optimizer, each in zip(models, optimizers, data, strict=True):
            optimizer.zero_grad()
            cross_entropy(model, *each[step - 1]).backward()
            optimizer.step()
        with torch.no_grad():
            for i, s in enumerate(start):
                if (step + i % fragments * tau // fragments) % tau == 0:
                    sent_at[i] = step
                    mean[i] = sum(
                        (s - list(m.parameters())[i]) * (w / sum(weights)) for m, w in zip(models, weights, strict=True)
                    )
                if sent_at[i] and step == sent_at[i] + delay:
                    velocity[i] = momentum * velocity[i] + mean[i]
                    s -= lr * (mean[i] + momentum * velocity[i] if nesterov else velocity[i])
                    for model in models:
                        p = list(model.parameters())[i]
                        p.copy_(blend * p + (1 - blend) * s)
    return models


@pytest.mark.parametrize(
    ("outer", "delay", "blend", "fragments"),
    [
        ((1.0, 0.0, False), 0, 0.0, 1),
        ((1.0, 0.5, False), 0, 0.0, 1),
        ((0.7, 0.9, True), 0, 0.0, 1),
        ((0.7, 0.9, True), 2, 0.5, 1),
        ((0.7, 0.9, True), 2, 0.25, 3),
    ],
    ids=["averaging", "block momentum", "diloco", "delayed", "streaming"],
)
def test_as_in_one_process(comm, agree, outer, delay, blend, fragments):
    lr, momentum, nesterov = outer
    weights = [float(r + 1) for r in range(comm.size)]
    model = dense(seed=comm.rank)
    local = LocalUpdates(
        model,
        adamw(model),
        comm=comm,
        tau=5,
        outer=bitring.SGD(lr=lr, momentum=momentum, nesterov=nesterov),
        delay=delay,
        blend=blend,
        fragments=fragments,
    )
    steps = 25 if delay == 0 else 27
    for x, y in batches(steps, seed=comm.rank):
        local.optimizer.zero_grad()
        cross_entropy(model, x, y).backward()
        local.step(weight=weights[comm.rank])
    expected = in_one_process(comm.size, steps, 5, outer, weights, delay, blend, fragments)[comm.rank]
    apart = distance(values(model), values(expected))
    agree(comm, apart < 1e-5, f"{apart:.2e}")
    same = len(set(comm.allgather(values(model).numpy().tobytes()))) == 1
    agree(comm, same == (delay == 0 or comm.size == 1), "replicas")
    local.synchronize()
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1, "not equal after synchronize")
    local.free()


@pytest.mark.parametrize("compression", [None, "linear:bits=8,block=64", "linear:bits=4,block=64", "onebit:block=64"])
def test_compressed_and_in_fragments(comm, agree, compression):
    """It learns, with error feedback, and sends fewer bytes; fragments take turns."""
    model = dense(seed=3)
    local = LocalUpdates(model, adamw(model), comm=comm, tau=6, compression=compression, fragments=3, delay=1)
    offsets = [part.offset for part in local._parts]
    losses = []
    for x, _ in batches(90, seed=comm.rank):
        y = (x[:, 0] + x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
        local.optimizer.zero_grad()
        loss = cross_entropy(model, x, y)
        loss.backward()
        local.step()
        losses.append(loss.item())
    local.synchronize()
    agree(comm, offsets == [0, 2, 4] and sum(losses[-10:]) < 0.6 * sum(losses[:10]), repr(losses[::10]))
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)
    if compression is not None and comm.size > 1:
        agree(comm, any(bool(r.any()) for r in local.residuals().residual.values()))
    local.free()


def test_errors(comm, agree):
    model = dense()
    bad = comm.size - 1
    for options, kind, text in (
        ({"tau": 0}, ValueError, "tau"),
        ({"fragments": 60}, ValueError, "fragments must be at most tau and the number of parameters"),
        ({"delay": 50}, ValueError, "delay must be below tau, 50; got 50"),
        ({"blend": 1.0}, ValueError, "blend"),
        ({"outer": torch.optim.SGD(model.parameters(), lr=1.0)}, TypeError, "outer must be a bitring optimizer"),
        ({"outer": bitring.OneBitAdam()}, ValueError, "outer must be an optimizer of gradients; got OneBitAdam("),
    ):
        error = raised(LocalUpdates, model, adamw(model), comm=comm, **(options if comm.rank == bad else {}))
        agree(comm, type(error) is (kind if comm.rank == bad else PeerError) and text in str(error), repr(error))
    local = LocalUpdates(model, adamw(model), comm=comm, tau=1, compression="onebit:block=64")
    x, y = next(batches())
    cross_entropy(model, x, y).backward()
    if comm.rank == bad:
        model[0].weight.grad.fill_(float("nan"))
    error = raised(local.step)
    agree(comm, type(error) is NonFiniteError and f"'0.weight' on rank {bad}" in str(error), repr(error))
    local.free()
    model = dense()
    local = LocalUpdates(model, adamw(model), comm=comm, tau=1)
    cross_entropy(model, x, y).backward()
    error = raised(local.step, weight=-1 if comm.rank == bad else 1)  # all meet in it
    agree(comm, type(error) is (ValueError if comm.rank == bad else PeerError), repr(error))
    local.step()
    local.free()
    local = LocalUpdates(model, adamw(model), comm=comm, tau=2)
    error = raised(local.step, weight=-1 if comm.rank == bad else 1)  # nobody waits for anybody
    agree(comm, (type(error) is ValueError) == (comm.rank == bad) and local.steps == (comm.rank != bad), repr(error))
    if comm.rank == bad:
        local.step()
    model.double()  # outer steps go on in float32
    model.zero_grad()
    local.step()
    local.synchronize()
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)
    local.free()


def test_a_module_that_is_not_the_same_any_more(comm, agree):
    for change in (
        lambda model: model[0].requires_grad_(False),
        lambda model: model.__setitem__(2, torch.nn.Linear(17, 9)),
    ):
        model = dense()
        local = LocalUpdates(model, adamw(model), comm=comm, tau=2)
        change(model)
        local.step()  # nothing is due
        error = raised(local.step)
        agree(comm, type(error) is RuntimeError and "trains other parameters than when" in str(error), repr(error))
        local.free()


def test_synchronize_makes_buffers_equal(comm, agree):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4))
    local = LocalUpdates(model, adamw(model), comm=comm, tau=5)
    for x, y in batches(3, seed=comm.rank):
        model.zero_grad()
        cross_entropy(model, x, y).backward()
        local.step()
    means = comm.allgather(model[1].running_mean.numpy().copy())
    local.synchronize()
    agree(comm, bool((abs(sum(means) / comm.size - model[1].running_mean.numpy()) < 1e-6).all()))
    agree(comm, len(set(comm.allgather(model[1].running_var.numpy().tobytes()))) == 1)
    agree(comm, int(model[1].num_batches_tracked) == 3)
    local.free()


def test_closures_and_optimizers_that_raise(comm, agree):
    model = dense()
    x, y = next(batches(seed=comm.rank))
    bad = comm.size - 1

    def closure(fails: bool = False) -> Any:
        if fails:
            raise KeyError("gone")
        model.zero_grad()
        loss = cross_entropy(model, x, y)
        loss.backward()
        return loss

    local = LocalUpdates(model, torch.optim.LBFGS(model.parameters(), max_iter=3), comm=comm, tau=1)
    first = local.step(closure=closure)
    agree(comm, first.item() > cross_entropy(model, x, y).item() and local.steps == 1)
    error = raised(local.step, closure=lambda: closure(comm.rank == bad))
    agree(comm, type(error) is (KeyError if comm.rank == bad else PeerError), repr(error))
    local.step(closure=closure)
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)
    local.free()
