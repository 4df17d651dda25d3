"""What the tests of bitring.torch share: models, batches cut into unequal parts, and training in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)

STEPS = 50
SAMPLES = 11
FEATURES = 6
CLASSES = 4


def dense(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 17),
        torch.nn.Tanh(),
        torch.nn.Linear(17, 9),
        torch.nn.ReLU(),
        torch.nn.Linear(9, CLASSES),
    )


class Branches(torch.nn.Module):
    """One of two branches has a part in the loss; ``never`` has none, ``frozen`` is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(FEATURES, 12)
        self.left = torch.nn.Linear(12, CLASSES)
        self.right = torch.nn.Linear(12, CLASSES)
        self.never = torch.nn.Linear(3, 3)
        self.frozen = torch.nn.Linear(12, 12)
        self.frozen.requires_grad_(False)

    def forward(self, x: Any, left: bool = True) -> Any:
        h = self.frozen(torch.tanh(self.body(x)))
        return self.left(h) if left else self.right(h)


class Tied(torch.nn.Module):
    """The output layer has the transposed weights of the input layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(FEATURES, 8)
        self.outer = torch.nn.Linear(FEATURES, 8, bias=False)
        self.outer.weight = self.inner.weight
        self.last = torch.nn.Linear(8, CLASSES)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.inner(x)) * self.outer(x))


def convnet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 2, 3)),
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 6, (2, 3)),
        torch.nn.Flatten(),
        torch.nn.Linear(6, CLASSES),
    ).to(memory_format=torch.channels_last)


def batches(steps: int = STEPS, samples: int = SAMPLES, seed: int = 1) -> Iterator[tuple[Any, Any]]:
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        x = generator.normal(size=(samples, FEATURES)).astype(np.float32)
        yield torch.from_numpy(x), torch.from_numpy(generator.integers(0, CLASSES, samples))


def part(rank: int, size: int, samples: int = SAMPLES) -> slice:
    """A rank's part of a batch; they are unequal."""
    cuts = [samples * i * (i + 1) // (size * (size + 1)) for i in range(size + 1)]
    return slice(cuts[rank], cuts[rank + 1])


def cross_entropy(model: Any, x: Any, y: Any) -> Any:
    return torch.nn.functional.cross_entropy(model(x), y)


def values(model: Any) -> Any:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def distance(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


def mean_gradients(model: Any, size: int, weights: list[float], backward: Callable[[int], None]) -> None:
    """In one process: each rank's gradients, one after the other, and their weighted mean as the gradients."""
    total, sums = sum(weights), {}
    for rank in range(size):
        model.zero_grad()
        if weights[rank]:
            backward(rank)
        for name, p in model.named_parameters():
            if p.grad is not None:
                g = p.grad.to_dense() * (weights[rank] / total)
                sums[name] = sums[name] + g if name in sums else g
    for name, p in model.named_parameters():
        p.grad = sums.get(name)
