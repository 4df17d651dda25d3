"""Training between emulated hosts to a fixed accuracy: exact by the MPI library, exact by bitring, and compressed.

    python benchmarks/train_network.py --hosts 4 --rate 1gbit --json FILE --plot FILE

Starts the hosts (hosts.py; needs root) and runs itself on them. An MLP of 10.4 million parameters learns Fashion-MNIST
from the same start and the same batches, once with each exchange, until its test accuracy reaches the target; the clock
stands still while accuracy is measured. ``library`` packs the gradients into one buffer, calls the MPI library's
Allreduce, and updates; the others are bitring's trainer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import numpy as np

HIDDEN = (2850, 2850)
LIBRARY, EXACT = "library", "exact"


def main() -> int:
    parser = argparse.ArgumentParser(description="Training between emulated hosts.")
    hosts.add_options(parser, hosts=4, rate="1gbit")
    parser.add_argument("--compressors", type=lambda text: text.split(","), default="onebit", help="%(default)s")
    parser.add_argument("--accuracy", type=float, default=0.82, help="of the test samples (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples per step, of all ranks (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.05, help="of plain SGD (%(default)s)")
    parser.add_argument("--every", type=int, default=20, help="steps between looks at the accuracy (%(default)s)")
    parser.add_argument("--most", type=int, default=1000, help="steps at most (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    parser.add_argument("--plot", type=Path, help="draw them to this .png, .svg or .pdf")
    asked = parser.parse_args()
    lab = hosts.lab()
    if lab is None:
        return hosts.rerun(asked)
    work(asked, lab)
    return 0


def library_step(comm: Any, model: Any, optimizer: Any) -> Callable[[Any, int], None]:
    """A step by the MPI library's own Allreduce, in place on one buffer of all gradients."""
    from mpi4py import MPI

    parameters = model.parameters
    flat = np.empty(sum(w.size for w in parameters.values()), np.float32)
    views: dict[str, Any] = {}
    start = 0
    for name, w in parameters.items():
        views[name] = flat[start : start + w.size].reshape(w.shape)
        start += w.size
    state = optimizer.init(parameters)

    def step(gradients: Any, weight: int) -> None:
        total = comm.allreduce(weight)
        for name, view in views.items():
            np.multiply(gradients[name], weight / total, out=view)
        comm.Allreduce(MPI.IN_PLACE, flat)
        optimizer.update(parameters, views, state)

    return step


def train(comm: Any, data: Any, asked: argparse.Namespace, exchange: str) -> dict[str, Any]:
    """One run; its history on all ranks. Collective."""
    import bitring

    model = bitring.MLP(data.input_shape, data.classes, hidden=HIDDEN, seed=0)
    optimizer = bitring.SGD(lr=asked.lr)
    trainer = None
    if exchange == LIBRARY:
        step: Callable[[Any, int], None] = library_step(comm, model, optimizer)
    else:
        compression = None if exchange == EXACT else exchange
        trainer = bitring.DataParallel(model.parameters, optimizer, comm=comm, compression=compression)
        step = trainer.step
    batches = bitring.Batches(data.x_train, data.y_train, size=asked.batch)
    history: list[dict[str, float]] = []
    steps, epoch, seconds, reached = 0, 0, 0.0, False
    while not reached and steps < asked.most:
        comm.Barrier()
        begin = time.perf_counter()
        for x, y in bitring.shard(batches, comm, seed=0, epoch=epoch):
            _, gradients = model.loss_and_gradients(x, y)
            step(gradients, len(x))
            steps += 1
            if steps % asked.every == 0:
                comm.Barrier()
                seconds += time.perf_counter() - begin
                history.append({"steps": steps, "seconds": seconds, "test_accuracy": accuracy(comm, model, data)})
                reached = history[-1]["test_accuracy"] >= asked.accuracy
                comm.Barrier()
                begin = time.perf_counter()
                if reached or steps >= asked.most:
                    break
        epoch += 1
    result: dict[str, Any] = {
        "exchange": exchange,
        "reached": reached,
        "steps": steps,
        "seconds": comm.bcast(seconds),
        "seconds_a_step": comm.bcast(seconds) / steps,
        "history": comm.bcast(history),
    }
    if trainer is not None:
        result["bytes_sent_a_step"] = trainer.bytes_sent // steps
        result["telemetry"] = trainer.telemetry()
        trainer.free()
    return result


def accuracy(comm: Any, model: Any, data: Any) -> float:
    """Of the test samples; each rank looks at its part. Collective."""
    part = slice(comm.rank * len(data.y_test) // comm.size, (comm.rank + 1) * len(data.y_test) // comm.size)
    right = round(model.accuracy(data.x_test[part], data.y_test[part]) * (part.stop - part.start))
    return float(comm.allreduce(right)) / len(data.y_test)


def work(asked: argparse.Namespace, lab: hosts.Lab) -> None:
    """Train, print, and keep the results. Collective."""
    from mpi4py import MPI

    import bitring
    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    with ending_together(comm):
        limit_threads(comm)
        machine = describe(comm)
        data = bitring.load("fashion-mnist")
        runs: list[dict[str, Any]] = []
        for exchange in (*asked.compressors, EXACT, LIBRARY):
            runs.append(train(comm, data, asked, exchange))
            if comm.rank == 0:
                print(line(runs[-1], asked.accuracy), flush=True)
        if comm.rank != 0:
            return
        slowest = runs[-1]["seconds"]
        for run in runs:
            run["times_the_library"] = slowest / run["seconds"] if run["reached"] and runs[-1]["reached"] else None
            if run["times_the_library"]:
                print(f"{run['exchange']}: {run['times_the_library']:.2f}x as fast as with the library's Allreduce")
        settings = {key: getattr(asked, key) for key in ("accuracy", "batch", "lr")}
        kept = {
            "benchmark": "train_network",
            "model": f"MLP {HIDDEN}, 10.4 million parameters, Fashion-MNIST",
            "settings": settings,
            "network": {"emulated": True, **lab._asdict()},
            "machine": machine,
            "runs": runs,
        }
        if asked.json:
            asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if asked.plot:
            draw(kept, asked.plot)


def line(run: dict[str, Any], wanted: float) -> str:
    last = run["history"][-1]["test_accuracy"]
    ending = f"reached {wanted:.0%}" if run["reached"] else f"stopped at {last:.1%}"
    return (
        f"{run['exchange']:<12}{ending} after {run['steps']} steps, {run['seconds']:.1f} s, "
        f"{run['seconds_a_step'] * 1e3:.0f} ms per step"
    )


def draw(kept: dict[str, Any], path: Path) -> None:
    """Accuracy by seconds and by steps."""
    from bitring.commands._pictures import COLORS, figure, plain

    picture = figure(9, 3.6)
    panels = picture.subplots(1, 2, sharey=True)
    for axes, field in zip(panels, ("steps", "seconds"), strict=True):
        plain(axes)
        axes.set_xlabel({"steps": "steps", "seconds": "seconds of training"}[field])
        for color, run in zip(COLORS, kept["runs"], strict=False):
            x, y = ([point[key] for point in run["history"]] for key in (field, "test_accuracy"))
            axes.plot(x, y, color=color, linewidth=1.6, label=run["exchange"])
    panels[0].set_ylabel("test accuracy")
    panels[1].legend(frameon=False, loc="lower right")
    network = kept["network"]
    rate = f"{network['rate'] * 8 / 1e9:.3g} Gbit/s" if network["rate"] else "unshaped"
    picture.suptitle(f"{kept['model']}; {network['hosts']} emulated hosts, {rate}")
    picture.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
