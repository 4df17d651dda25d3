"""GradientAverager against one process that computes every rank's gradients, over all that training may do."""

from __future__ import annotations

import math
import signal
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import (  # noqa: E402
    CLASSES,
    FEATURES,
    SAMPLES,
    Branches,
    Tied,
    batches,
    convnet,
    cross_entropy,
    dense,
    distance,
    mean_gradients,
    part,
    values,
)

import bitring  # noqa: E402
import bitring.torch  # noqa: E402
from bitring.errors import MismatchError, NonFiniteError, PeerError  # noqa: E402
from bitring.torch import GradientAverager  # noqa: E402
from bitring.torch.bucket import Bucket  # noqa: E402

arrive = Bucket.arrive


def raised(call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        call(*arguments, **options)
    except Exception as error:
        return error
    return None


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model: Any) -> Any:
    return torch.optim.Adam(model.parameters(), lr=2e-3)


class Case:
    """How a rank trains: ``model``, ``loss`` of its part, what happens between the averaging and the update."""

    scaled = False
    passes = 1

    def model(self) -> Any:
        return dense()

    def backward(self, model: Any, x: Any, y: Any, rank: int, scaler: Any = None) -> None:
        loss = self.loss(model, x, y, rank)
        (loss if scaler is None else scaler.scale(loss)).backward()

    def loss(self, model: Any, x: Any, y: Any, rank: int) -> Any:
        return cross_entropy(model, x, y)

    def weight(self, step: int, rank: int, size: int) -> int:
        cut = part(rank, size)
        return cut.stop - cut.start

    def between(self, model: Any) -> None:
        pass


class Accumulation(Case):
    passes = 3


class Clipping(Case):
    def between(self, model: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)


class Schedule(Case):
    pass


class Autocast(Case):
    def loss(self, model: Any, x: Any, y: Any, rank: int) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, x, y)


class Overflow(Case):
    """In every seventh step the loss of the last rank is so large that its gradients are Inf."""

    scaled = True

    def backward(self, model: Any, x: Any, y: Any, rank: int, scaler: Any = None) -> None:
        loss = self.loss(model, x, y, rank)
        self.calls = getattr(self, "calls", 0) + 1
        if self.overflows:
            loss = loss * 1e38 * 1e38
        (loss if scaler is None else scaler.scale(loss)).backward()

    overflows = False


class Unused(Case):
    def model(self) -> Any:
        torch.manual_seed(0)
        return Branches()

    def loss(self, model: Any, x: Any, y: Any, rank: int) -> Any:
        return torch.nn.functional.cross_entropy(model(x, left=rank % 2 == 0), y)


class TiedWeights(Case):
    def model(self) -> Any:
        torch.manual_seed(0)
        return Tied()


class ChannelsLast(Case):
    def model(self) -> Any:
        return convnet()

    def weight(self, step: int, rank: int, size: int) -> int:
        return max(2, super().weight(step, rank, size))


class Empty(Case):
    """In every third step each rank in turn has no samples."""

    def weight(self, step: int, rank: int, size: int) -> int:
        return 0 if size > 1 and step % (3 * size) == 3 * rank else super().weight(step, rank, size)


CASES = {
    "accumulation": Accumulation,
    "clipping": Clipping,
    "schedule": Schedule,
    "autocast": Autocast,
    "overflow": Overflow,
    "unused and frozen": Unused,
    "tied": TiedWeights,
    "channels_last": ChannelsLast,
    "empty": Empty,
}


def portion(case: Case, step: int, rank: int, size: int, x: Any, y: Any) -> tuple[Any, Any, int]:
    n = case.weight(step, rank, size)
    begin = min(part(rank, size).start, SAMPLES - n)
    return x[begin : begin + n], y[begin : begin + n], n


def scheduler_of(case: Case, optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5) if isinstance(case, Schedule) else None


def alone(case: Case, new_optimizer: Any, size: int) -> Any:
    """Training in one process."""
    model = case.model()
    optimizer = new_optimizer(model)
    scheduler = scheduler_of(case, optimizer)
    for step, (x, y) in enumerate(batches()):
        if isinstance(case, Overflow) and step % 7 == 3:
            continue

        def backward(rank: int, step: int = step, x: Any = x, y: Any = y) -> None:
            for i in range(case.passes):
                px, py, _ = portion(case, step, rank, size, x.roll(i, 0), y.roll(i, 0))
                case.backward(model, px, py, rank)

        weights = [float(case.weight(step, rank, size)) for rank in range(size)]
        mean_gradients(model, size, weights, backward)
        case.between(model)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return values(model)


