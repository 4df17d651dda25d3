"""Data sets: what they are, and finding one by its name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitring.paths import as_path
from bitring.registry import Registry


@dataclass(frozen=True, eq=False)
class Data:
    """Samples and their classes, for training and for testing.

    x_train, x_test: float32, (N, ...), images (N, H, W) or (N, H, W, C) with values from 0 to 1. y_train, y_test:
    int64, (N,), from 0 on. Raises TypeError or ValueError when they are something else.
    """

    x_train: npt.NDArray[np.float32]
    y_train: npt.NDArray[np.int64]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if x.dtype != np.float32 or y.dtype != np.int64:
                raise TypeError(f"Data: x_{part} must be float32 and y_{part} int64, got {x.dtype} and {y.dtype}")
            if x.ndim < 2 or y.shape != x.shape[:1] or not len(y):
                raise ValueError(
                    f"Data: x_{part} must be (N, ...) and y_{part} (N,) with the same N from 1 on, got {x.shape} "
                    f"and {y.shape}"
                )
            if y.min() < 0:
                raise ValueError(f"Data: y_{part} must not be negative, got {y.min()}")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"Data: samples of x_train and x_test must have one shape, got {self.x_train.shape[1:]} "
                f"and {self.x_test.shape[1:]}"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.x_train.shape[1:]

    @property
    def classes(self) -> int:
        """The number of classes: the largest in y, plus 1."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1


class Dataset(ABC):
    """A data set that is known by name. The file's stem is the name; ``-`` and ``_`` are the same to a user."""

    @abstractmethod
    def load(self, directory: Path | None) -> Data:
        """Read it. ``directory``: where its files are, or None for the usual places (see ``find``)."""


datasets: Registry[Dataset] = Registry("data set", Dataset, "models/datasets", group="bitring.datasets")


def load(name: str, directory: str | os.PathLike[str] | None = None) -> Data:
    """The data set ``name``: ``"digits"``, ``"fashion-mnist"``, ``"mnist"``, ``"cifar10"``, or a path ending in .npz.

    Files are looked for in ``directory`` and its folder NAME when it is given, else in the folders NAME of
    $BITRING_DATA, $BITRING_DATA itself, and /usr/share/datasets/NAME. Raises ValueError for an unknown name or a bad
    file, FileNotFoundError, telling where it looked and where to get them, for missing files, and ImportError when a
    data set's package is missing.
    """
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"load: name must be a str: a data set's, or a path ending in .npz; got {type(name).__name__}")
    folder = None if directory is None else as_path(directory, "load", "directory")
    if name.endswith(".npz"):
        from bitring.models.npz import load_npz

        path = as_path(name, "load", "name")
        return load_npz(path if folder is None else folder / path)
    stem = name.replace("-", "_")
    if stem not in datasets.names():
        raise ValueError(
            f"load: unknown data set {name!r}; known: {', '.join(datasets.names())}, or a path ending in .npz"
        )
    return datasets.get(stem)().load(folder)


def find(name: str, choices: Sequence[Sequence[str]], directory: Path | None, get: str) -> list[Path]:
    """The paths of the first of ``choices``, each a list of files, that one place has in full, plain or with ``.gz``.

    Places: ``directory`` and its folder ``name``; without a directory the folder ``name`` of $BITRING_DATA,
    $BITRING_DATA itself, and /usr/share/datasets/``name``. Raises FileNotFoundError, which lists the places and says
    with ``get`` how to get the files.
    """
    if directory is not None:
        places = [directory, directory / name]
    else:
        root = os.environ.get("BITRING_DATA")
        places = [Path(root) / name, Path(root)] if root else []
        places.append(Path("/usr/share/datasets") / name)
    for place in places:
        for files in choices:
            found = [next((p for p in (place / file, place / f"{file}.gz") if p.is_file()), None) for file in files]
            paths = [path for path in found if path is not None]
            if len(paths) == len(files):
                return paths
    raise FileNotFoundError(
        f"{name}: found no place with all of {', '.join(choices[0])}; looked in "
        f"{', '.join(str(place) for place in places)}. {get} Put them into a folder and name it as directory, or into "
        f"the folder {name} of a folder named by $BITRING_DATA."
    )


def images(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Bytes as float32 from 0 to 1."""
    return np.divide(pixels, 255, dtype=np.float32)


def classes(path: Path, labels: npt.NDArray[Any], count: int, number: int) -> npt.NDArray[np.int64]:
    """``labels`` as int64. Raises ValueError, naming ``path``, unless there are ``count`` of them, below ``number``."""
    if len(labels) != count:
        raise ValueError(f"{path}: {len(labels)} labels for {count} images")
    if len(labels) and not (labels.min() >= 0 and labels.max() < number):
        raise ValueError(f"{path}: labels must be from 0 to {number - 1}, got {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)
