"""Kinds of levels for 1-bit codes, held against each other: what they leave of real gradients, and what they cost.

    python benchmarks/level_kinds.py [--seeds 4] [--workers 4] [--kinds NAME...] [--json FILE] [--plot FILE]

The MLP 784-256-10 on 20,000 samples of Fashion-MNIST, batches of 64, learning rate 0.05, momentum 0.9, 2 epochs, no
exact steps. The workers and the owners, of as many panels as workers, are in one process, with error feedback in both;
kinds that the library has run by its own encoders. Runs that the JSON file holds are not made again.
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

import bitring
from bitring.compression.exchange.layout import lay_out
from bitring.models.dataset import Data, load

LR, MOMENTUM, BATCH, SAMPLES, EPOCHS = 0.05, 0.9, 64, 20_000, 2
SHAPES: list[tuple[int, ...]] = [(10, 256), (256, 784)]
"""The parameters that are encoded, as they are in a bucket."""

LAST = 10
"""Accuracies at the end, 20 steps apart, of which the mean is taken: one alone moves by a point."""

Array = Any
Code = Callable[[Array, Any], Array]
"""What a matrix decodes to; the second argument names the sender, for kinds that remember."""

TINY = 1e-30


def of_library(levels: str) -> Callable[[tuple[int, ...], int], Code]:
    """An encoder of the library, laid out as among so many ranks."""

    def make(shape: tuple[int, ...], workers: int) -> Code:
        layout = lay_out(bitring.OneBit(levels=levels), SHAPES, workers)
        first = sum(map(math.prod, SHAPES[: SHAPES.index(shape)]))
        every = [piece for chunk in layout.segments for segment in chunk for piece in segment]
        pieces = [
            (start - first, stop - first, encoder)
            for start, stop, encoder in every
            if first <= start < first + math.prod(shape)
        ]

        def code(v: Array, _: Any) -> Array:
            flat, residual = v.reshape(-1), np.zeros(v.size, np.float32)
            for start, stop, encoder in pieces:
                payload = np.empty(encoder.nbytes(stop - start), np.uint8)
                encoder.encode(flat[start:stop], residual[start:stop], payload)
            return v - residual.reshape(v.shape)

        return code

    return make


def by_panels(code: Code) -> Callable[[tuple[int, ...], int], Code]:
    """A code of each panel: an owner's rows, 16 or more."""

    def make(shape: tuple[int, ...], workers: int) -> Code:
        rows = max(16, -(-shape[0] // workers))

        def whole(v: Array, sender: Any) -> Array:
            parts = [code(v[i : i + rows], (sender, i)) for i in range(0, len(v), rows)]
            return np.concatenate(parts).astype(np.float32)

        return whole

    return make


def _row_means(v: Array, high: Array) -> tuple[Array, Array]:
    magnitudes = np.abs(v)
    return tuple(
        np.where(members, magnitudes, 0).sum(axis=1, keepdims=True) / np.maximum(members.sum(axis=1, keepdims=True), 1)
        for members in (~high, high)
    )  # type: ignore[return-value]


def two_levels(v: Array, _: Any) -> Array:
    """Means of rows by sign times those of columns, as numbers of any length."""
    high = v >= 0
    c = np.abs(v).mean(axis=0)
    lows, highs = _row_means(v, high)
    return np.where(high, highs, -lows) * c / max(c.mean(), TINY)


def one_level(v: Array, _: Any) -> Array:
    """The same, of both signs together."""
    a = np.abs(v)
    return np.sign(v) * a.mean(axis=1, keepdims=True) * a.mean(axis=0) / max(a.mean(), TINY)


def least_squares(v: Array, _: Any) -> Array:
    """Means of rows times those of columns, with a factor for each sign that leaves least."""
    a, high = np.abs(v), v >= 0
    t = a.mean(axis=1, keepdims=True) * a.mean(axis=0) / max(a.mean(), TINY)
    factors = [(a * t)[each].sum() / max((t * t)[each].sum(), TINY) for each in (~high, high)]
    return np.where(high, factors[1], -factors[0]) * t


def least_squares_rows(v: Array, _: Any) -> Array:
    """Means of columns, and of each row and sign the number that leaves least."""
    a, high = np.abs(v), v >= 0
    c = a.mean(axis=0)
    lows, highs = (
        np.where(each, a * c, 0).sum(axis=1, keepdims=True)
        / np.maximum(np.where(each, c * c, 0).sum(axis=1, keepdims=True), TINY)
        for each in (~high, high)
    )
    return np.where(high, highs, -lows) * c


def delayed_columns() -> Code:
    """Columns' means are those of the step before, so that one pass is enough; rows' make up for a change of size."""
    before: dict[Any, Array] = {}

    def code(v: Array, sender: Any) -> Array:
        high, now = v >= 0, np.abs(v).mean(axis=0)
        c = before.get((sender, v.shape), now)
        before[sender, v.shape] = now
        lows, highs = _row_means(v, high)
        return np.where(high, highs, -lows) * c / max(c.mean(), TINY)

    return code


def rotated(v: Array, _: Any) -> Array:
    """A random rotation, by signs and Walsh-Hadamard, before the sign (DRIVE), in parts of 1024; and back."""
    n, size = v.size, 1024
    x = np.zeros(-(-n // size) * size, np.float32)
    x[:n] = v.reshape(-1)
    signs = np.random.default_rng(7).choice(np.array([-1, 1], np.float32), x.size)
    y = _hadamard((x * signs).reshape(-1, size))
    y = np.sign(y) * np.abs(y).mean(axis=1, keepdims=True)
    return (_hadamard(y).reshape(-1) * signs)[:n].reshape(v.shape)


def _hadamard(x: Array) -> Array:
    size, width = x.shape[1], 1
    while width < size:
        x = x.reshape(len(x), -1, 2, width)
        x = np.stack([x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]], axis=2).reshape(len(x), size)
        width *= 2
    return x / np.float32(math.sqrt(size))


def top(density: float, falls_in: int = 0) -> Callable[[tuple[int, ...], int], Code]:
    """The largest values as they are; at first a quarter of them, where the ``density`` ``falls_in`` so many steps."""

    def make(shape: tuple[int, ...], workers: int) -> Code:
        calls = {}

        def code(v: Array, sender: Any) -> Array:
            calls[sender] = calls.get(sender, 0) + 1
            share = min(1.0, calls[sender] / falls_in) if falls_in else 1.0
            count = max(1, round(v.size * 0.25 ** (1 - share) * density**share))
            least = np.partition(np.abs(v), v.size - count, axis=None)[v.size - count]
            return np.where(np.abs(v) >= least, v, 0)

        return code

    return make


def low_rank_first(shape: tuple[int, ...], workers: int) -> Code:
    """One product of a row's number and a column's, by a step of a power iteration; what is left at one bit."""
    rest = KINDS["rank_one"](shape, workers)
    factors: dict[Any, Array] = {}

    def code(v: Array, sender: Any) -> Array:
        q = factors.get(sender, np.ones(v.shape[1], np.float32))
        p = v @ q
        p /= max(float(np.linalg.norm(p)), TINY)
        factors[sender] = q = v.T @ p
        low = np.outer(p, q).astype(np.float32)
        return low + rest(v - low, sender)

    return code


KINDS: dict[str, Callable[[tuple[int, ...], int], Code]] = {
    "rank_one": of_library("rank_one"),
    "row": of_library("row"),
    "block": of_library("block"),
    "rank one, whole numbers of rows and columns": by_panels(two_levels),
    "rank one, one level": by_panels(one_level),
    "rank one, least squares by sign": by_panels(least_squares),
    "rank one, least squares by row": by_panels(least_squares_rows),
    "rank one, columns a step late": by_panels(delayed_columns()),
    "rotation": by_panels(rotated),
    "rank one in EF21 with momentum": by_panels(two_levels),
    "a product, and rank_one of the rest": low_rank_first,
    "topk 1%": top(0.01),
    "topk 1%, from 25% in 150 steps": top(0.01, 150),
    "topk 1%, momentum correction": top(0.01),
}


def train(data: Data, kind: str | None, workers: int, seed: int) -> dict[str, Any]:
    """One training; None is exact. Small parameters travel exactly."""
    model = bitring.MLP(data.input_shape, data.classes, hidden=(256,), seed=seed)
    w = model.parameters
    codes = {} if kind is None else {k: KINDS[kind](x.shape, workers) for k, x in w.items() if x.size >= 1024}
    is_ef21, corrects = "EF21" in (kind or ""), "momentum correction" in (kind or "")
    left = [{name: np.zeros_like(w[name]) for name in codes} for _ in range(workers + 1)]  # the owners' last
    sent = [{name: np.zeros_like(w[name]) for name in codes} for _ in range(workers + 1)]
    velocity = {name: np.zeros_like(x) for name, x in w.items()}
    ratios: dict[str, list[float]] = {name: [] for name in codes}
    accuracies: list[float] = []

    def passed_on(name: str, x: Array, who: int) -> Array:
        if is_ef21:  # the change of what was sent before; workers' momentum is before it
            if who < workers:
                left[who][name] = x = MOMENTUM * left[who][name] + (1 - MOMENTUM) * x
            change = x - sent[who][name]
            d = codes[name](change, who)
            sent[who][name] = sent[who][name] + d
            rest, of = change - d, change
            result = sent[who][name]
        elif corrects and who < workers:  # momentum before the encoding, and none of what was sent (Lin et al., 2018)
            sent[who][name] = MOMENTUM * sent[who][name] + x
            of = left[who][name] + sent[who][name]
            result = codes[name](of, who)
            rest = left[who][name] = of - result
            sent[who][name][result != 0] = 0
        else:
            of = x + left[who][name]
            result = codes[name](of, who)
            rest = left[who][name] = of - result
        if who == 0 and steps % 20 == 0:
            ratios[name].append(float((rest**2).sum() / max(float((of**2).sum()), TINY)))
        return result

    steps = 0
    for epoch in range(EPOCHS):
        order = np.random.default_rng((seed, epoch)).permutation(SAMPLES)
        for first in range(0, SAMPLES - BATCH + 1, BATCH):
            total = {name: np.zeros_like(x) for name, x in w.items()}
            for worker in range(workers):
                mine = order[first : first + BATCH][worker::workers]
                _, gradients = model.loss_and_gradients(data.x_train[mine], data.y_train[mine])
                for name, gradient in gradients.items():
                    part = gradient * np.float32(len(mine) / BATCH)
                    total[name] += passed_on(name, part, worker) if name in codes else part
            for name, x in w.items():
                g = passed_on(name, total[name], workers) if name in codes else total[name]
                if name not in codes or not (is_ef21 or corrects):
                    velocity[name] = MOMENTUM * velocity[name] + g
                else:
                    velocity[name] = g / (1 - MOMENTUM) if is_ef21 else g
                x -= np.float32(LR) * velocity[name].astype(np.float32)
            steps += 1
            if steps % 20 == 0:
                accuracies.append(100 * float(model.accuracy(data.x_test, data.y_test)))
    return {
        "accuracy": statistics.mean(accuracies[-LAST:]),
        "left": {name: statistics.mean(each) for name, each in ratios.items()},
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """What an encoding leaves, by kind and layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = [kind for kind in found["kinds"] if kind != "exact"]
    layers = list(found["kinds"][kinds[0]][0]["left"])
    for k, layer in enumerate(layers):
        means = [statistics.mean(run["left"][layer] for run in found["kinds"][kind]) for kind in kinds]
        axes.barh([i + 0.4 * k for i in range(len(kinds))], means, height=0.38, label=layer)
    axes.set_yticks([i + 0.2 for i in range(len(kinds))], kinds, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("what an encoding leaves of gradient + residual, squared norms")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train with each kind and seed; print, and keep the results."""
    parser = argparse.ArgumentParser(description="Kinds of levels for 1-bit codes.")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    data = load("fashion_mnist")
    found: dict[str, Any] = {"benchmark": "level-kinds", "workers": asked.workers, "kinds": {}}
    if asked.json and asked.json.exists():
        found = json.loads(asked.json.read_text(encoding="utf-8"))
    for kind in ("exact", *asked.kinds):
        runs = found["kinds"].setdefault(kind, [])
        for seed in range(len(runs), asked.seeds):
            runs.append(train(data, None if kind == "exact" else kind, asked.workers, seed))
            if asked.json:
                asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        gaps = [run["accuracy"] - exact["accuracy"] for run, exact in zip(runs, found["kinds"]["exact"], strict=False)]
        left = {layer: round(statistics.mean(run["left"][layer] for run in runs), 2) for layer in runs[0]["left"]}
        print(
            f"{kind}: {statistics.mean(gaps):+.2f} ({', '.join(f'{gap:+.1f}' for gap in gaps)}), left {left}",
            flush=True,
        )
    if asked.plot:
        draw(found, asked.plot)


if __name__ == "__main__":
    main()
