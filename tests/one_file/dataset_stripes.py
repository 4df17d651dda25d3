"""Stripes: 8×8 images whose brightest row is their class, with noise; made when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitring.models.dataset import Data, Dataset


class Stripes(Dataset):
    """360 samples to train on and 120 to test on, 8 classes; always the same. No files are looked for."""

    def load(self, directory: Path | None) -> Data:
        """See Dataset."""
        random = np.random.default_rng(0)
        y: Any = np.arange(480) % 8
        x: Any = random.random((480, 8, 8)).astype(np.float32) / 2
        x[np.arange(480), y] += np.float32(0.5)
        return Data(x[:360], y[:360], x[360:], y[360:])
