"""Exchange behind computing: steps whose gradients travel at the end, as they come, or during the next step.

    python benchmarks/hidden.py --json FILE

Starts hosts of one rank, two by default, at 1 Gbit/s (hosts.py; needs root) and runs itself on them with a thread per
rank. For each model and compression these take turns, on random data: computing gradients and nothing else; ``step``
from gradients that are there; ``step`` after computing; ``begin``, ``ready`` and ``step``; mode ``delayed``. A time is
the slowest rank's, per step of four in a row, and of several the median. The backward pass is timed from its first
gradient on.

The hidden share is (step − begin) / min(exchange, backward): of what could be hidden. The exchange is the step from
gradients that are there. The limit of a step is the longer of computing and exchange, as if all could be hidden.

What this machine can hide at all, with two hosts: two plain TCP streams of as many bytes, one each way, by two threads
that do nothing else, take turns with the others; alone, and beside computing. ``stream_hidden_share`` is (computing +
stream − both at once) / min(computing, stream): a host's kernel needs the core, too, to send and receive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import numpy as np

MODELS: dict[str, tuple[tuple[int, ...], int, dict[str, Any], int]] = {
    "cnn": ((28, 28), 10, {}, 64),
    "mlp": ((784,), 10, {"hidden": (2048, 2048, 2048)}, 64),
}
"""Name -> input shape, classes, settings, samples per rank."""

COMPRESSIONS = ("none", "onebit")


def main() -> int:
    parser = argparse.ArgumentParser(description="Exchange behind computing.")
    hosts.add_options(parser, hosts=2, rate="1gbit")
    parser.add_argument("--models", default=",".join(MODELS), help="%(default)s")
    parser.add_argument("--samples", type=int, default=9, help="times each is timed (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    if asked.json is not None and not asked.json.absolute().parent.is_dir():
        parser.error(f"{asked.json} cannot be written: there is no folder {asked.json.parent}")
    lab = hosts.lab()
    if lab is None:
        return hosts.rerun(asked)
    work(asked)
    return 0


def work(asked: argparse.Namespace) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI
    from threadpoolctl import threadpool_limits

    from bitring.commands._ranks import ending_together
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    with ending_together(comm):
        threadpool_limits(limits=1)
        machine = describe(comm)
        results = [
            measure(comm, name, compression, asked.samples)
            for name in asked.models.split(",")
            for compression in COMPRESSIONS
        ]
        if comm.rank == 0 and asked.json is not None:
            found = {"benchmark": "hidden", "machine": machine, "results": results}
            asked.json.write_text(json.dumps(found, indent=1) + "\n")


class Streams:
    """``nbytes`` from each of two hosts to the other, at once. Collective."""

    def __init__(self, nbytes: int) -> None:
        both = hosts.Stream(1, 2), hosts.Stream(2, 1)
        self._out, self._in = both if hosts.host() == 1 else both[::-1]
        self._sent, self._room = memoryview(bytes(nbytes)), memoryview(bytearray(nbytes))

    def move(self, beside: Callable[[], object] = lambda: None) -> None:
        """Move them; call ``beside`` meanwhile."""
        work = [threading.Thread(target=self._out.send, args=(self._sent,))]
        work += [threading.Thread(target=self._in.receive, args=(self._room,))]
        for thread in work:
            thread.start()
        beside()
        for thread in work:
            thread.join()

    def close(self) -> None:
        """Close the connections."""
        self._out.close()
        self._in.close()


def measure(comm: Any, name: str, compression: str, samples: int) -> dict[str, Any]:
    """Times of one model and compression. Collective."""
    from mpi4py import MPI

    import bitring
    from bitring.models.model import models

    shape, classes, settings, count = MODELS[name]
    rng = np.random.default_rng(comm.rank)
    x, y = rng.standard_normal((count, *shape), np.float32), rng.integers(0, classes, count)
    kinds = {kind: models.get(name)(shape, classes, seed=0, **settings) for kind in ("sync", "delayed")}
    trainers = {
        kind: bitring.DataParallel(
            model.parameters,
            bitring.SGD(lr=1e-4, momentum=0.9),
            comm=comm,
            mode=kind,
            compression=None if compression == "none" else compression,
        )
        for kind, model in kinds.items()
    }
    model, trainer = kinds["sync"], trainers["sync"]
    fixed = model.loss_and_gradients(x, y)[1]
    began: list[float] = []

    def compute() -> None:
        model.loss_and_gradients(x, y, on_gradient=lambda *_: began.append(time.perf_counter()))

    def wait_free() -> None:
        with trainer.begin():
            model.loss_and_gradients(x, y, on_gradient=trainer.ready)
            trainer.step()

    before = trainer.bytes_sent
    trainer.step(fixed)
    streams = Streams(trainer.bytes_sent - before) if comm.size == 2 else None
    contenders: dict[str, Callable[[], object]] = {"compute": compute}
    if streams is not None:
        contenders |= {"stream": streams.move, "compute beside stream": lambda: streams.move(compute)}
    contenders |= {
        "exchange": lambda: trainer.step(fixed),
        "step": lambda: trainer.step(model.loss_and_gradients(x, y)[1]),
        "begin": wait_free,
        "delayed": lambda: trainers["delayed"].step(kinds["delayed"].loss_and_gradients(x, y)[1]),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in (*contenders, "backward")}
    processor: dict[str, list[float]] = {}
    steps = 4
    for sample in range(samples + 1):
        for kind, call in contenders.items():
            began.clear()
            call()  # from here on a step's exchange is under way in mode delayed, as it is at the end
            comm.Barrier()
            start, busy = time.perf_counter(), time.process_time()
            for _ in range(steps):
                call()
            end, busy = time.perf_counter(), time.process_time() - busy
            if sample:
                seconds[kind].append(comm.allreduce((end - start) / steps, MPI.MAX))
                processor.setdefault(kind, []).append(comm.allreduce(busy / steps, MPI.MAX))
            if kind == "compute" and sample:
                per_pass = len(began) // (steps + 1)
                backward = end - began[-per_pass]
                seconds["backward"].append(comm.allreduce(backward, MPI.MAX))
    digests = {kind: trainer.digest() for kind, trainer in trainers.items()}
    assert all(len(set(comm.allgather(digest))) == 1 for digest in digests.values()), "replicas differ"
    for each in trainers.values():
        each.synchronize()
        each.free()
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    hideable = min(median["exchange"], median["backward"])
    plain: dict[str, float] = {}
    if streams is not None:
        streams.close()
        at_once = median["compute"] + median["stream"] - median["compute beside stream"]
        plain["stream_hidden_share"] = at_once / min(median["compute"], median["stream"])
    found = {
        "model": name,
        "compression": compression,
        "values": sum(w.size for w in model.parameters.values()),
        "samples_per_rank": count,
        "seconds": median,
        "limit": max(median["compute"], median["exchange"]),
        "hidden_share": (median["step"] - median["begin"]) / hideable,
        **plain,
        "delayed_over_step": median["delayed"] / median["step"],
        "processor_seconds": {kind: statistics.median(times) for kind, times in processor.items()},
        "samples": seconds,
    }
    if comm.rank == 0:
        shown = "  ".join(f"{kind} {1e3 * median[kind]:.1f}" for kind in seconds)
        streams_hide = "".join(f", of plain streams {share:.2f}" for share in plain.values())
        print(
            f"{name} {compression}: ms per step: {shown}  limit {1e3 * found['limit']:.1f}; hidden "
            f"{found['hidden_share']:.2f}{streams_hide}; delayed/step {found['delayed_over_step']:.2f}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
