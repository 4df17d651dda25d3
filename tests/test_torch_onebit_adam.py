"""1-bit Adam: Adam before the freeze, its formulas after it, and no step where the variance is 0."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import Branches, batches, cross_entropy, dense, distance, mean_gradients, values  # noqa: E402

from bitring.errors import NonFiniteError, PeerError  # noqa: E402
from bitring.torch import OneBitAdam  # noqa: E402


def raised(call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        call(*arguments, **options)
    except Exception as error:
        return error
    return None


def test_adam_before_the_freeze(comm, agree):
    model, reference = dense(), dense()
    optimizer = OneBitAdam(model.parameters(), lr=3e-3, weight_decay=0.01, comm=comm, freeze_step=1000)
    inner = torch.optim.AdamW(reference.parameters(), lr=3e-3, weight_decay=0.01)
    data = [list(batches(50, seed=r)) for r in range(comm.size)]
    weights = [float(r % 3) for r in range(1, comm.size + 1)]
    for step in range(50):
        optimizer.zero_grad()
        cross_entropy(model, *data[comm.rank][step]).backward()
        optimizer.step(weight=weights[comm.rank])
        mean_gradients(
            reference, comm.size, weights, lambda r, step=step: cross_entropy(reference, *data[r][step]).backward()
        )
        inner.step()
    apart = distance(values(model), values(reference))
    agree(comm, apart <= 1e-5, f"{apart:.2e}")
    optimizer.free()


def test_the_frozen_formulas(comm, agree):
    """Exact momentum (no compression) against the module's formulas in one process."""
    model, reference = dense(), dense()
    freeze, lr, eps = 5, 1e-2, 1e-8
    optimizer = OneBitAdam(model.parameters(), lr=lr, comm=comm, freeze_step=freeze, compression=None)
    data = [list(batches(12, seed=r)) for r in range(comm.size)]
    m = [torch.zeros_like(p) for p in reference.parameters()]
    v = [torch.zeros_like(p) for p in reference.parameters()]
    for step in range(12):
        optimizer.zero_grad()
        cross_entropy(model, *data[comm.rank][step]).backward()
        optimizer.step()
        mean_gradients(
            reference,
            comm.size,
            [1.0] * comm.size,
            lambda r, step=step: cross_entropy(reference, *data[r][step]).backward(),
        )
        t = step + 1
        with torch.no_grad():
            for i, p in enumerate(reference.parameters()):
                m[i] = 0.9 * m[i] + 0.1 * p.grad
                if t <= freeze:
                    v[i] = 0.999 * v[i] + 0.001 * p.grad**2
                root = (v[i] / (1 - 0.999 ** min(t, freeze))).sqrt() + eps
                moved = lr * m[i] / (1 - 0.9**t) / root
                p -= torch.where(v[i] > 0, moved.clamp(-lr, lr) if t > freeze else moved, 0.0)
    apart = distance(values(model), values(reference))
    agree(comm, apart <= 1e-5, f"{apart:.2e}")
    optimizer.free()


@pytest.mark.parametrize("compression", ["onebit:block=64", "linear:block=64", "powersgd"])
def test_no_step_where_the_variance_is_zero(comm, agree, compression):
    """Columns of inputs that were 0 before the freeze: one bit has no 0, so without the mask they would explode."""
    model = dense()
    optimizer = OneBitAdam(model.parameters(), lr=3e-3, comm=comm, freeze_step=40, compression=compression)
    first = model[0].weight.detach().clone()
    losses = []
    for x, y in batches(120, seed=comm.rank):
        x[:, 2:4] = 0
        y = (x[:, 0] > 0).long()
        optimizer.zero_grad()
        loss = cross_entropy(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    agree(comm, torch.equal(model[0].weight[:, 2:4], first[:, 2:4]), "a weight without variance has moved")
    agree(comm, not torch.equal(model[0].weight[:, :2], first[:, :2]))
    agree(comm, sum(losses[-10:]) < 0.7 * sum(losses[:10]), f"{losses[0]:.2f} to {losses[-1]:.2f}")
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1, "replicas differ")
    agree(comm, comm.size == 1 or any(bool(r.any()) for r in optimizer.residuals().residual.values()))
    optimizer.free()


