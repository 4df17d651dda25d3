"""Cases that the tests of Horovod and of DistributedDataParallel look at, on the averager; docs/torch.md lists them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import FEATURES, batches, cross_entropy, dense, values  # noqa: E402

import bitring  # noqa: E402
import bitring.torch  # noqa: E402
from bitring.errors import PeerError  # noqa: E402
from bitring.torch import GradientAverager  # noqa: E402


def check(comm: Any, agree: Any, make: Callable[[], Any], loss: Callable[[Any, int], Any], **options: Any) -> None:
    """The gradients after two blocks are the means of those that each rank computes alone, with overlap and without."""
    for overlap in (True, False):
        model = make()
        averager = GradientAverager(model, comm=comm, overlap=overlap, bucket_bytes=200, **options)
        alone = copy.deepcopy(model)
        for _ in range(2):
            model.zero_grad()
            alone.zero_grad()
            loss(alone, comm.rank).backward()
            with averager.batch():
                loss(model, comm.rank).backward()
            for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                mine = None if q.grad is None else q.grad.double().numpy()
                everyone = comm.allgather(mine)
                there = [g for g in everyone if g is not None]
                if not there:
                    agree(comm, p.grad is None, f"{name} has a gradient that no rank has")
                    continue
                mean = sum(there) / comm.size
                agree(comm, np.allclose(p.grad.double().numpy(), mean, atol=1e-6), f"{name}, overlap={overlap}")
        averager.free()


def data(rank: int) -> tuple[Any, Any]:
    return next(batches(seed=rank))


class Checkpointed(torch.nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = dense()
        self.reentrant = reentrant

    def forward(self, x: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        h = checkpoint(self.body[:2], x.requires_grad_(), use_reentrant=self.reentrant)
        return self.body[2:](h)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(comm, agree, reentrant):
    check(comm, agree, lambda: Checkpointed(reentrant), lambda m, r: cross_entropy(m, *data(r)))


class Recurrent(torch.nn.Module):
    """A layer used several times, a different number of times on each rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = torch.nn.Linear(FEATURES, FEATURES)
        self.scale = torch.nn.Parameter(torch.tensor(0.5))  # without dimensions
        self.none = torch.nn.Parameter(torch.zeros(0, 3))  # without values

    def forward(self, x: Any, times: int) -> Any:
        for _ in range(times):
            x = torch.tanh(self.cell(x)) * self.scale
        return x


def test_a_layer_used_several_times(comm, agree):
    check(comm, agree, Recurrent, lambda m, r: m(data(r)[0], 1 + r).square().mean())


class Outputs(torch.nn.Module):
    """Several outputs in a dict, of which each rank uses others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = torch.nn.ModuleDict({str(i): torch.nn.Linear(FEATURES, 2) for i in range(4)})

    def forward(self, x: Any) -> Any:
        return {name: head(x) for name, head in self.heads.items()}


def test_outputs_that_are_not_used(comm, agree):
    check(comm, agree, Outputs, lambda m, r: m(data(r)[0])[str(r % 2)].square().mean())


def test_a_gradient_penalty(comm, agree):
    """Gradients of gradients: the first backward goes to no parameter's grad."""

    def loss(model: Any, rank: int) -> Any:
        x = data(rank)[0].requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().mean() + model(x).square().mean()

    check(comm, agree, dense, loss)


def test_double_precision_and_mixed_dtypes(comm, agree):
    def make() -> Any:
        torch.manual_seed(0)
        return torch.nn.ModuleList([torch.nn.Linear(FEATURES, 8).double(), torch.nn.Linear(8, 3)])

    check(comm, agree, make, lambda m, r: m[1](m[0](data(r)[0].double()).float()).square().mean())


def test_nothing_to_train(comm, agree):
    model = dense().requires_grad_(False)
    averager = GradientAverager(model, comm=comm)
    with averager.batch(weight=3):
        model(data(comm.rank)[0])
    averager.average()
    agree(comm, averager.steps == 2 and all(p.grad is None for p in model.parameters()))
    averager.free()


def test_eval_and_inference_exchange_nothing(comm, agree):
    model = dense()
    averager = GradientAverager(model, comm=comm)
    if comm.rank == 0:  # one rank alone evaluates, and computes gradients of its own
        with torch.inference_mode():
            model.eval()(data(0)[0])
        cross_entropy(model, *data(0)).backward()
        model.zero_grad()
    with averager.batch():
        cross_entropy(model.train(), *data(comm.rank)).backward()
    agree(comm, averager.steps == 1)
    averager.free()


def test_the_module_can_be_copied_and_saved(comm, agree, tmp_path):
    """Hooks and views do not stick to copies; names in state_dict() are the module's own."""
    model = dense()
    averager = GradientAverager(model, comm=comm)
    with averager.batch():
        cross_entropy(model, *data(comm.rank)).backward()
    twin = copy.deepcopy(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(model, tmp_path / "whole.pt")
    other = torch.load(tmp_path / "whole.pt", weights_only=False)
    for each in (twin, other):
        if comm.rank == 0:
            cross_entropy(each, *data(0)).backward()  # tells nobody
    agree(comm, list(model.state_dict()) == list(dense().state_dict()) and torch.equal(values(twin), values(model)))
    averager.free()


def test_several_models_at_once(comm, agree):
    """As of a GAN: two averagers, their blocks one after the other, and one inside the other."""
    first, second = dense(), dense(seed=1)
    one = GradientAverager(first, comm=comm, overlap=True)
    two = GradientAverager(second, comm=comm, overlap=True)
    x, y = data(comm.rank)
    with one.batch():
        cross_entropy(first, x, y).backward()
    with two.batch(), one.batch():
        loss = cross_entropy(second, x, y) + cross_entropy(first, x, y)
        loss.backward()
    for model in (first, second):
        everyone = comm.allgather(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy().tobytes())
        agree(comm, len(set(everyone)) == 1)
    one.free()
    two.free()


def test_ranks_out_of_data(comm, agree):
    """Horovod's and DDP's join: ranks with fewer batches make the rest with weight 0."""
    model = dense()
    averager = GradientAverager(model, comm=comm, overlap=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine = list(batches(2 + comm.rank, seed=comm.rank))
    for step in range(1 + comm.size):
        optimizer.zero_grad()
        with averager.batch(weight=float(step < len(mine))):
            if step < len(mine):
                cross_entropy(model, *mine[step]).backward()
        optimizer.step()
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)
    averager.free()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "NAdam", "RAdam", "Rprop"])
