"""scikit-learn's digits: 1,797 handwritten digits, 8×8, 10 classes, part of the package itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitring.models.dataset import Data, Dataset


class Digits(Dataset):
    """1,437 samples to train on and 360 to test on, always the same; values from 0 to 1. No files are looked for."""

    def load(self, directory: Path | None) -> Data:
        """See Dataset. Raises ImportError without scikit-learn."""
        try:
            import sklearn.datasets as bundled
        except ImportError as error:
            raise ImportError("digits: the data comes with scikit-learn: pip install 'bitring[demo]'") from error
        digits: Any = bundled.load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        x = (digits.images / 16).astype(np.float32)[order]
        y = digits.target.astype(np.int64)[order]
        test = len(y) // 5 + 1
        return Data(x[:-test], y[:-test], x[-test:], y[-test:])