def together(case: Case, new_optimizer: Any, comm: Any, **options: Any) -> Any:
    """Training on all ranks."""
    rank, size = comm.rank, comm.size
    model = case.model()
    if rank:
        for p in model.parameters():
            p.data.zero_()  # all take rank 0's
    optimizer = new_optimizer(model)
    scheduler = scheduler_of(case, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=5) if case.scaled else None
    averager = GradientAverager(model, comm=comm, scaler=scaler, **options)
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        if isinstance(case, Overflow):
            case.overflows = step % 7 == 3 and rank == size - 1
        for i in range(case.passes - 1):
            px, py, n = portion(case, step, rank, size, x.roll(i, 0), y.roll(i, 0))
            with averager.no_sync():
                case.backward(model, px, py, rank, scaler)
        i = case.passes - 1
        px, py, n = portion(case, step, rank, size, x.roll(i, 0), y.roll(i, 0))
        with averager.batch(weight=n):
            if n:
                case.backward(model, px, py, rank, scaler)
        if scaler:
            scaler.unscale_(optimizer)
        case.between(model)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if scheduler:
            scheduler.step()
    averager.free()
    return values(model)


@pytest.mark.parametrize(("new_optimizer", "limit"), [(sgd, 1e-6), (adam, 1e-5)], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(comm, agree, name, new_optimizer, limit):
    case = CASES[name]()
    expected = alone(CASES[name](), new_optimizer, comm.size)
    found = together(case, new_optimizer, comm, overlap=True, bucket_bytes=500)
    apart = distance(found, expected)
    agree(comm, apart <= limit, f"{name}: {apart:.2e} from one process")
    again = together(CASES[name](), new_optimizer, comm, overlap=False, bucket_bytes=500)
    agree(comm, torch.equal(found, again), f"{name}: overlap changes the bits")
    agree(comm, len(set(comm.allgather(found.numpy().tobytes()))) == 1, f"{name}: replicas differ")


@pytest.mark.parametrize("compression", ["onebit:block=64", "powersgd", "topk:density=0.2", "linear", "bfloat16"])
def test_compressed_bits_do_not_depend_on_overlap(comm, agree, compression):
    first = together(Empty(), sgd, comm, overlap=True, bucket_bytes=500, compression=compression)
    second = together(Empty(), sgd, comm, overlap=False, bucket_bytes=500, compression=compression)
    agree(comm, torch.equal(first, second) and bool(first.isfinite().all()))
    agree(comm, len(set(comm.allgather(first.numpy().tobytes()))) == 1, "replicas differ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(comm, agree, dtype):
    """The mean of 16-bit gradients is rounded once more than one process does; with float32 masters it is not."""
    dtype = getattr(torch, dtype)
    model = dense().to(dtype)
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    plain = GradientAverager(model, comm=comm, overlap=True, bucket_bytes=500)
    x, y = next(batches())
    cut = part(comm.rank, comm.size)
    mine = len(x[cut])
    with plain.batch(weight=mine):
        if mine:
            torch.nn.functional.cross_entropy(model(x[cut].to(dtype)).float(), y[cut]).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    kinds = {g.dtype for g in found.values()}
    model.zero_grad()
    averager = GradientAverager(model, comm=comm, masters=masters)
    with averager.batch(weight=mine):
        if mine:
            torch.nn.functional.cross_entropy(model(x[cut].to(dtype)).float(), y[cut]).backward()
    dropped = all(p.grad is None for p in model.parameters())
    reference = dense().to(dtype)
    wide: dict[str, Any] = {}
    for rank in range(comm.size):
        cut = part(rank, comm.size)
        reference.zero_grad()
        if len(x[cut]):
            torch.nn.functional.cross_entropy(reference(x[cut].to(dtype)).float(), y[cut]).backward()
            for name, p in reference.named_parameters():
                wide[name] = wide.get(name, 0) + p.grad.float() * (len(x[cut]) / len(x))
    close = all(torch.allclose(masters[n].grad, wide[n], rtol=1e-6, atol=1e-9) for n in wide)
    eps = torch.finfo(dtype).eps
    near = all(
        torch.allclose(found[n].float(), wide[n], rtol=comm.size * eps, atol=4 * eps * wide[n].abs().max())
        for n in wide
    )
    agree(comm, kinds == {dtype} and dropped and close and near, f"{kinds} {dropped} {close} {near}")
    plain.free()
    averager.free()


@pytest.mark.parametrize(("new_optimizer", "limit"), [(sgd, 1e-6), (adam, 1e-5)], ids=["sgd", "adam"])
def test_masters_as_in_one_process(comm, agree, new_optimizer, limit):
    """50 steps of a bfloat16 module whose float32 masters are trained, with overlap and without."""
    rank, size = comm.rank, comm.size
    weights = [float(part(r, size).stop - part(r, size).start) for r in range(size)]

    def backward(model: Any, r: int, x: Any, y: Any) -> None:
        cut = part(r, size)
        torch.nn.functional.cross_entropy(model(x[cut].bfloat16()).float(), y[cut]).backward()

    def trained(gradients: Any, **options: Any) -> Any:
        model = dense().bfloat16()
        masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
        averager = GradientAverager(model, comm=comm, masters=masters, **options) if options else None
        optimizer = new_optimizer(torch.nn.ParameterList(masters.values()))
        for x, y in batches():
            model.zero_grad()
            gradients(model, masters, averager, x, y)
            optimizer.step()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(masters[name])
        if averager is not None:
            averager.free()
        return torch.cat([t.detach().reshape(-1) for t in masters.values()])

    def alone(model: Any, masters: Any, averager: Any, x: Any, y: Any) -> None:
        sums = {name: torch.zeros_like(t) for name, t in masters.items()}
        for r in range(size):
            model.zero_grad()
            if weights[r]:
                backward(model, r, x, y)
                for name, p in model.named_parameters():
                    sums[name] += p.grad.float() * (weights[r] / sum(weights))
        for name, t in masters.items():
            t.grad = sums[name]

    def together(model: Any, masters: Any, averager: Any, x: Any, y: Any) -> None:
        with averager.batch(weight=weights[rank]):
            if weights[rank]:
                backward(model, rank, x, y)

    expected = trained(alone)
    found = [trained(together, overlap=overlap, bucket_bytes=500) for overlap in (True, False)]
    apart = distance(found[0], expected)
    agree(comm, apart <= limit and torch.equal(*found), f"{apart:.2e} from one process")
    agree(comm, len(set(comm.allgather(found[0].numpy().tobytes()))) == 1, "replicas differ")


@pytest.mark.parametrize("compression", [None, "onebit:block=64", "powersgd"])
def test_parameters_of_a_device_are_staged(comm, agree, monkeypatch, compression):
    """A device that is no other memory stands for one: gradients are packed there, copied, exchanged, copied back."""
    first = together(Unused(), adam, comm, compression=compression, bucket_bytes=500)
    monkeypatch.setattr("bitring.torch.options.device_of", lambda p, where: "cpu:0")
    staged = []
    monkeypatch.setattr(Bucket, "arrive", lambda self: staged.append(self.tensor is not self._host) or arrive(self))
    second = together(Unused(), adam, comm, compression=compression, bucket_bytes=500)
    agree(comm, torch.equal(first, second) and bool(staged) and all(staged), f"{len(staged)} buckets")


def test_gradients_are_views_and_are_attached_again(comm, agree):
    model = dense()
    averager = GradientAverager(model, comm=comm)
    seen = []
    for x, y in batches(4):
        seen.append([p.grad.data_ptr() if p.grad is not None else None for p in model.parameters()])
        with averager.batch():
            cross_entropy(model, x, y).backward()
        model.zero_grad(set_to_none=len(seen) % 2 == 0)
    where = [view.data_ptr() for bucket in averager.exchange.buckets for view in bucket.views]
    agree(comm, sorted(seen[1]) == sorted(where) and seen[2] == [None] * 6 and seen[3] == seen[1], repr(seen))
    averager.free()


def test_a_gradient_without_zero_grad_adds_up(comm, agree):
    """Two blocks without zero_grad() between them: as in one process, the second adds to the mean of the first."""
    model, reference = dense(), dense()
    averager = GradientAverager(model, comm=comm, overlap=True)
    for x, y in batches(2, seed=comm.rank):
        with averager.batch():
            cross_entropy(model, x, y).backward()
    # The second mean is that of first mean + own gradient.
    sums: list[Any] = [0] * 6
    for rank in range(comm.size):
        for x, y in batches(2, seed=rank):
            reference.zero_grad()
            cross_entropy(reference, x, y).backward()
            sums = [s + p.grad / comm.size for s, p in zip(sums, reference.parameters(), strict=True)]
    close = all(torch.allclose(p.grad, s, atol=1e-7) for p, s in zip(model.parameters(), sums, strict=True))
    agree(comm, close)
    averager.free()


def test_none_on_all_ranks_stays_none(comm, agree):
    torch.manual_seed(0)
    model = Branches()
    averager = GradientAverager(model, comm=comm)
    x, y = next(batches())
    for _ in range(2):
        with averager.batch():
            torch.nn.functional.cross_entropy(model(x, left=comm.rank % 2 == 0), y).backward()
        none = {name for name, p in model.named_parameters() if p.grad is None}
        expected = {"never.weight", "never.bias", "frozen.weight", "frozen.bias"}
        if comm.size == 1:
            expected |= {"right.weight", "right.bias"}
        agree(comm, none == expected, repr(none))
        model.zero_grad()
    averager.free()


def test_unused_may_be_an_error(comm, agree):
    torch.manual_seed(0)
    model = Branches()
    model.never = None
    averager = GradientAverager(model, comm=comm, unused="error")
    x, y = next(batches())

    def step(both: bool) -> None:
        with averager.batch():
            loss = torch.nn.functional.cross_entropy(model(x), y)
            if both:
                loss = loss + torch.nn.functional.cross_entropy(model(x, left=False), y)
            loss.backward()

    bad = comm.size - 1
    error = raised(step, comm.rank != bad)
    kind = ValueError if comm.rank == bad else PeerError
    agree(comm, type(error) is kind and "the gradient of 'right.weight' is None" in str(error), repr(error))
    agree(comm, raised(step, True) is None and averager.steps == 1)
    averager.free()


def test_weight_zero_everywhere(comm, agree):
    model = dense()
    optimizer = adam(model)
    averager = GradientAverager(model, comm=comm, overlap=True, compression="onebit:block=64")
    before = values(model)
    with averager.batch(weight=0):
        x, y = next(batches())
        cross_entropy(model, x * math.nan, y).backward()
    optimizer.step()
    agree(comm, all(p.grad is None for p in model.parameters()) and torch.equal(before, values(model)))
    averager.free()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("compression", [None, "onebit:block=64"])
@pytest.mark.parametrize("after_backward", [True, False])
def test_an_exception_in_a_block_ends_the_step_everywhere(comm, agree, overlap, compression, after_backward):
    model = dense()
    averager = GradientAverager(model, comm=comm, overlap=overlap, compression=compression, bucket_bytes=500)
    data = list(batches(3, seed=comm.rank))

    def step(i: int, fails: bool = False) -> None:
        x, y = data[i]
        with averager.batch():
            if fails and not after_backward:
                raise KeyError("no such sample")
            cross_entropy(model, x, y).backward()
            if fails:
                raise KeyError("no such sample")

    def carried() -> list[Any]:
        return [np.array(a) for bucket in averager.exchange.buckets for a in bucket.plan.state_dict().values()]

    step(0)
    kept, before = carried(), [p.grad.clone() for p in model.parameters()]
    bad = comm.size - 1
    error = raised(step, 1, fails=comm.rank == bad)
    kind = KeyError if comm.rank == bad else PeerError
    agree(comm, type(error) is kind and "no such sample" in str(error), repr(error))
    alike = all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    agree(comm, alike, "gradients are not as before")
    agree(comm, all(map(np.array_equal, kept, carried())), "residuals are not as before")
    agree(comm, raised(step, 2) is None and averager.steps == 2)
    averager.free()


@pytest.mark.parametrize("compression", [None, "onebit:block=64"])
def test_a_ctrl_c_in_a_block_ends_the_step_everywhere(comm, agree, compression):
    """On one rank, before anything was exchanged: the others hear of it, and all can go on."""
    model = dense()
    averager = GradientAverager(model, comm=comm, overlap=False, compression=compression)
    bad, error = comm.size - 1, None
    for interrupted in (True, False):
        try:
            with averager.batch():
                cross_entropy(model, *next(batches(seed=comm.rank))).backward()
                if interrupted and comm.rank == bad:
                    signal.raise_signal(signal.SIGINT)
        except BaseException as problem:
            error = problem
    kind = KeyboardInterrupt if comm.rank == bad else PeerError
    agree(comm, type(error) is kind and (comm.rank == bad or "raised KeyboardInterrupt" in str(error)), repr(error))
    agree(comm, averager.steps == 1)
    averager.free()


def test_a_bad_weight(comm, agree):
    model = dense()
    for overlap in (True, False):
        averager = GradientAverager(model, comm=comm, overlap=overlap)
        for weight, kind in ((-1, ValueError), ("2", TypeError), (math.nan, ValueError)):

            def step(weight: Any = weight, averager: Any = averager) -> None:
                with averager.batch(weight=weight if comm.rank == 0 else 1):
                    x, y = next(batches())
                    cross_entropy(model, x, y).backward()

            error = raised(step)
            expected = kind if comm.rank == 0 else PeerError
            text = "GradientAverager.batch (step 0): weight must be"
            agree(comm, type(error) is expected and text in str(error), repr(error))
        averager.free()


def test_two_backwards_in_a_block(comm, agree):
    model = dense()
    averager = GradientAverager(model, comm=comm)
    x, y = next(batches())

    def twice(quiet: bool) -> None:
        with averager.batch():
            if quiet:
                with averager.no_sync():
                    cross_entropy(model, x, y).backward()
            else:
                cross_entropy(model, x, y).backward()
            cross_entropy(model, x, y).backward()

    error = raised(twice, False)
    agree(
        comm,
        type(error) in (RuntimeError, PeerError) and "once more than a step has room for" in str(error),
        repr(error),
    )
    agree(comm, raised(twice, True) is None)
    with averager.batch():
        error = raised(averager.batch().__enter__)
        agree(comm, type(error) is RuntimeError and "blocks cannot be nested" in str(error))
    averager.free()


@pytest.mark.parametrize("overlap", [True, False])
def test_overflow_leaves_residuals(comm, agree, overlap):
    """Compressed, with a scaler: Inf on one rank gives Inf on all, and residuals stay, those of other buckets too."""
    model = dense()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    averager = GradientAverager(
        model, comm=comm, overlap=overlap, compression="onebit:block=64", bucket_bytes=300, scaler=scaler
    )
    optimizer = sgd(model)
    data = list(batches(3, seed=comm.rank))

    def step(i: int, bad_name: str | None) -> None:
        optimizer.zero_grad()
        with averager.batch():
            loss = cross_entropy(model, *data[i])
            scaler.scale(loss).backward()
            if bad_name and comm.rank == comm.size - 1:
                pass
        scaler.step(optimizer)
        scaler.update()

    def carried() -> list[Any]:
        return [np.array(a) for bucket in averager.exchange.buckets for a in bucket.plan.state_dict().values()]

    step(0, None)
    for name in ("0.bias", "2.weight"):  # one travels exactly, one compressed
        handle = dict(model.named_parameters())[name].register_hook(
            lambda g: g * math.inf if comm.rank == comm.size - 1 else g
        )
        kept, before, scale = carried(), values(model), scaler.get_scale()
        step(1, name)
        handle.remove()
        agree(comm, torch.equal(before, values(model)), f"{name}: the step was not skipped")
        agree(comm, scaler.get_scale() == scale / 2, f"{name}: {scaler.get_scale()} after {scale}")
        agree(comm, all(map(np.array_equal, kept, carried())), f"{name}: residuals have changed")
    step(2, None)
    agree(comm, not torch.equal(before, values(model)) and averager.steps == 4)
    averager.free()


def test_compressed_nan_without_scaler(comm, agree):
    model = dense()
    averager = GradientAverager(model, comm=comm, compression="onebit:block=64", bucket_bytes=300)
    x, y = next(batches())
    bad = comm.size - 1

    def step(nan: bool) -> None:
        with averager.batch():
            loss = cross_entropy(model, x, y)
            loss.backward()
            if nan and comm.rank == bad:
                model[2].weight.grad[0, 0] = math.nan

    averager.options.__dict__["overlap"] = False
    averager.overlaps = False  # the gradient is spoilt after back-propagation
    error = raised(step, True)
    text = f"GradientAverager.batch (step 0): the gradient of '2.weight' on rank {bad} holds NaN or Inf"
    agree(comm, type(error) is NonFiniteError and text in str(error), repr(error))
    agree(comm, raised(step, False) is None)
    averager.free()


def test_parameters_that_move_or_freeze(comm, agree):
    """module.double() and requires_grad_ are noticed at the next step; residuals stay."""
    model = dense()
    averager = GradientAverager(model, comm=comm, compression="onebit:block=64", bucket_bytes=300)

    def step(i: int) -> None:
        model.zero_grad()
        x, y = list(batches(5, seed=comm.rank))[i]
        with averager.batch():
            cross_entropy(model, x.to(model[0].weight.dtype), y).backward()

    step(0)
    kept = averager.residuals()
    model[0].requires_grad_(False)
    step(1)
    agree(comm, model[0].weight.grad is None and set(averager.residuals().residual) == {"2.weight"})
    model[0].requires_grad_(True)
    averager.refresh()
    now = averager.residuals()
    same = np.array_equal(now.residual["0.weight"], np.zeros((17, FEATURES))) and model[0].weight.requires_grad
    agree(comm, same and set(now.residual) == set(kept.residual))
    before = averager.residuals().residual["2.weight"]
    model.double()
    averager.refresh()
    agree(comm, np.array_equal(before.astype(np.float64), averager.residuals().residual["2.weight"]))
    step(2)
    agree(comm, all(p.grad.dtype == torch.float64 for p in model.parameters()))
    model[4] = torch.nn.Linear(9, CLASSES).double()
    step(3)
    same = comm.allgather(model[4].weight.grad.numpy().tobytes())
    agree(comm, len(set(same)) == 1, "a layer that was replaced is not averaged")
    averager.free()


@pytest.mark.parametrize("sparse", ["dense", "gather"])
def test_sparse_gradients(comm, agree, sparse):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(20, 5, sparse=True), "top": torch.nn.Linear(5, 2)})
    averager = GradientAverager(model, comm=comm, sparse=sparse, overlap=True)
    rank, size = comm.rank, comm.size

    def loss(rank: int) -> Any:
        words = torch.tensor([rank, 7, 7, 19 - rank])
        return model["top"](model["table"](words)).square().mean()

    weights = [float(r + 1) for r in range(size)]
    weights[0] = 0.0 if size > 1 else 1.0
    mean_gradients(model, size, weights, lambda r: loss(r).backward())
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with averager.batch(weight=weights[rank]):
        if weights[rank]:
            loss(rank).backward()
    found = model["table"].weight.grad
    agree(comm, found.is_sparse == (sparse == "gather"))
    close = torch.allclose(found.to_dense(), expected["table.weight"], atol=1e-7)
    agree(comm, close and torch.allclose(model["top"].weight.grad, expected["top.weight"], atol=1e-7))
    (torch.optim.SparseAdam([model["table"].weight]) if sparse == "gather" else adam(model)).step()
    averager.free()


