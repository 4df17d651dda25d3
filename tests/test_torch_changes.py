"""What becomes of a module between two steps: memory that others put under gradients, layers, buffers, refusals."""

from __future__ import annotations

from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import CLASSES, batches, cross_entropy, dense, mean_gradients  # noqa: E402

import bitring.torch  # noqa: E402
from bitring.errors import MismatchError, NonFiniteError, PeerError  # noqa: E402
from bitring.torch import GradientAverager  # noqa: E402


def raised(call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        call(*arguments, **options)
    except Exception as error:
        return error
    return None


def step(averager: Any, model: Any, x: Any, y: Any, before: Any = None) -> Any:
    """The mean gradients of a step, as one tensor; ``before`` is called in the block."""
    model.zero_grad()
    with averager.batch():
        if before is not None:
            before()
        cross_entropy(model, x, y).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def other_memory(model: Any) -> None:
    for p in model.parameters():
        p.grad.data = p.grad.data * 0.5


BETWEEN = {
    "p.grad.data is assigned": other_memory,
    "there and back": lambda model: model.double().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "share_memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("between", BETWEEN)
def test_gradients_of_other_memory(comm, agree, between, overlap, zero_grad):
    """What is exchanged is what parameters have as gradients, wherever that has gone since the last step."""

    def new_model() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 2, 3)), torch.nn.Conv2d(1, 4, 2), torch.nn.Flatten())
        return model.append(torch.nn.Linear(8, CLASSES))

    model, alone = new_model(), new_model()
    averager = GradientAverager(model, comm=comm, overlap=overlap, bucket_bytes=40)
    for number in range(3):
        every = [next(batches(seed=7 * number + rank)) for rank in range(comm.size)]
        left = None if zero_grad else [None if p.grad is None else p.grad.clone() for p in alone.parameters()]

        def backward(rank: int, every: Any = every) -> None:
            cross_entropy(alone, *every[rank]).backward()

        mean_gradients(alone, comm.size, [1.0] * comm.size, backward)
        for p, before in zip(alone.parameters(), left or [], strict=False):
            if before is not None:
                p.grad += before
        if zero_grad:
            model.zero_grad()
        with averager.batch():
            cross_entropy(model, *every[comm.rank]).backward()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        apart = [float((p.grad - q.grad).abs().max()) for p, q in pairs]
        agree(comm, max(apart) < 1e-6, f"step {number}: {apart}")
        BETWEEN[between](model)
        BETWEEN[between](alone)
    averager.free()


def refuse_dtype(model: Any, rank: int) -> Any:
    with pytest.warns(UserWarning, match="Complex modules"):
        model[0].to(torch.complex64)
    return lambda: model[0].to(torch.float32)


def refuse_shape(model: Any, rank: int) -> Any:
    layer = model[4]
    model[4] = torch.nn.Linear(9, CLASSES + rank)
    return lambda: model.__setitem__(4, layer)


def freeze_on_one(model: Any, rank: int) -> Any:
    if rank == 0:
        model[0].requires_grad_(False)
    return lambda: model[0].requires_grad_(True)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("change", [refuse_dtype, refuse_shape, freeze_on_one])
def test_a_change_that_is_refused(comm, agree, change, overlap):
    """It raises on all ranks, as often as it is tried; when it is taken back training goes on, with its residuals."""
    model, steady = dense(), dense()
    options: dict[str, Any] = {"comm": comm, "compression": "onebit:block=64", "overlap": overlap}
    averager, reference = GradientAverager(model, **options), GradientAverager(steady, **options)
    x, y = next(batches(seed=comm.rank))
    step(averager, model, x, y)
    step(reference, steady, x, y)
    back = change(model, comm.rank)
    expected = TypeError if change is refuse_dtype else MismatchError
    for _ in range(2):
        error = raised(averager.average)
        same = comm.size == 1 and change is not refuse_dtype  # alone, one is always of one mind
        agree(comm, same or isinstance(error, (expected, PeerError)), repr(error))
    back()
    if comm.size > 1:
        agree(comm, torch.equal(step(averager, model, x, y), step(reference, steady, x, y)))
    averager.free()
    reference.free()


