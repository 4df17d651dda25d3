"""L-BFGS against SciPy's, evaluation by evaluation.

    python benchmarks/batch_methods.py --json FILE

Softmax regression and an MLP on the digits, in float64, five starts, to within 1e-6 of SciPy's loss after 60
iterations; both see the same function, ridge included.
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

STARTS = 5


class Ridged:
    """A model whose loss has ridge/2·‖w‖² added, so that its minimum is one."""

    def __init__(self, model: Any, x: Any, y: Any, ridge: float) -> None:
        self.model, self.x, self.y, self.ridge = model, x, y, ridge
        self.parameters = model.parameters
        self.seen: list[float] = []

    def flat(self) -> Any:
        """The parameters in one array."""
        return np.concatenate([w.ravel() for w in self.parameters.values()])

    def loss_and_gradients(self, x: Any, y: Any) -> tuple[float, dict[str, Any]]:
        """As the model's; of a portion, whose share of the ridge is its share of the samples."""
        loss, gradients = self.model.loss_and_gradients(x, y)
        for name, w in self.parameters.items():
            loss += 0.5 * self.ridge * float((w**2).sum())
            gradients[name] = gradients[name] + self.ridge * w
        return loss, gradients

    def __call__(self, w: Any) -> tuple[float, Any]:
        """The loss and gradient at ``w``, for SciPy."""
        first = 0
        for value in self.parameters.values():
            value[...] = w[first : first + value.size].reshape(value.shape)
            first += value.size
        loss, gradients = self.loss_and_gradients(self.x, self.y)
        self.seen.append(loss)
        return loss, np.concatenate([g.ravel() for g in gradients.values()])


def evaluations(data: Data, kind: str, seed: int) -> dict[str, float]:
    """How many evaluations each needs, and the losses."""
    import scipy.optimize

    hidden: Any = {"hidden": (32,)} if kind == "mlp" else {}
    x, y = data.x_train.astype(np.float64), data.y_train

    def fresh() -> Ridged:
        maker: Any = {"softmax": bitring.Softmax, "mlp": bitring.MLP}[kind]
        return Ridged(maker(data.input_shape, data.classes, dtype=np.float64, seed=seed, **hidden), x, y, 1e-3)

    theirs = fresh()
    options = {"maxcor": 10, "maxiter": 60, "maxfun": 1000, "ftol": 0.0, "gtol": 0.0}
    end = scipy.optimize.minimize(theirs, theirs.flat(), jac=True, method="L-BFGS-B", options=options).fun
    needed = next(i for i, loss in enumerate(theirs.seen, 1) if loss <= end + 1e-6)
    ours = fresh()
    job = bitring.Sandblaster(ours, bitring.LBFGS(memory=10), comm=MPI.COMM_SELF, portions=1)
    loss = np.inf
    while loss > end + 1e-6 and job.evaluations < 3 * needed:
        loss = job.step(x, y)
    result = {"scipy": needed, "bitring": job.evaluations, "scipy_loss": float(end), "bitring_loss": float(loss)}
    job.free()
    return result


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="L-BFGS against SciPy's.")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    data = load("digits")
    found: dict[str, Any] = {"benchmark": "batch_methods", "machine": describe(MPI.COMM_WORLD), "evaluations": {}}
    for kind in ("softmax", "mlp"):
        runs = [evaluations(data, kind, seed) for seed in range(STARTS)]
        ratios = [each["bitring"] / each["scipy"] for each in runs]
        found["evaluations"][kind] = {"runs": runs, "median_ratio": statistics.median(ratios)}
        print(f"{kind}: {statistics.median(ratios):.3f} of SciPy's evaluations, median of {STARTS}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