@pytest.mark.parametrize("buffers", ["broadcast", "mean", "own"])
def test_buffers(comm, agree, buffers):
    model = convnet()
    averager = GradientAverager(model, comm=comm, buffers=buffers)
    norm = model[2]
    agree(comm, int(norm.num_batches_tracked) == 0)
    weight = comm.rank + 1
    with averager.batch(weight=weight):
        cross_entropy(model, *next(batches(seed=comm.rank))).backward()
        mine = norm.running_mean.clone()
    everyone = comm.allgather(mine.numpy())
    total = sum(range(1, comm.size + 1))
    expected = {
        "broadcast": everyone[0],
        "mean": sum(m * (r + 1) / total for r, m in enumerate(everyone)),
        "own": everyone[comm.rank],
    }[buffers]
    agree(comm, np.allclose(norm.running_mean.numpy(), expected, atol=1e-7) and int(norm.num_batches_tracked) == 1)
    averager.free()


def test_compression_for(comm, agree):
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 50), torch.nn.Linear(50, 4))
    averager = GradientAverager(
        model,
        comm=comm,
        compression="onebit",
        compression_for={"0.*": None, "1.weight": bitring.PowerSGD(matrix_rank=2)},
    )
    how = {name: str(b.entries[0].compression) for b in averager.exchange.buckets for name in b.names}
    exact = {"0.weight", "0.bias", "1.bias", "2.bias", "2.weight"}  # the last has less than a block
    agree(comm, {name for name, c in how.items() if c == "None"} == exact and "PowerSGD" in how["1.weight"], repr(how))
    seen = next(b for b in averager.exchange.buckets if "1.weight" in b.names)
    with averager.batch():
        model(torch.ones(3, 30)).sum().backward()
    # Two factors of rank 2, so it knew that this is a matrix of 50 x 40.
    agree(comm, comm.size == 1 or seen.plan.bytes_sent <= 2 * 2 * (50 + 40) * 4 * 2, str(seen.plan.bytes_sent))
    averager.free()
    error = raised(GradientAverager, model, comm=comm, compression_for={"1.wieght": "onebit"})
    agree(comm, type(error) is ValueError and "no parameter is named '1.wieght'; there are 0.weight" in str(error))


