"""CIFAR-10: 50,000 and 10,000 photographs, 32×32×3, 10 classes (Krizhevsky 2009)."""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitring.models.dataset import Data, Dataset, classes, find, images

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
PIXELS = 3 * 32 * 32


class CIFAR10(Dataset):
    """From the files of its binary version (data_batch_1.bin, ...) or of its Python version (data_batch_1, ...)."""

    def load(self, directory: Path | None) -> Data:
        """See Dataset."""
        binary, python = [f"{batch}.bin" for batch in BATCHES], list(BATCHES)
        paths = find(
            "cifar10",
            [
                binary,
                [f"cifar-10-batches-bin/{file}" for file in binary],
                python,
                [f"cifar-10-batches-py/{file}" for file in python],
            ],
            directory,
            "Get cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it (the Python "
            "version's files, without .bin, serve as well).",
        )
        batches = [_read_binary(path) if path.name.endswith(".bin") else _read_python(path) for path in paths]
        x = [images(np.ascontiguousarray(p.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))) for p, _ in batches]
        y = [classes(path, labels, len(labels), 10) for path, (_, labels) in zip(paths, batches, strict=True)]
        return Data(np.concatenate(x[:-1]), np.concatenate(y[:-1]), x[-1], y[-1])


def _read_binary(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Pixels (N, 3072) and labels (N,): each record is a label's byte and the planes of red, green, blue."""
    raw = path.read_bytes()
    if not raw or len(raw) % (1 + PIXELS):
        raise ValueError(
            f"{path}: a CIFAR-10 batch is whole records of {1 + PIXELS} bytes, the file has {len(raw)} bytes"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0]


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays, and refuses all else that a pickle could name: a pickle can call anything."""

    RECONSTRUCT = np.empty(0).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        known = {
            **{(f"numpy.{core}.multiarray", "_reconstruct"): self.RECONSTRUCT for core in ("core", "_core")},
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch does")
        return known[module, name]


def _read_python(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Pixels (N, 3072) and labels (N,), from a pickled dictionary with the keys data and labels."""
    try:
        with path.open("rb") as file:
            batch: Any = _ArraysOnly(file, encoding="bytes").load()
        data, labels = np.asarray(batch[b"data"]), np.atleast_1d(batch[b"labels"])
    # A damaged pickle fails in whatever its bytes happen to say.
    except Exception as error:
        raise ValueError(f"{path}: not a CIFAR-10 batch: {type(error).__name__}: {error}") from error
    if (
        data.dtype != np.uint8
        or data.shape != (len(labels), PIXELS)
        or labels.ndim != 1
        or labels.dtype.kind not in "iu"
    ):
        raise ValueError(
            f"{path}: a CIFAR-10 batch has data (N, {PIXELS}) of uint8 and N integer labels, got {data.shape} of "
            f"{data.dtype} and {labels.shape} of {labels.dtype}"
        )
    return data, labels
