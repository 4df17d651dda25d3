"""Synchronised batch normalisation: outputs, gradients and statistics of one process with the whole batch."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import CLASSES, batches, cross_entropy, distance, part, values  # noqa: E402

from bitring.errors import PeerError  # noqa: E402
from bitring.torch import GradientAverager, SyncBatchNorm, convert_sync_batchnorm  # noqa: E402


def new_model(channels_last: bool) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 2, 3)),
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(24, 8),
        torch.nn.BatchNorm1d(8, momentum=None),
        torch.nn.Linear(8, CLASSES),
    ).double()
    return model.to(memory_format=torch.channels_last) if channels_last else model


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_as_in_one_process(comm, agree, channels_last, empty, overlap):
    """Ranks have parts of unequal size, the last one none."""
    reference = new_model(channels_last)
    model = convert_sync_batchnorm(new_model(channels_last), comm)
    averager = GradientAverager(model, comm=comm, overlap=overlap, bucket_bytes=500)
    inner = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    working = comm.size - 1 if empty and comm.size > 1 else comm.size
    cut = part(comm.rank, working) if comm.rank < working else slice(0, 0)
    for x, y in batches(10):
        x = x.double()
        inner.zero_grad()
        cross_entropy(reference, x, y).backward()
        inner.step()
        optimizer.zero_grad()
        n = len(x[cut])
        with averager.batch(weight=n):
            out = model(x[cut])
            # Also without samples, where a mean is NaN: the layers' sums are of all ranks.
            loss = torch.nn.functional.cross_entropy(out, y[cut], reduction="sum") / len(x)
            (loss * (len(x) / n if n else float("nan"))).backward()
        optimizer.step()
    apart = distance(values(model), values(reference))
    stats = [distance(a.double(), b.double()) for a, b in zip(model.buffers(), reference.buffers(), strict=True)]
    agree(comm, apart < 1e-9 and max(stats) < 1e-9, f"{apart:.1e} {stats}")
    model.eval()
    reference.eval()
    x = next(batches())[0].double()
    agree(comm, torch.allclose(model(x), reference(x), atol=1e-9))
    averager.free()


def test_conversion(comm, agree):
    model = new_model(False)
    names, tensors = list(model.state_dict()), {id(p) for p in model.parameters()}
    made = convert_sync_batchnorm(model, comm)
    agree(comm, made is model and isinstance(model[2], SyncBatchNorm) and isinstance(model[6], SyncBatchNorm))
    agree(comm, list(model.state_dict()) == names and {id(p) for p in model.parameters()} == tensors)
    alone = convert_sync_batchnorm(torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False), comm)
    y = alone(torch.arange(6.0).reshape(2, 3) + comm.rank)
    agree(comm, isinstance(alone, SyncBatchNorm) and y.shape == (2, 3) and bool(y.isfinite().all()))


def test_copies_files_and_layers_at_two_places(comm, agree):
    model = convert_sync_batchnorm(new_model(False), comm)
    x = next(batches(seed=comm.rank))[0]
    twin = copy.deepcopy(model)
    agree(comm, torch.equal(twin(x.double()), model(x.double())))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    agree(comm, torch.equal(loaded.eval()(x.double()), model.eval()(x.double())))
    with pytest.raises(RuntimeError, match="SyncBatchNorm: a model that comes from a file"):
        loaded.train()(x.double())
    convert_sync_batchnorm(loaded, comm)
    agree(comm, torch.equal(loaded(x.double()), model.train()(x.double())))

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.BatchNorm1d(3)
            self.two = self.one

    twice = convert_sync_batchnorm(Twice(), comm)
    agree(comm, isinstance(twice.one, SyncBatchNorm) and twice.two is twice.one)


def test_a_second_derivative_is_refused(comm):
    model = convert_sync_batchnorm(new_model(False), comm)
    x, y = next(batches(seed=comm.rank))
    x = x.double().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(model, x, y), x, create_graph=True)
    if comm.size > 1:  # alone it is PyTorch's own layer
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()


@pytest.mark.parametrize("place", ["before", "between", "backward", "after"])
def test_an_exception_beside_such_layers(comm, agree, place):
    """The others do not wait in a layer for a rank that has left the block."""
    model = convert_sync_batchnorm(new_model(False), comm)
    averager = GradientAverager(model, comm=comm)
    x, y = next(batches(seed=comm.rank))
    x = x.double()
    bad = comm.size - 1

    def fail(*_: Any) -> None:
        raise KeyError("gone")

    def step(fails: bool) -> None:
        model.zero_grad()
        with averager.batch():
            if fails and place == "before":
                fail()
            handle = None
            if fails and place == "between":
                handle = model[4].register_forward_hook(fail)
            elif fails and place == "backward":
                handle = model[4].register_full_backward_hook(fail)
            try:
                cross_entropy(model, x, y).backward()
            finally:
                if handle is not None:
                    handle.remove()
            if fails and place == "after":
                fail()

    def raised(fails: bool) -> Any:
        try:
            step(fails)
        except Exception as error:
            return error
        return None

    step(False)
    for _ in range(2):
        error = raised(comm.rank == bad)
        agree(comm, type(error) is (KeyError if comm.rank == bad else PeerError) and "gone" in str(error), repr(error))
        step(False)
    averager.free()
