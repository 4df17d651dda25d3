"""What a training step with PyTorch costs: by DistributedDataParallel over gloo, the averager, and DDP with our hook.

    mpirun -n 2 python benchmarks/torch_step.py --json FILE --plot FILE
    python benchmarks/hosts.py --hosts 2 --rate 1gbit -- python benchmarks/torch_step.py --between --json FILE
    python benchmarks/torch_step.py --draw --json FILE --plot FILE      # of what was measured before

Each variant has a model of its own, all with the same values; they take turns, a few steps at a time, so that all see
the same machine. A step is forward, backward, exchange and SGD's update. The overhead is a step's median less that of
a step without exchange. ``--between`` times what is for slow networks; ``--overhead``, on one rank, what the averager
costs for a tensor, with many small ones.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

import bitring.torch
from bitring.nodes import describe

LAYERS = {"0.8 MiB": (784, 256, 10), "22 MiB": (784, 2048, 2048, 10), "39 MiB": (784, 3072, 2560, 10)}
BATCH = 64

Step = Callable[[], None]


def new_model(layers: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    parts: list[Any] = []
    for a, b in itertools.pairwise(layers):
        parts += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*parts[:-1])


def plain(layers: tuple[int, ...], wrap: Callable[[Any], Any], context: Callable[[Any], Any] | None = None) -> Step:
    model = new_model(layers)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(BATCH, layers[0], generator=torch.Generator().manual_seed(MPI.COMM_WORLD.rank))
    y = torch.arange(BATCH) % layers[-1]

    def step() -> None:
        optimizer.zero_grad()
        if context is None:
            torch.nn.functional.cross_entropy(wrapped(x), y).backward()
        else:
            with context(wrapped):
                torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def with_averager(layers: tuple[int, ...], **options: Any) -> Step:
    def wrap(model: Any) -> Any:
        return bitring.torch.GradientAverager(model, comm=MPI.COMM_WORLD, **options)

    return plain(layers, wrap, lambda averager: averager.batch())


def with_ddp(layers: tuple[int, ...], hook: Any = None, state: Callable[[], Any] = lambda: None) -> Step:
    def wrap(model: Any) -> Any:
        ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        if hook is not None:
            ddp.register_comm_hook(state(), hook)
        return ddp

    return plain(layers, wrap)


def variants(layers: tuple[int, ...], between: bool) -> dict[str, Callable[[], Step]]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    def bf16(state, bucket):  # DDP refuses the original by its name where there is no NCCL
        return bf16_compress_hook(state, bucket)

    def hook(**options: Any) -> Step:
        return with_ddp(layers, bitring.torch.comm_hook, lambda: bitring.torch.CommHook(MPI.COMM_WORLD, **options))

    if between:
        return {
            "no exchange": lambda: plain(layers, lambda model: model),
            "DDP": lambda: with_ddp(layers),
            "averager": lambda: with_averager(layers),
            "DDP, its bfloat16 hook": lambda: with_ddp(layers, bf16),
            "averager, bfloat16": lambda: with_averager(layers, compression="bfloat16"),
            "averager, onebit": lambda: with_averager(layers, compression="onebit"),
        }
    return {
        "no exchange": lambda: plain(layers, lambda model: model),
        "DDP": lambda: with_ddp(layers),
        "averager": lambda: with_averager(layers),
        "averager, overlap": lambda: with_averager(layers, overlap=True),
        "averager, no overlap": lambda: with_averager(layers, overlap=False),
        "DDP, bitring's hook": lambda: hook(),
    }


def timed(steps: dict[str, Step], rounds: int, each: int) -> dict[str, list[float]]:
    """Milliseconds a step, by variant, those of the slowest rank."""
    comm = MPI.COMM_WORLD
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            comm.Barrier()
            for _ in range(each):
                began = time.perf_counter()
                step()
                found[name].append((time.perf_counter() - began) * 1e3)
    return {name: [max(row) for row in zip(*comm.allgather(times), strict=True)] for name, times in found.items()}


def overhead() -> dict[str, float]:
    """Microseconds of processor time for each of 320 small tensors: a step's, less that of one without an averager.

    On one rank, where nobody is waited for: hooks, packing, scaling, views, and all that looks after a step.
    """
    layers = (16,) * 161
    steps = {"no exchange": plain(layers, lambda model: model), "averager": with_averager(layers)}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(60):
        for name, step in steps.items():
            step()
            began = time.process_time()
            for _ in range(5):
                step()
            found[name].append((time.process_time() - began) / 5 / 320 * 1e6)
    gained = {name: (min(times), statistics.median(times)) for name, times in found.items()}
    (least, median), (least_plain, median_plain) = gained["averager"], gained["no exchange"]
    return {"least": round(least - least_plain, 2), "median": round(median - median_plain, 2)}


def begin_gloo() -> None:
    comm = MPI.COMM_WORLD
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "eth0" if "BITRING_HOSTS" in os.environ else "lo")
    path = comm.bcast(str(Path(tempfile.mkdtemp(prefix="gloo-")) / "store") if comm.rank == 0 else None)
    store = torch.distributed.FileStore(path, comm.size)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=comm.rank, world_size=comm.size, timeout=datetime.timedelta(seconds=60)
    )


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 2 * len(results), 3.4), dpi=100, layout="constrained")
    axes: Any = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (model, found) in zip(axes, results.items(), strict=True):
        names = list(found)[::-1]
        axis.bar_label(axis.barh(names, [found[name] for name in names]), fmt="%.3g", padding=2, fontsize=8)
        axis.margins(x=0.15)
        axis.set_title(f"{model} of gradients")
        axis.set_xlabel("ms a step, median")
        if axis is not axes[0]:
            axis.set_yticklabels([])
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--between", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.draw:
        plot(json.loads(given.json.read_text(encoding="utf-8"))["ms_a_step"], given.plot)
        return
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    whole: dict[str, Any] = {
        "machine": describe(comm),
        "torch": torch.__version__,
        "ranks": comm.size,
        "batch": BATCH,
    }
    if given.overhead:
        whole["microseconds_a_tensor"] = overhead()
    else:
        begin_gloo()
        whole["ms_a_step"] = {}
        for name, layers in LAYERS.items():
            if given.between and name != "39 MiB":
                continue
            steps = {variant: make() for variant, make in variants(layers, given.between).items()}
            times = timed(steps, given.rounds, 3 if given.between else 5)
            whole["ms_a_step"][name] = {v: round(statistics.median(t), 3) for v, t in times.items()}
            if comm.rank == 0:
                found = whole["ms_a_step"][name]
                ddp = found["DDP"] - found["no exchange"]
                for variant, ms in found.items():
                    share = (ms - found["no exchange"]) / ddp
                    print(f"{name:8} {variant:24} {ms:9.2f} ms, overhead {share:5.2f} of DDP's", flush=True)
            comm.Barrier()
    if comm.rank == 0:
        print(json.dumps({k: v for k, v in whole.items() if k != "machine"}, indent=1))
        if given.json:
            given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        if given.plot:
            plot(whole["ms_a_step"], given.plot)


if __name__ == "__main__":
    main()
