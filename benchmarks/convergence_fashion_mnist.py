"""Does training at one bit per value reach the accuracy of the exact exchange? Fashion-MNIST, the CNN, 4 ranks.

    python benchmarks/convergence_fashion_mnist.py [--ranks 4] [--epochs 5] [--work FOLDER] [--results FOLDER]

Runs ``mpirun -n 4 bitring train --model cnn --data fashion-mnist`` with ``--compression none`` and ``onebit``, the same
seed, and keeps both histories and this machine's description in results/convergence-fashion-mnist.json, with a picture.
A run that was interrupted goes on from its last checkpoint in the work folder; one that is complete is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from run import launcher  # noqa: E402  # how this environment's mpirun is called

COMPRESSIONS = ("none", "onebit")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "convergence")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    runs = {name: train(name, options.ranks, options.epochs, options.work / name) for name in COMPRESSIONS}
    kept = {
        "benchmark": "convergence-fashion-mnist",
        "machine": machine(),
        "note": "seconds and samples_per_second are those of a machine that other work may have shared",
        "accuracy_difference": runs["onebit"]["summary"]["test_accuracy"] - runs["none"]["summary"]["test_accuracy"],
        "bytes_ratio": runs["none"]["summary"]["bytes_sent"] / runs["onebit"]["summary"]["bytes_sent"],
        "runs": runs,
    }
    target = options.results / "convergence-fashion-mnist.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    from bitring.commands._pictures import draw_curves

    labels = {"none": "exact", "onebit": "one bit per value"}
    histories = {labels[name]: run["history"] for name, run in runs.items()}
    title = f"The CNN on Fashion-MNIST, {options.ranks} ranks"
    draw_curves(histories, target.with_suffix(".png"), title, by="bytes_sent")
    for name, run in runs.items():
        print(f"{name:<8} test accuracy {run['summary']['test_accuracy']:.4f}, {run['summary']['bytes_sent']:,} bytes")
    print(f"bytes: 1/{kept['bytes_ratio']:.1f}; kept in {target}")


def train(compression: str, ranks: int, epochs: int, folder: Path, *options: str) -> dict[str, Any]:
    """The summary and the history of one run, made or finished now unless it is complete."""
    summary, metrics = folder / "summary.json", folder / "metrics.jsonl"
    if not summary.exists() or json.loads(summary.read_text(encoding="utf-8"))["epochs"] < epochs:
        prefix, environment = launcher(ranks)
        command = [*prefix, sys.executable, "-m", "bitring", "train", "--model", "cnn", "--data", "fashion-mnist"]
        command += ["--compression", compression, "--epochs", str(epochs), "--output", str(folder), "--resume"]
        command += options
        subprocess.run(command, env={**os.environ, **environment}, check=True)
    history = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {"summary": json.loads(summary.read_text(encoding="utf-8")), "history": history}


def machine() -> dict[str, Any]:
    """What the summaries do not say of this machine."""
    from mpi4py import MPI

    from bitring.nodes import describe

    found = describe(MPI.COMM_SELF)
    return {key: found[key] for key in ("processor", "cores_of_node", "system")}


if __name__ == "__main__":
    main()