def test_a_step_after_the_freeze_is_at_most_lr_long(comm, agree):
    """An early freeze: some inputs have hardly been seen, and their weights' variance is tiny."""
    model = dense()
    lr = 1e-2
    optimizer = OneBitAdam(model.parameters(), lr=lr, comm=comm, freeze_step=2, compression="onebit:levels=block")
    longest, losses = 0.0, []
    for step, (x, _) in enumerate(batches(60, seed=comm.rank)):
        y = (x[:, 0] > 0).long()
        x[:, 2:4] *= 1e-4 if step < 2 else 1.0
        before = values(model)
        optimizer.zero_grad()
        loss = cross_entropy(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step >= 2:
            longest = max(longest, float((values(model) - before).abs().max()))
    agree(comm, longest <= lr * 1.0001, f"{longest}")
    agree(comm, sum(losses[-10:]) < 0.5 * sum(losses[:10]), f"{losses[0]:.2f} to {losses[-1]:.2f}")
    optimizer.free()


def test_groups_and_unused(comm, agree):
    torch.manual_seed(0)
    model = Branches()
    groups = [{"params": list(model.body.parameters()), "lr": 0.0}, {"params": list(model.left.parameters())}]
    groups += [{"params": list(model.right.parameters()) + list(model.never.parameters())}]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OneBitAdam(groups, comm=comm, freeze_step=2, compression="onebit:block=64")
    for x, y in batches(5, seed=comm.rank):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    agree(comm, moved == {"left.weight", "left.bias"}, repr(moved))
    optimizer.free()


def test_errors(comm, agree):
    model = dense()
    bad = comm.size - 1
    for options, text in (({"lr": -1.0}, "lr"), ({"freeze_step": 0}, "freeze_step"), ({"compression": "x"}, "'x'")):
        error = raised(OneBitAdam, model.parameters(), comm=comm, **(options if comm.rank == bad else {}))
        agree(comm, type(error) is (ValueError if comm.rank == bad else PeerError) and text in str(error), repr(error))
    optimizer = OneBitAdam(model.parameters(), comm=comm, freeze_step=1, compression="onebit:block=64")
    x, y = next(batches())
    for step in range(3):
        optimizer.zero_grad()
        cross_entropy(model, x, y).backward()
        if comm.rank == bad:
            model[2].weight.grad[0, 0] = math.nan
        before, kept = values(model), optimizer.residuals()
        error = raised(optimizer.step)
        agree(comm, type(error) is NonFiniteError and f"on rank {bad}" in str(error), repr(error))
        same = all((kept.residual[n] == r).all() for n, r in optimizer.residuals().residual.items())
        agree(comm, same and torch.equal(before, values(model)), f"step {step} has changed something")
        model[2].weight.grad.nan_to_num_()
        error = raised(optimizer.step, weight=-1.0 if comm.rank == bad else 1.0)
        agree(comm, type(error) is (ValueError if comm.rank == bad else PeerError), repr(error))
        optimizer.step()
    error = raised(optimizer.add_param_group, {"params": [torch.nn.Parameter(torch.zeros(3))]})
    agree(comm, type(error) is RuntimeError and "parameters cannot be added" in str(error), repr(error))
    if comm.rank == bad:
        model.double()
    model.zero_grad()
    error = raised(optimizer.step)
    agree(comm, type(error) is (TypeError if comm.rank == bad else PeerError), repr(error))
    agree(comm, "parameter number 0 was float32 of shape (17, 6) and is torch.float64" in str(error), repr(error))
    optimizer.free()


def test_sparse_gradients_and_closures_that_raise(comm, agree):
    """Before and after the freeze; a sparse gradient on one rank only, and an exception on one rank only."""
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = torch.nn.EmbeddingBag(9, 4, sparse=sparse and comm.rank == 0, mode="sum")
        optimizer = OneBitAdam(table.parameters(), comm=comm, freeze_step=2)

        def closure(fails: bool = False, table: Any = table) -> Any:
            table.zero_grad()
            loss = table(torch.tensor([[1, 2 + comm.rank % 3]])).sum()
            loss.backward()
            if fails:
                raise KeyError("gone")
            return loss

        for _ in range(4):
            error = raised(optimizer.step, lambda closure=closure: closure(comm.rank == comm.size - 1))
            kind = KeyError if comm.rank == comm.size - 1 else PeerError
            agree(comm, type(error) is kind and "gone" in str(error), repr(error))
            optimizer.step(closure)
        ends.append(table.weight.detach().clone())
        optimizer.free()
    agree(comm, torch.equal(*ends))


def test_frozen_parameters_do_not_decay(comm, agree):
    model = dense()
    model[0].requires_grad_(False)
    before, other = model[0].weight.clone(), model[2].weight.detach().clone()
    optimizer = OneBitAdam(model.parameters(), comm=comm, freeze_step=2, weight_decay=0.1)
    for x, y in batches(4, seed=comm.rank):
        optimizer.zero_grad()
        cross_entropy(model, x, y).backward()
        optimizer.step()
    agree(comm, torch.equal(before, model[0].weight) and not torch.equal(other, model[2].weight))
    optimizer.free()