def test_arguments(comm, agree):
    model = dense()
    for options, kind, text in (
        ({"compression": "two_bit"}, ValueError, "two_bit"),
        ({"compression": 3}, TypeError, "compression must be None, a registered name"),
        ({"overlap": "yes"}, TypeError, "overlap"),
        ({"unused": "maybe"}, ValueError, "unused must be one of zeros, error; got 'maybe'"),
        ({"bucket_bytes": 0}, ValueError, "bucket_bytes"),
        ({"algorithm": "rign"}, ValueError, "rign"),
        ({"masters": {"9.bias": torch.zeros(1)}}, ValueError, "no parameter is named '9.bias'"),
        ({"compression_for": ["onebit"]}, TypeError, "compression_for must be a dict"),
    ):
        bad = comm.rank == comm.size - 1
        error = raised(GradientAverager, model, comm=comm, **(options if bad else {}))
        agree(comm, type(error) is (kind if bad else PeerError) and text in str(error), repr(error))
    error = raised(GradientAverager, [1], comm=comm)
    agree(comm, type(error) is TypeError and "module must be a torch.nn.Module; got list" in str(error))
    error = raised(GradientAverager, torch.nn.Linear(2, 2, dtype=torch.complex64), comm=comm)
    agree(comm, type(error) is TypeError and "must be of one of float16, bfloat16, float32, float64" in str(error))
    if comm.size > 1:
        other = torch.nn.Linear(3 + comm.rank, 2)
        error = raised(GradientAverager, other, comm=comm)
        agree(comm, type(error) is MismatchError and "differs from rank 0" in str(error), repr(error))
        averager = GradientAverager(model, comm=comm)
        if comm.rank == 0:
            model[0].requires_grad_(False)
        error = raised(averager.average)
        agree(comm, type(error) is MismatchError or isinstance(error, PeerError), repr(error))


def test_average_gradients(comm, agree):
    """One call after backward(); residuals are kept between calls, by module."""
    results = []
    for overlap in (None, True):
        model = dense()
        averager = GradientAverager(model, comm=comm, compression="onebit:block=64", overlap=True) if overlap else None
        optimizer = sgd(model)
        for x, y in batches(10, seed=comm.rank):
            optimizer.zero_grad()
            if averager is None:
                cross_entropy(model, x, y).backward()
                bitring.torch.average_gradients(model, comm=comm, compression="onebit:block=64", weight=comm.rank + 1)
            else:
                with averager.batch(weight=comm.rank + 1):
                    cross_entropy(model, x, y).backward()
            optimizer.step()
        results.append(values(model))
    agree(comm, torch.equal(*results))
    error = raised(bitring.torch.average_gradients, 3, comm=comm)
    agree(comm, type(error) is TypeError and "module must be a torch.nn.Module; got int" in str(error), repr(error))
