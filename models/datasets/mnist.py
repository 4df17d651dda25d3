"""MNIST: 60,000 and 10,000 handwritten digits, 28×28, 10 classes (LeCun et al. 1998)."""

from __future__ import annotations

from pathlib import Path

from bitring.models.dataset import Data, Dataset
from bitring.models.idx import load_idx


class MNIST(Dataset):
    """From its IDX files."""

    def load(self, directory: Path | None) -> Data:
        """See Dataset."""
        return load_idx("mnist", directory, "Get the four files from http://yann.lecun.com/exdb/mnist.")
