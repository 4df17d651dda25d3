"""A data set of one's own: an .npz file with the arrays x_train, y_train, x_test, y_test."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bitring.models.dataset import Data, images

NAMES = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path) -> Data:
    """Reads ``path``. x: floating, as it is, or uint8, divided by 255; y: integers from 0 on.

    Raises FileNotFoundError, and ValueError or TypeError, naming the file, when it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an .npz file with the arrays {', '.join(NAMES)}")
    try:
        with path.open("rb") as file, zipfile.ZipFile(file):  # NumPy leaves a file open that is no archive
            pass
        with np.load(path, allow_pickle=False) as content:
            missing = [name for name in NAMES if name not in content]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}, only {', '.join(content) or 'nothing'}")
            arrays: dict[str, Any] = {name: content[name] for name in NAMES}
        for name, array in arrays.items():
            kinds = "iu" if name.startswith("y") else "f"
            if array.dtype.kind not in kinds and not (name.startswith("x") and array.dtype == np.uint8):
                expected = "integers" if kinds == "iu" else "floating or uint8"
                raise ValueError(f"{name} must be {expected}, got {array.dtype}")
            if name.startswith("y"):
                arrays[name] = array.astype(np.int64)
            else:
                arrays[name] = images(array) if array.dtype == np.uint8 else array.astype(np.float32)
        return Data(**arrays)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a usable .npz data set: {error}") from error
