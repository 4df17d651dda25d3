"""What the levels of 1-bit codes cost in accuracy: short trainings without a warm-up, at a learning rate that is high.

    mpirun -n 4 python benchmarks/levels.py --model mlp --lr 0.05 --seeds 8 --json FILE

Fashion-MNIST; the MLP 784-256-10 on 20,000 samples (``torch``: the same by PyTorch's loop of docs/training.md), the
CNN on 10,000, or an LSTM of 64 units over the rows of 20,000 pictures; batches of 64, momentum 0.9, 2 epochs. Each
seed has the same start and batches for every exchange. Exact training itself moves by a point when only the order of
its sums changes: means say something, single runs do not.

``--momentum-correction`` has each rank apply the momentum before the exchange, which encodes velocities then: "momentum
correction" of Lin et al., "Deep Gradient Compression", ICLR 2018. For exact exchanges it is the same training.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.models.dataset import Data, load
from bitring.nodes import describe

BATCH, EPOCHS, MOMENTUM = 64, 2, 0.9
SAMPLES = {"mlp": 20_000, "cnn": 10_000, "lstm": 20_000, "torch": 20_000}


class TorchMLP:
    """784-256-10 in PyTorch."""

    def __init__(self, classes: int, seed: int) -> None:
        import torch

        self._torch = torch
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        layers = torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, classes)
        self._module = torch.nn.Sequential(torch.nn.Flatten(), *layers)
        self.parameters = {name: p.detach() for name, p in self._module.named_parameters()}

    def loss_and_gradients(self, x: Any, y: Any) -> tuple[float, dict[str, Any]]:
        """Of a batch."""
        torch = self._torch
        self._module.zero_grad()
        loss = torch.nn.functional.cross_entropy(self._module(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in self._module.named_parameters()}

    def accuracy(self, x: Any, y: Any) -> float:
        """The part of samples that are classified rightly."""
        with self._torch.no_grad():
            return float((self._module(self._torch.from_numpy(x)).argmax(1).numpy() == y).mean())


def model_of(name: str, data: Data, seed: int) -> Any:
    """A model with its parameters at a start of this seed's."""
    shape, classes = data.input_shape, data.classes
    if name == "torch":
        return TorchMLP(classes, seed)
    if name == "cnn":
        return bitring.CNN(shape, classes, seed=seed)
    if name == "lstm":
        layers = [bitring.LSTM("lstm", 64), bitring.Dense("dense", classes)]
        return bitring.Sequence(layers, shape[-2:], classes, seed=seed)
    return bitring.MLP(shape, classes, hidden=(256,), seed=seed)


def train(
    data: Data, model_name: str, compression: str | None, lr: float, seed: int, correction: bool
) -> dict[str, Any]:
    """One training. Collective."""
    comm, samples = MPI.COMM_WORLD, SAMPLES[model_name]
    model = model_of(model_name, data, seed)
    shape = (-1, *data.input_shape[-2:]) if model_name == "lstm" else (-1, *data.input_shape)
    x_train, x_test = data.x_train.reshape(shape), data.x_test.reshape(shape)
    optimizer = bitring.SGD(lr=lr, momentum=0.0 if correction else MOMENTUM)
    trainer = bitring.DataParallel(model.parameters, optimizer, comm=comm, compression=compression)
    velocities: dict[str, Any] = {}
    for epoch in range(EPOCHS):
        order = np.random.default_rng((seed, epoch)).permutation(samples)
        for first in range(0, samples - BATCH + 1, BATCH):
            mine = order[first : first + BATCH][comm.rank :: comm.size]
            _, gradients = model.loss_and_gradients(x_train[mine], data.y_train[mine])
            if correction:
                velocities = {name: MOMENTUM * velocities.get(name, 0) + g for name, g in gradients.items()}
            trainer.step(velocities if correction else gradients, weight=len(mine))
    result = {
        "accuracy": 100 * float(model.accuracy(x_test, data.y_test)),
        "bytes_sent": comm.allreduce(trainer.bytes_sent) / comm.size,
        "residual_ratio": trainer.telemetry().get("residual_ratio"),
    }
    trainer.free()
    return result


def main() -> None:
    """Train each case with each seed; rank 0 prints, and writes the file."""
    parser = argparse.ArgumentParser(description="Accuracy by the levels of 1-bit codes.")
    parser.add_argument("--model", choices=list(SAMPLES), default="mlp")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--compression", nargs="*", default=["onebit", "onebit:levels=row", "onebit:levels=block"])
    parser.add_argument("--momentum-correction", action="store_true", help="of all but the exact exchange")
    parser.add_argument("--json", type=Path, help="runs that this file holds already are not made again")
    asked = parser.parse_args()
    comm, data = MPI.COMM_WORLD, load("fashion_mnist")
    found = {"model": asked.model, "lr": asked.lr, "ranks": comm.size, "machine": describe(comm), "cases": {}}
    if comm.rank == 0 and asked.json and asked.json.exists():
        found["cases"] = json.loads(asked.json.read_text(encoding="utf-8"))["cases"]
    cases: dict[str, Any] = comm.bcast(found["cases"], 0)
    found["cases"] = cases
    for compression in (None, *asked.compression):
        correction = asked.momentum_correction and compression is not None
        name = f"{compression or 'exact'}{', momentum correction' if correction else ''}"
        runs = cases.setdefault(name, [])
        for seed in range(len(runs), asked.seeds):
            runs.append(train(data, asked.model, compression, asked.lr, seed, correction))
            if comm.rank == 0 and asked.json:
                asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if comm.rank == 0:
            gaps = [run["accuracy"] - exact["accuracy"] for run, exact in zip(runs, cases["exact"], strict=False)]
            print(
                f"{name}: {statistics.mean(run['accuracy'] for run in runs):.2f}%, to exact "
                f"{statistics.mean(gaps):+.2f} ({', '.join(f'{gap:+.1f}' for gap in gaps)}), bytes 1/"
                f"{cases['exact'][0]['bytes_sent'] / max(1, runs[0]['bytes_sent']):.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