class WithBuffers(torch.nn.Module):
    """Buffers of many dtypes that differ by rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, CLASSES)
        self.register_buffer("mask", torch.arange(4) % 2 == rank % 2)
        self.register_buffer("code", torch.tensor([rank], dtype=torch.uint8))
        self.register_buffer("phase", torch.tensor([rank * 1j]))
        self.register_buffer("seen", torch.full((2,), float(rank)))
        self.register_buffer("cache", torch.full((rank + 1,), float(rank)), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


def test_state_of_any_dtype_is_broadcast(comm, agree):
    for make in (lambda m: GradientAverager(m, comm=comm).free, lambda m: bitring.torch.broadcast_parameters(m)):
        model = WithBuffers(comm.rank)
        make(model)
        first, mine = WithBuffers(0).state_dict(), model.state_dict()
        agree(comm, all(torch.equal(mine[n], first[n]) for n in ("mask", "code", "phase", "seen")), repr(mine))
        agree(comm, len(model.cache) == comm.rank + 1)  # no part of the state


def test_buffers_that_change(comm, agree):
    model = WithBuffers(comm.rank)
    averager = GradientAverager(model, comm=comm)
    x, y = next(batches())

    def change(tensor: Any) -> None:
        model.seen = tensor + comm.rank

    for new in (torch.zeros(2), torch.zeros(5), torch.zeros(5, dtype=torch.float64)):
        change(new)
        step(averager, model, x, y)
        agree(comm, torch.equal(model.seen, new), repr(model.seen))
    model.register_buffer("more", torch.full((3,), comm.rank))
    step(averager, model, x, y)
    agree(comm, not model.more.any())
    error = raised(lambda: step(averager, model, x, y, before=lambda: change(torch.zeros(6))))
    agree(comm, "the buffer 'seen' was of shape (5,) when the step began and is of shape (6,)" in str(error))
    del model.more
    step(averager, model, x, y)
    agree(comm, not model.seen.any())
    averager.free()


class Words(torch.nn.Module):
    """A table with sparse gradients, below a layer that is compressed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.EmbeddingBag(9, 8, sparse=True, mode="sum")
        self.top = torch.nn.Linear(8, 16)

    def forward(self, words: Any) -> Any:
        return self.top(self.table(words)).sum()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("sparse", ["dense", "gather"])
def test_sparse_gradients_that_are_not_finite(comm, agree, sparse, scaled):
    """On the last rank, and in the table alone; another rank has no samples."""
    model = Words()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    averager = GradientAverager(model, comm=comm, compression="onebit:block=64", sparse=sparse, scaler=scaler)
    bad = comm.size - 1
    words = torch.tensor([[1, 2 + comm.rank % 3]])

    def make(spoil: bool) -> None:
        model.zero_grad()
        with averager.batch(weight=float(comm.rank > 0 or comm.size == 1)):
            if comm.rank > 0 or comm.size == 1:
                model(words).backward()
                if spoil:
                    model.table.weight.grad *= float("nan")

    make(False)
    before = averager.residuals()
    error = raised(make, comm.rank == bad)
    if scaled:
        agree(comm, error is None and not all(p.grad.to_dense().isfinite().all() for p in model.parameters()))
        agree(comm, not model.table.weight.grad.to_dense().isfinite().all())
    else:
        text = f"the gradient of 'table.weight' on rank {bad} holds NaN or Inf"
        agree(comm, type(error) is NonFiniteError and text in str(error), repr(error))
    after = averager.residuals()
    agree(comm, all((before.residual[n] == after.residual[n]).all() for n in before.residual))
    make(False)
    averager.free()


def test_gathered_rows_go_to_the_master(comm, agree):
    table = torch.nn.EmbeddingBag(9, 2, sparse=True, mode="sum", dtype=torch.bfloat16)
    master = table.weight.detach().float()
    averager = GradientAverager(table, comm=comm, sparse="gather", masters={"weight": master})
    with averager.batch():
        table(torch.tensor([[1, 2 + comm.rank % 3]])).sum().backward()
    expected = torch.zeros(9, 2)
    for rank in range(comm.size):
        expected[1] += 1 / comm.size
        expected[2 + rank % 3] += 1 / comm.size
    agree(comm, table.weight.grad is None and master.grad.dtype == torch.float32 and master.grad.is_sparse)
    agree(comm, torch.allclose(master.grad.to_dense(), expected), repr(master.grad))
    averager.free()


def test_average_gradients_with_masters(comm, agree):
    """The averager, with its residuals, is found again though the masters have changed."""
    ends = []
    for once in (True, False):
        model = dense().bfloat16()
        masters = {name: p.detach().float() for name, p in model.named_parameters()}
        options: dict[str, Any] = {"comm": comm, "masters": masters, "compression": "onebit:block=64"}
        averager = GradientAverager(model, **options) if once else None
        for x, y in batches(4, seed=comm.rank):
            model.zero_grad()
            cross_entropy(model, x.bfloat16(), y).backward()
            averager.average() if averager else bitring.torch.average_gradients(model, **options)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    masters[name] -= 0.1 * masters[name].grad
                    p.copy_(masters[name])
        ends.append(torch.cat([m.reshape(-1) for m in masters.values()]))
    agree(comm, torch.equal(*ends))
