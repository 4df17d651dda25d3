"""Fashion-MNIST: 60,000 and 10,000 pictures of clothes, 28×28, 10 classes (Xiao et al. 2017, arXiv:1708.07747)."""

from __future__ import annotations

from pathlib import Path

from bitring.models.dataset import Data, Dataset
from bitring.models.idx import load_idx


class FashionMNIST(Dataset):
    """From its IDX files."""

    def load(self, directory: Path | None) -> Data:
        """See Dataset."""
        return load_idx(
            "fashion-mnist",
            directory,
            "Debian and Ubuntu have them: apt-get install dataset-fashion-mnist. Else get the four files from "
            "https://github.com/zalandoresearch/fashion-mnist (data/fashion).",
        )
