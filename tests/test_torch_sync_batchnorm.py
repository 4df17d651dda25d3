"""Synchronised batch normalisation: outputs, gradients and statistics of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import CLASSES, batches, cross_entropy, distance, part, values  # noqa: E402

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