def test_broadcast_of_each_optimizers_state(comm, agree, name):
    model = dense(seed=comm.rank)
    kind = getattr(torch.optim, name)
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = kind(model.parameters(), lr=0.01 * (comm.rank + 1), **options)
    if comm.rank == 0:  # on the others there is no state yet
        for _ in range(2):
            cross_entropy(model, *data(0)).backward()
            optimizer.step()
    bitring.torch.broadcast_parameters(model, comm=comm)
    bitring.torch.broadcast_optimizer_state(optimizer, comm=comm)
    model.zero_grad()
    cross_entropy(model, *data(7)).backward()
    optimizer.step()
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)


def test_what_does_not_belong_into_a_block(comm, agree):
    """An update before the mean is there, and what would look at an exchange that is under way."""
    model, other = dense(), dense(seed=1)
    averager = GradientAverager(model, comm=comm, compression="onebit:block=64", overlap=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    bad = comm.size - 1
    before = values(model)

    def step(last: Callable[[], Any]) -> None:
        with averager.batch():
            cross_entropy(model, *data(comm.rank)).backward()
            elsewhere.step()
            if comm.rank == bad:
                last()

    for last, text in (
        (optimizer.step, "SGD.step() was called inside the step"),
        (averager.residuals, "GradientAverager.residuals: called inside a step"),
        (averager.free, "GradientAverager.free: called inside a step"),
    ):
        try:
            step(last)
        except Exception as problem:
            error = problem
        else:
            error = None
        kind = RuntimeError if comm.rank == bad else PeerError
        agree(comm, type(error) is kind and text in str(error), repr(error))
        agree(comm, torch.equal(before, values(model)) and averager.steps == 0, text)
    with averager.batch():
        cross_entropy(model, *data(comm.rank)).backward()
    optimizer.step()
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1)
    averager.free()
    averager.free()


def test_parameters_of_another_shape(comm, agree):
    """As pruning makes them: `p.data = ...`."""
    model = torch.nn.Linear(FEATURES, 3)
    averager = GradientAverager(model, comm=comm)
    model.weight.data, model.bias.data = torch.ones(5, FEATURES), torch.zeros(5)
    with averager.batch():
        model(data(comm.rank)[0]).square().mean().backward()
    bits = comm.allgather(model.weight.grad.numpy().tobytes())
    agree(comm, model.weight.grad.shape == (5, FEATURES) and len(set(bits)) == 1)
    averager.free()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_that_load_data(comm, agree):
    """Processes that PyTorch forks, in the middle of steps."""
    model = dense()
    averager = GradientAverager(model, comm=comm, overlap=True)
    samples = torch.utils.data.TensorDataset(*data(comm.rank))
    for x, y in torch.utils.data.DataLoader(samples, batch_size=4, num_workers=1, multiprocessing_context="fork"):
        with averager.batch(weight=len(x)):
            cross_entropy(model, x, y).backward()
    agree(comm, averager.steps == 3)
    averager.free()


@pytest.mark.parametrize("compression", bitring.compressors())
def test_every_compressor(comm, agree, compression):
    """Replicas' gradients have the same bits, and what is left out is added later."""
    model = torch.nn.Linear(40, 60)
    averager = GradientAverager(model, comm=comm, compression=compression, overlap=True)
    total, exact = torch.zeros(60, 40), torch.zeros(60, 40)
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(comm.rank))
    for _ in range(12):
        model.zero_grad()
        with averager.batch():
            model(x).square().mean().backward()
        bits = comm.allgather(model.weight.grad.numpy().tobytes())
        agree(comm, len(set(bits)) == 1, "replicas differ")
        total += model.weight.grad
        model.zero_grad()
        model(x).square().mean().backward()
        exact += torch.from_numpy(sum(comm.allgather(model.weight.grad.numpy()))) / comm.size
    apart = float((total - exact).norm() / exact.norm())
    agree(comm, apart < (1e-5 if comm.size == 1 else 0.5 if compression != "randomk" else 1.0), f"{apart:.3f}")
    averager.free()


def test_one_bit_knows_rows_and_columns(comm, agree):
    """Its levels are of rank one, as with a plan that is told the shapes, and not those of blocks."""
    model = torch.nn.Linear(64, 200, bias=False)
    averager = GradientAverager(model, comm=comm, compression="onebit")
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(comm.rank))
    model(x).square().mean().backward()
    mine = model.weight.grad.numpy().reshape(-1) * np.float32(1 / comm.size)
    averager.average()
    for shapes in ([(200, 64)], None):
        buffer = mine.copy()
        bitring.plan_allreduce(buffer, comm=comm, compression="onebit", shapes=shapes)()
        alike = np.array_equal(buffer, model.weight.grad.numpy().reshape(-1))
        agree(comm, alike == (shapes is not None or comm.size == 1), f"shapes={shapes}")
    averager.free()
