"""Hybrid placement against data parallelism between hosts, and against the same split written with PyTorch and gloo.

    PYTHONPATH=build/torch python benchmarks/hybrid.py --hosts 4 --json FILE

Starts hosts of one rank at 1 Gbit/s (hosts.py; needs root) and runs itself on them with a thread per rank. The network
is the CNN of 28×28 images, a batch has 64 in all. Steps, and exchanges alone, without any computing, take turns: those
of data parallelism, exact; of ``ModelParallel(placement="hybrid")``; and of the same split with torch.distributed. A
time is the slowest rank's, of several in a row, and of these times the median. First the losses of three steps are
compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import numpy as np

SAMPLES, LR, MOMENTUM = 64, 0.01, 0.9
IN_A_ROW = 4

Work = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(description="Hybrid placement between hosts.")
    hosts.add_options(parser, hosts=4, rate="1gbit")
    parser.add_argument("--rounds", type=int, default=11, help="times each is timed (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    if hosts.lab() is None:
        return hosts.rerun(asked)

    from mpi4py import MPI
    from threadpoolctl import threadpool_limits

    from bitring.commands._ranks import ending_together
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    with ending_together(comm):
        threadpool_limits(limits=1)
        machine = describe(comm)
        results = measure(comm, asked.rounds)
        if comm.rank == 0 and asked.json is not None:
            found = {"benchmark": "hybrid", "machine": machine, "results": results}
            asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(comm: Any, rounds: int) -> dict[str, Any]:
    """Times of all. Collective."""
    from mpi4py import MPI

    import bitring
    from bitring.commands._ranks import meet
    from bitring.training.placement.layout import part

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((SAMPLES, 28, 28), np.float32), rng.integers(0, 10, SAMPLES)
    optimizer = bitring.SGD(lr=LR, momentum=MOMENTUM)
    split = {
        placement: bitring.ModelParallel(bitring.CNN((28, 28), 10, seed=1), optimizer, comm=comm, placement=placement)
        for placement in ("data", "hybrid")
    }
    torch_split = TorchHybrid(comm, bitring.CNN((28, 28), 10, seed=1).parameters, x, y)
    model = bitring.CNN((28, 28), 10, seed=1)
    replicas = bitring.DataParallel(model.parameters, optimizer, comm=comm)
    mine = part(SAMPLES, comm.size, comm.rank)

    def data_parallel() -> float:
        loss, gradients = model.loss_and_gradients(x[mine], y[mine])
        replicas.step(gradients, weight=mine.stop - mine.start)
        return float(comm.allreduce(loss * (mine.stop - mine.start))) / SAMPLES

    for _ in range(3):
        losses = [each.step(x, y) for each in split.values()] + [torch_split.step(), data_parallel()]
        if not np.allclose(losses, losses[0], rtol=1e-4):
            raise ValueError(f"losses differ: {losses}")

    contenders: dict[str, Work] = {
        "data, exchange": exchange(split["data"]),
        "hybrid, exchange": exchange(split["hybrid"]),
        "torch hybrid, exchange": torch_split.exchange,
        "data, step": data_parallel,
        "hybrid, step": lambda: split["hybrid"].step(x, y),
        "torch hybrid, step": torch_split.step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            meet(comm)
            begin = time.perf_counter()
            for _ in range(IN_A_ROW):
                work()
            taken = (time.perf_counter() - begin) / IN_A_ROW
            meet(comm)
            seconds[name].append(comm.allreduce(taken, MPI.MAX))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    nbytes = {name: max(each._predicted(name, SAMPLES).total) for name, each in split.items()}
    found = {
        "samples": SAMPLES,
        "milliseconds": {name: 1e3 * each for name, each in medians.items()},
        "least_milliseconds": {name: 1e3 * min(each) for name, each in seconds.items()},
        "bytes_out_of_a_rank": nbytes,
        "data_over_hybrid": {
            "seconds": medians["data, exchange"] / medians["hybrid, exchange"],
            "bytes": nbytes["data"] / nbytes["hybrid"],
        },
        "torch_over_hybrid": {
            what: medians[f"torch hybrid, {what}"] / medians[f"hybrid, {what}"] for what in ("exchange", "step")
        },
    }
    if comm.rank == 0:
        print(json.dumps(found, indent=1))
    return found


def exchange(trainer: Any) -> Work:
    """All that a step of the split model sends, without its computing: conversions, then sums of gradients."""
    from bitring.collectives.runtime.context import context_of

    split, context = trainer._split, context_of(trainer.comm)
    hops, messages = split.exchange(SAMPLES)
    gradients = {name: np.zeros_like(w) for name, w in split.mine.items()}
    shapes = trainer._shapes
    arrays = []
    for each in hops.hops:
        region = each.hop.before_it(trainer.rank)
        inner = shapes[each.edge.value]
        shape = (region.last_row - region.first_row, *inner[:-1], region.last - region.first)
        arrays.append(np.zeros(shape, np.float32))

    def steps(progress: Any) -> Any:
        messages.begin(progress)
        for number, array in enumerate(arrays):
            messages.send(number, array)
            yield from messages.receive(number, array, lambda: False)
        yield from messages.finish()

    def work() -> None:
        context.queue.call(steps, "exchange")
        split.sums.add(gradients)

    return work


class TorchHybrid:
    """The same split with torch.distributed: convolutions by samples, the dense layers by columns, then rows."""

    def __init__(self, comm: Any, parameters: dict[str, Any], x: Any, y: Any) -> None:
        import torch

        from bitring.training.placement.layout import part

        self.torch, self.ranks = torch, comm.size
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "eth0")
        path = comm.bcast(str(Path(tempfile.mkdtemp(prefix="gloo-")) / "store") if comm.rank == 0 else None)
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(path, comm.size),
            rank=comm.rank,
            world_size=comm.size,
            timeout=datetime.timedelta(seconds=60),
        )

        def mine(w: Any, axis: int | None = None) -> Any:
            if axis is not None:
                w = np.take(w, range(w.shape[axis])[part(w.shape[axis], comm.size, comm.rank)], axis)
            return torch.tensor(np.ascontiguousarray(w), requires_grad=True)

        kernels = [parameters[f"conv{i}.weight"].transpose(0, 3, 2, 1) for i in (1, 2)]
        self.convolutions = [mine(kernels[0]), mine(parameters["conv1.bias"])]
        self.convolutions += [mine(kernels[1]), mine(parameters["conv2.bias"])]
        self.dense = [mine(parameters["dense1.weight"], 0), mine(parameters["dense1.bias"], 0)]
        self.dense += [mine(parameters["dense2.weight"], 1), mine(parameters["dense2.bias"])]
        self.optimizer = torch.optim.SGD(self.convolutions + self.dense, lr=LR, momentum=MOMENTUM)
        self.part = part(len(y), comm.size, comm.rank)
        self.x, self.y = torch.tensor(x[self.part]).unsqueeze(1), torch.tensor(y)

    def gather(self, values: Any) -> Any:
        """Rows of all ranks."""
        whole = self.torch.empty(len(values) * self.ranks, *values.shape[1:])
        self.torch.distributed.all_gather_into_tensor(whole, values)
        return whole

    def scatter_sum(self, values: Any) -> Any:
        """This rank's rows of the sum."""
        mine = self.torch.empty(len(values) // self.ranks, *values.shape[1:])
        self.torch.distributed.reduce_scatter_tensor(mine, values)
        return mine

    def sum_gradients(self) -> None:
        """Of the convolutions, over the ranks, as one tensor."""
        flat = self.torch.cat([w.grad.reshape(-1) for w in self.convolutions])
        self.torch.distributed.all_reduce(flat)
        first = 0
        for w in self.convolutions:
            w.grad = flat[first : first + w.numel()].view_as(w)
            first += w.numel()

    def step(self) -> float:
        """One training step; the mean loss of the batch."""
        torch, functional = self.torch, self.torch.nn.functional
        self.optimizer.zero_grad()
        conv1, bias1, conv2, bias2 = self.convolutions
        h = functional.relu(functional.max_pool2d(functional.conv2d(self.x, conv1, bias1), 2))
        h = functional.relu(functional.max_pool2d(functional.conv2d(h, conv2, bias2), 2))
        features = h.permute(0, 2, 3, 1).reshape(len(h), -1)
        gathered = self.gather(features.detach().contiguous()).requires_grad_()
        hidden = functional.relu(functional.linear(gathered, *self.dense[:2]))
        partial = functional.linear(hidden, self.dense[2])
        logits = partial.detach().clone()
        torch.distributed.all_reduce(logits)
        logits.requires_grad_()
        loss = functional.cross_entropy(logits + self.dense[3], self.y)
        loss.backward()
        partial.backward(logits.grad)
        features.backward(self.scatter_sum(gathered.grad))
        self.sum_gradients()
        self.optimizer.step()
        return float(loss.detach())

    def exchange(self) -> None:
        """All that a step sends."""
        torch = self.torch
        width = 1024
        self.gather(torch.zeros(SAMPLES // self.ranks, width))
        torch.distributed.all_reduce(torch.zeros(SAMPLES, 10))
        self.scatter_sum(torch.zeros(SAMPLES, width))
        self.sum_gradients()


if __name__ == "__main__":
    raise SystemExit(main())
