"""The same training under several placements: loss by step, and test accuracy.

    mpirun -n 2 python benchmarks/placement_curves.py --json FILE

The CNN on Fashion-MNIST, SGD with momentum, batches of 64, the same seeds. Shows how far each curve is from data
parallelism's: in float64 by rounding alone, in float32 by what rounding grows to.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
PIPELINE = [("conv1", "conv2"), ("dense1", "dense2")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss by step under several placements.")
    parser.add_argument("--data", default="fashion-mnist", help="%(default)s")
    parser.add_argument("--steps", type=int, default=150, help="%(default)s")
    parser.add_argument("--test", type=int, default=2000, help="samples of the test (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()

    from mpi4py import MPI
    from threadpoolctl import threadpool_limits

    import bitring
    from bitring.commands._ranks import ending_together
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    if comm.size != 2:
        parser.error(f"it needs two ranks; got {comm.size}")
    with ending_together(comm):
        threadpool_limits(limits=1)
        machine = describe(comm)
        data = bitring.load(asked.data)
        placements: dict[str, Any] = {
            "data": "data",
            "hybrid": "hybrid",
            "hybrid_in_turns": "hybrid_in_turns",
            "pipeline": bitring.Placement(stages=PIPELINE, microbatches=4),
        }
        results: dict[str, Any] = {}
        for dtype in (np.float32, np.float64):
            curves = {name: curve(comm, data, placement, dtype, asked) for name, placement in placements.items()}
            losses = {name: np.array(found["losses"]) for name, found in curves.items()}
            for name, found in curves.items():
                found["largest_difference"] = float(np.abs(losses[name] - losses["data"]).max())
                if comm.rank == 0:
                    text = f"{found['largest_difference']:.1e} from data's, test accuracy {found['accuracy']:.4f}"
                    print(f"{np.dtype(dtype).name} {name}: last loss {losses[name][-1]:.4f}, {text}", flush=True)
            results[np.dtype(dtype).name] = curves
        if comm.rank == 0 and asked.json is not None:
            found = {"benchmark": "placement_curves", "machine": machine, "data": asked.data, "results": results}
            asked.json.write_text(json.dumps(found) + "\n")


def curve(comm: Any, data: Any, placement: Any, dtype: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """The losses of a training's steps, and its test accuracy. Collective."""
    import bitring

    model = bitring.CNN(data.input_shape, data.classes, dtype=dtype, seed=0)
    trainer = bitring.ModelParallel(model, bitring.SGD(lr=0.02, momentum=0.9), comm=comm, placement=placement)
    order = np.random.default_rng(0).permutation(len(data.y_train))
    losses = []
    for step in range(asked.steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        losses.append(trainer.step(data.x_train[chosen].astype(dtype), data.y_train[chosen]))
    trainer.parameters()
    accuracy = model.accuracy(data.x_test[: asked.test].astype(dtype), data.y_test[: asked.test])
    trainer.free()
    return {"losses": losses, "accuracy": accuracy}


if __name__ == "__main__":
    main()
