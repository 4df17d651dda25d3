"""The measurement of ``bitring bench train``. Importing this initialises MPI."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from bitring.commands._ranks import ending_together, limit_threads, meet, together
from bitring.commands._tables import show_table
from bitring.commands._units import traffic
from bitring.compression.encoder import compressors
from bitring.models.architecture import layer_table
from bitring.nodes import describe
from bitring.settings import make, name_of
from bitring.training.data_parallel import DataParallel
from bitring.training.optimizers.sgd import SGD

EXACT = {"exact": "auto", "mpi": "mpi"}
"""The exact exchanges, and the algorithm of each."""


def run(json_path: Path | None, model: str, names: list[str] | None, samples: int) -> None:
    """Measure, print, and keep the results. Collective."""
    world = MPI.COMM_WORLD
    with ending_together(world):
        chosen = together(world, lambda: _checked(world, json_path, names))
        shapes = together(world, lambda: dict(each for layer in layer_table(model) for each in layer.parameters))
        limit_threads(world)
        machine = describe(world)
        random = np.random.default_rng(world.rank)
        gradients = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        trainers: dict[str, DataParallel] = {}
        for name in chosen:
            trainers[name] = DataParallel(
                {each: np.zeros(shape, np.float32) for each, shape in shapes.items()},
                SGD(lr=1e-6, momentum=0.9),
                comm=world,
                algorithm=EXACT.get(name, "auto"),
                compression=None if name in EXACT else make(name, compressors),
            )
        taken: dict[str, list[float]] = {name: [] for name in chosen}
        sent: dict[str, int] = {}
        for turn in range(-1, samples):  # the first turn warms up
            for name, trainer in trainers.items():
                before = trainer.bytes_sent
                meet(world)
                begin = time.perf_counter()
                trainer.step(gradients)
                seconds = float(world.allreduce(time.perf_counter() - begin, MPI.MAX))
                sent[name] = int(world.allreduce(trainer.bytes_sent - before, MPI.MAX))
                if turn >= 0:
                    taken[name].append(seconds)
        results = [_row(name, trainers[name], taken, sent) for name in chosen]
        for trainer in trainers.values():
            trainer.free()
        if world.rank != 0:
            return
        values = sum(gradient.size for gradient in gradients.values())
        nodes = machine["nodes"]
        click.echo(
            f"train, {model}: {values:,} parameters, {world.size} ranks on {nodes} node{'s' * (nodes > 1)}, "
            f"{machine['processor']}"
        )
        show_table(
            ("exchange", "by", "sent per rank", "per step", "speed-up"),
            [
                (
                    row["exchange"],
                    ", ".join(row["algorithms"]),
                    traffic(row["nbytes"]),
                    f"{row['seconds'] * 1e3:.2f} ms",
                    f"{row['speedup']:.2f}x",
                )
                for row in results
            ],
        )
        if json_path is not None:
            kept = {"benchmark": "train", "machine": machine, "model": model, "values": values, "results": results}
            json_path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _checked(comm: MPI.Intracomm, json_path: Path | None, names: list[str] | None) -> list[str]:
    known = [*EXACT, *compressors.names()]
    for text in names or []:
        name = name_of(text)
        if name not in known:
            raise ValueError(f"unknown exchange {name!r}; known: {', '.join(known)}")
        if name not in EXACT:
            make(text, compressors)
        elif text != name:
            raise ValueError(f"{text}: {name} has no settings")
    if comm.rank == 0 and json_path is not None and not json_path.parent.is_dir():
        raise FileNotFoundError(f"{json_path} cannot be written: there is no folder {json_path.parent}")
    return list(dict.fromkeys(names or known))


def _row(name: str, trainer: DataParallel, taken: dict[str, list[float]], sent: dict[str, int]) -> dict[str, Any]:
    """The speed-up is over the first exchange."""
    medians = {each: statistics.median(seconds) for each, seconds in taken.items()}
    return {
        "exchange": name,
        "algorithms": sorted(set(trainer.algorithms)),
        "nbytes": sent[name],
        "seconds": medians[name],
        "samples": [float(f"{each:.4g}") for each in taken[name]],
        "speedup": next(iter(medians.values())) / medians[name],
    }
