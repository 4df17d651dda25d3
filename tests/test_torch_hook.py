"""DistributedDataParallel: with our hook and without, bit for bit; and the averager beside it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")
if not torch.distributed.is_available():
    pytest.skip("PyTorch without torch.distributed", allow_module_level=True)

from torch_models import Branches, batches, convnet, cross_entropy, dense, values  # noqa: E402

from bitring.torch import CommHook, GradientAverager, comm_hook  # noqa: E402


def raised(call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        call(*arguments, **options)
    except Exception as error:
        return error
    return None


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of gloo's with the same ranks."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    path = comm.bcast(str(tmp_path_factory.mktemp("gloo") / "store"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(path, comm.size)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=comm.rank, world_size=comm.size, timeout=datetime.timedelta(seconds=150)
    )
    yield
    torch.distributed.destroy_process_group()
    if comm.rank == 0:
        Path(path).unlink(missing_ok=True)


def new_model(kind: str) -> Any:
    if kind == "unused":
        torch.manual_seed(0)
        return Branches()
    return {"dense": dense, "norm": convnet}[kind]()


def loss_of(kind: str, model: Any, x: Any, y: Any, rank: int) -> Any:
    if kind == "unused":
        return torch.nn.functional.cross_entropy(model(x, left=rank % 2 == 0), y)
    return cross_entropy(model, x, y)


def with_ddp(kind: str, comm: Any, hook: CommHook | None, steps: int = 30, **options: Any) -> Any:
    model = new_model(kind)
    ddp = torch.nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=kind == "unused", bucket_cap_mb=0.001, **options
    )
    if hook is not None:
        ddp.register_comm_hook(hook, comm_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (x, y) in enumerate(batches(steps, seed=comm.rank)):
        optimizer.zero_grad()
        if step % 5 == 1:
            with ddp.no_sync():
                loss_of(kind, ddp, x, y, comm.rank).backward()
        loss_of(kind, ddp, y=y, x=x, rank=comm.rank).backward()
        optimizer.step()
    return values(model)


def with_averager(kind: str, comm: Any, steps: int = 30, **options: Any) -> Any:
    model = new_model(kind)
    averager = GradientAverager(model, comm=comm, bucket_bytes=1000, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (x, y) in enumerate(batches(steps, seed=comm.rank)):
        optimizer.zero_grad()
        if step % 5 == 1:
            with averager.no_sync():
                loss_of(kind, model, x, y, comm.rank).backward()
        with averager.batch():
            loss_of(kind, model, x, y, comm.rank).backward()
        optimizer.step()
    averager.free()
    return values(model)


@pytest.mark.filterwarnings("ignore:find_unused_parameters")
@pytest.mark.filterwarnings("ignore:Grad strides do not match")
@pytest.mark.parametrize("views", [True, False], ids=["views", "copies"])
@pytest.mark.parametrize("kind", ["dense", "norm", "unused"])
def test_bits_of_ddp(comm, agree, group, kind, views):
    """The hook, the averager with overlap and without give the same bits; DDP over gloo too on 2 ranks."""
    hook = CommHook(comm)
    hooked = with_ddp(kind, comm, hook, gradient_as_bucket_view=views)
    found = {"overlap": with_averager(kind, comm, overlap=True), "none": with_averager(kind, comm, overlap=False)}
    if comm.size <= 2:
        found["gloo"] = with_ddp(kind, comm, None, gradient_as_bucket_view=views)
    same = {name: torch.equal(hooked, each) for name, each in found.items()}
    agree(comm, all(same.values()), repr(same))
    agree(comm, len(set(comm.allgather(hooked.numpy().tobytes()))) == 1, "replicas differ")
    hook.free()


@pytest.mark.parametrize("compression", ["onebit:block=64", "powersgd", "bfloat16"])
def test_compressed_hook(comm, agree, group, compression):
    """Compressed, the bits are the averager's, though DDP makes its buckets anew after its first step."""
    hook = CommHook(comm, compression=compression)
    hooked = with_ddp("dense", comm, hook)
    if compression != "powersgd":  # whose bits depend on what it compresses together
        agree(comm, torch.equal(hooked, with_averager("dense", comm, compression=compression)))
    agree(comm, len(set(comm.allgather(hooked.numpy().tobytes()))) == 1 and bool(hooked.isfinite().all()))
    agree(comm, hook.bytes_sent > 0 or comm.size == 1)
    kept = hook.residuals()
    agree(comm, comm.size == 1 or compression == "bfloat16" or len(kept.residual) >= 2, repr(list(kept.residual)))
    hook.free()


@pytest.mark.parametrize("steps", [1, 4], ids=["of first buckets", "of new buckets"])
def test_residuals_go_on(comm, agree, group, steps):
    """In another hook, of another DistributedDataParallel, the bits are those of the one that went on."""

    def trained(model: Any, optimizer: Any, hook: CommHook, part: slice) -> bytes:
        ddp = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)
        ddp.register_comm_hook(hook, comm_hook)
        for x, y in list(batches(8, seed=comm.rank))[part]:
            optimizer.zero_grad()
            cross_entropy(ddp, x, y).backward()
            optimizer.step()
        return values(model).numpy().tobytes()

    results, kept = [], {}
    for goes_on in (False, True):
        model, hook = dense(), CommHook(comm, compression="onebit:block=64")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        if goes_on:
            model.load_state_dict(kept["model"])
            hook.load_state_dict(kept["hook"])
        else:
            trained(model, optimizer, hook, slice(0, steps))
            kept = {"model": {name: p.clone() for name, p in model.state_dict().items()}, "hook": hook.state_dict()}
        results.append(trained(model, optimizer, hook, slice(steps, 8)))
        hook.free()
    agree(comm, results[0] == results[1])
    hook = CommHook(comm, compression="onebit:block=64")
    without = dense()
    without.load_state_dict(kept["model"])
    fresh = trained(without, torch.optim.SGD(without.parameters(), lr=1e-2), hook, slice(steps, 8))
    agree(comm, comm.size == 1 or fresh != results[0])
    wrong = {**kept["hook"], "rank": kept["hook"]["rank"] + (comm.rank == comm.size - 1)}
    error = raised(hook.load_state_dict, wrong)
    agree(comm, isinstance(error, ValueError) and "the state is of rank" in str(error), repr(error))
    hook.free()


def test_an_error_in_an_exchange_is_raised_by_backward(comm, agree, group):
    model = dense()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    hook = CommHook(comm, compression="onebit:block=64")
    ddp.register_comm_hook(hook, comm_hook)
    x, y = next(batches())
    cross_entropy(ddp, x, y).backward()
    bad = comm.size - 1
    error = raised((cross_entropy(ddp, x, y) * (float("nan") if comm.rank == bad else 1.0)).backward)
    agree(comm, isinstance(error, RuntimeError) and "holds NaN or Inf on rank" in str(error), repr(error))


def test_arguments(comm, agree):
    bad = comm.rank == comm.size - 1
    error = raised(CommHook, comm, compression="three_bit" if bad else None)
    agree(
        comm, "three_bit" in str(error) and type(error).__name__ == ("ValueError" if bad else "PeerError"), repr(error)
    )


def test_sparse_gradients_are_refused_in_words(comm, agree, group):
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.EmbeddingBag(9, 4, sparse=True, mode="sum"))
    hook = CommHook(comm)
    ddp.register_comm_hook(hook, comm_hook)
    error = raised(ddp(torch.tensor([[1, 2]])).sum().backward)
    agree(comm, "gradients of Embedding(..., sparse=True) are not exchanged" in str(error), repr(error))
    hook.free()
