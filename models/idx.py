"""IDX files, the format of MNIST and Fashion-MNIST: a magic number, the sizes, the bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitring.models.dataset import Data, classes, find, images

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The uint8 array in an IDX file, plain or gzipped. Raises ValueError, naming the file, when it is not one."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or not gzipped: {error}") from error
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    if raw[:4] != magic:
        raise ValueError(
            f"{path}: an IDX file of bytes in {dimensions} dimensions begins with {magic.hex()}, got {raw[:4].hex()}"
        )
    if len(raw) < header:
        raise ValueError(f"{path}: truncated in its header: {len(raw)} of {header} bytes")
    shape = tuple(int(side) for side in np.frombuffer(raw, ">u4", dimensions, offset=4))
    if len(raw) != header + math.prod(shape):
        raise ValueError(f"{path}: sizes {shape} need {header + math.prod(shape)} bytes, the file has {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def load_idx(name: str, directory: Path | None, get: str) -> Data:
    """The four files of a data set of 10 classes; arguments as in ``find``."""
    x_train, y_train, x_test, y_test = paths = find(name, [FILES], directory, get)
    train, test = images(read(x_train, 3)), images(read(x_test, 3))
    return Data(
        train,
        classes(paths[1], read(y_train, 1), len(train), 10),
        test,
        classes(paths[3], read(y_test, 1), len(test), 10),
    )
