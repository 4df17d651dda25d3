"""Accuracy of PyTorch training by each exchange: a small residual convnet and a small transformer on the digits.

    mpirun -n 2 python benchmarks/torch_convergence.py --json FILE --plot FILE

Three seeds each, the same initial values and batches for all exchanges. ``LocalUpdates`` are of the transformer: AdamW
inside, Nesterov's momentum outside, exact and compressed; "streaming" has 3 fragments that travel beside 5 steps and
are blended half and half. 1-bit Adam with an early freeze is of an MLP on 20,000 pictures of Fashion-MNIST;
"unbounded" takes steps of any length. Bytes are what one rank sends to others in the training. Cases that FILE has
already are not trained again; ``--most`` ends it after so many.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import bitring
import bitring.torch
from bitring.nodes import describe

SEEDS = (0, 1, 2)
BATCH = 64
EPOCHS = {"convnet": 12, "transformer": 12, "mlp": 2}
RATES = {"convnet": 2e-3, "transformer": 2e-3, "mlp": 1e-3}


class Block(torch.nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels),
            torch.nn.ReLU(),
            torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels),
        )

    def forward(self, x: Any) -> Any:  # noqa: D102
        return torch.relu(x + self.body(x))


def convnet() -> Any:
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8)),
        torch.nn.Conv2d(1, 24, 3, padding=1),
        torch.nn.ReLU(),
        Block(24),
        torch.nn.MaxPool2d(2),
        Block(24),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(96, 10),
    )


class Transformer(torch.nn.Module):
    """Rows of the picture are words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 48)
        self.place = torch.nn.Parameter(torch.randn(8, 48) * 0.1)
        layer = torch.nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.body = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(48, 10)

    def forward(self, x: Any) -> Any:  # noqa: D102
        return self.head(self.body(self.embed(x) + self.place).mean(1))


def mlp() -> Any:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))


MODELS: dict[str, Callable[[], Any]] = {"convnet": convnet, "transformer": Transformer, "mlp": mlp}


class Unbounded(bitring.torch.OneBitAdam):
    """Steps of any length."""

    longest_step = math.inf


def train(model_name: str, how: str, seed: int) -> dict[str, float]:
    comm = MPI.COMM_WORLD
    data = bitring.load("fashion-mnist" if model_name == "mlp" else "digits")
    x_train, y_train = data.x_train[:20000], data.y_train[:20000]
    shape = (-1, *data.x_train.shape[-2:])
    torch.manual_seed(seed)
    model = MODELS[model_name]()
    batches = bitring.Batches(x_train.reshape(len(x_train), -1), y_train, size=BATCH)
    steps = len(x_train) // BATCH * EPOCHS[model_name]
    rate = RATES[model_name]
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=rate)
    averager: Any = None
    local: Any = None
    kind, *words = how.split()
    if kind in ("OneBitAdam", "unbounded"):
        freeze, compression = (int(words[0]), words[1]) if words else (steps // 5, "onebit")
        bitring.torch.broadcast_parameters(model, comm=comm)
        optimizer = (Unbounded if kind == "unbounded" else bitring.torch.OneBitAdam)(
            model.parameters(), lr=rate, weight_decay=1e-2, comm=comm, freeze_step=freeze, compression=compression
        )
    elif kind in ("local", "streaming"):
        compression = None if words[1] == "exact" else words[1]
        fragments = {"fragments": 3, "delay": 5, "blend": 0.5} if kind == "streaming" else {}
        local = bitring.torch.LocalUpdates(
            model, optimizer, comm=comm, tau=int(words[0]), compression=compression, **fragments
        )
    else:
        averager = bitring.torch.GradientAverager(model, comm=comm, compression=None if how == "exact" else how)
    highest = 0.0
    for epoch in range(EPOCHS[model_name]):
        for x, y in bitring.shard(batches, comm, seed=seed, epoch=epoch):
            pictures, labels = torch.from_numpy(np.ascontiguousarray(x)).reshape(shape), torch.from_numpy(y)
            optimizer.zero_grad()
            if averager is not None:
                with averager.batch(weight=len(x)):
                    torch.nn.functional.cross_entropy(model(pictures), labels).backward()
                optimizer.step()
                continue
            loss = torch.nn.functional.cross_entropy(model(pictures), labels)
            loss.backward()
            highest = max(highest, loss.item())
            (local or optimizer).step(weight=len(x))
    if local is not None:
        local.synchronize()
    owner = local or averager or optimizer
    model.eval()
    with torch.no_grad():
        guess = model(torch.from_numpy(data.x_test).reshape(shape)).argmax(1).numpy()
    found = {
        "accuracy": float((guess == data.y_test).mean()),
        "bytes": float(owner.bytes_sent),
        "highest": comm.allreduce(highest, MPI.MAX),
    }
    owner.free()
    return found


def cases() -> list[tuple[str, str]]:
    ways = ("exact", "bfloat16", "powersgd", "onebit:block=64", "OneBitAdam")
    found = [(model, how) for model in ("convnet", "transformer") for how in ways]
    for kind, tau in (("local", 10), ("local", 30), ("local", 100), ("streaming", 30)):
        found += [
            ("transformer", f"{kind} {tau} {how}")
            for how in ("exact", "linear:bits=8,block=64", "linear:bits=4,block=64", "onebit:block=64")
        ]
    found.append(("mlp", "exact"))
    for levels in ("rank_one", "block"):
        found += [
            ("mlp", f"{kind} {freeze} onebit:levels={levels}")
            for freeze in (10, 30, 100)
            for kind in ("unbounded", "OneBitAdam")
        ]
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.22 * len(results)), dpi=100, layout="constrained")
    axes: Any = figure.add_subplot()
    names = list(results)[::-1]
    for place, name in enumerate(names):
        axes.plot([100 * a for a in results[name]["accuracies"]], [place] * len(SEEDS), "o", color="tab:blue", ms=4)
        axes.plot([100 * results[name]["accuracy"]], [place], "|", color="tab:red", ms=14)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("test accuracy in %, three seeds and their mean")
    axes.grid(axis="x", alpha=0.4)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--most", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    whole: dict[str, Any] = {"machine": describe(comm), "torch": torch.__version__, "epochs": EPOCHS, "results": {}}
    if given.json and given.json.exists():
        whole["results"] = json.loads(given.json.read_text(encoding="utf-8"))["results"]
    comm.Barrier()
    left = [(model, how) for model, how in cases() if f"{model}, {how}" not in whole["results"]]
    for model, how in left[: given.most]:
        runs = [train(model, how, seed) for seed in SEEDS]
        whole["results"][f"{model}, {how}"] = {
            "accuracy": statistics.mean(run["accuracy"] for run in runs),
            "accuracies": [run["accuracy"] for run in runs],
            "mbytes": round(statistics.mean(run["bytes"] for run in runs) / 1e6, 3),
        }
        if model == "mlp" and how != "exact":
            whole["results"][f"{model}, {how}"]["highest_losses"] = [run["highest"] for run in runs]
        whole["results"] = {key: whole["results"][key] for m, h in cases() if (key := f"{m}, {h}") in whole["results"]}
        if comm.rank == 0:
            print(f"{model}, {how}: {whole['results'][f'{model}, {how}']}", flush=True)
            if given.json:
                given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            if given.plot:
                plot(whole["results"], given.plot)


if __name__ == "__main__":
    main()
