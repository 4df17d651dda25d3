"""Data sets: the bundled digits, tiny files in every format, files that are wrong, and files that are not there."""

from __future__ import annotations

import builtins
import gzip
import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitring.models.dataset import Data, datasets, load

pytestmark = pytest.mark.single

RANDOM = np.random.default_rng(11)
IMAGES = RANDOM.integers(0, 256, (7, 28, 28)).astype(np.uint8)
LABELS = np.array([0, 9, 3, 3, 1, 8, 2], np.uint8)
TEST_IMAGES, TEST_LABELS = IMAGES[:3, ::-1], LABELS[:3]


@pytest.fixture(autouse=True)
def no_data_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITRING_DATA", raising=False)


def idx(array: Any) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (
        ("train-images-idx3-ubyte", IMAGES),
        ("train-labels-idx1-ubyte", LABELS),
        ("t10k-images-idx3-ubyte", TEST_IMAGES),
        ("t10k-labels-idx1-ubyte", TEST_LABELS),
    ):
        raw = idx(array)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    return folder


def check_tiny(data: Data) -> None:
    np.testing.assert_array_equal(data.x_train, IMAGES.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(data.x_test, TEST_IMAGES.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(data.y_train, LABELS)
    np.testing.assert_array_equal(data.y_test, TEST_LABELS)
    assert data.x_train.dtype == data.x_test.dtype == np.float32
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert data.x_train.min() >= 0 and data.x_train.max() <= 1
    assert data.input_shape == (28, 28) and data.classes == 10


def test_digits_are_split_the_same_always() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    data, again = load("digits"), load("digits")
    assert data.x_train.shape == (1437, 8, 8) and data.x_test.shape == (360, 8, 8)
    np.testing.assert_array_equal(data.x_test, again.x_test)
    # The first test labels of the published split: a change would make old figures incomparable.
    assert data.y_test[:8].tolist() == [0, 8, 8, 9, 8, 3, 7, 5]
    assert data.x_train.min() == 0 and data.x_train.max() == 1
    assert set(data.y_train) == set(data.y_test) == set(range(10))
    everything = np.concatenate([data.x_train, data.x_test]).reshape(1797, -1) * 16
    bundled: Any = sklearn_datasets.load_digits().data
    np.testing.assert_array_equal(np.sort(everything.sum(axis=1)), np.sort(bundled.sum(axis=1)))


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"digits: the data comes with scikit-learn: pip install 'bitring\[demo\]'"):
        load("digits")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "fashion_mnist"])
def test_idx_files(tmp_path: Path, name: str, suffix: str) -> None:
    check_tiny(load(name, write_idx(tmp_path, suffix)))


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tiny(load("fashion-mnist", str(write_idx(tmp_path / "a" / "fashion-mnist").parent)))
    monkeypatch.setenv("BITRING_DATA", str(tmp_path / "a"))
    check_tiny(load("fashion-mnist"))
    with pytest.raises(FileNotFoundError):
        load("mnist")  # it has the same file names, and must not be taken from the other's folder
    monkeypatch.setenv("BITRING_DATA", str(tmp_path / "a" / "fashion-mnist"))
    check_tiny(load("mnist"))
    with pytest.raises(FileNotFoundError):
        load("fashion-mnist", tmp_path / "b")  # a directory that is named is the only place


def test_fashion_mnist_itself() -> None:
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    data = load("fashion-mnist")
    assert data.x_train.shape == (60000, 28, 28) and data.x_test.shape == (10000, 28, 28)
    assert np.bincount(data.y_train).tolist() == [6000] * 10
    assert data.x_train.mean() == pytest.approx(0.286, abs=0.001)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("file", "spoil", "text"),
    [
        ("train-images-idx3-ubyte", cut_short, "sizes (7, 28, 28) need 5504 bytes, the file has 5499"),
        (
            "train-images-idx3-ubyte",
            lambda p: p.write_bytes(p.read_bytes() + b"x"),
            "5504 bytes, the file has 5505",
        ),
        (
            "train-images-idx3-ubyte",
            lambda p: p.write_bytes(p.read_bytes()[:9]),
            "in its header: 9 of 16 bytes",
        ),
        ("train-images-idx3-ubyte", lambda p: p.write_bytes(b""), "in 3 dimensions begins with 00000803, got "),
        ("t10k-labels-idx1-ubyte", lambda p: p.write_bytes(idx(TEST_IMAGES)), "begins with 00000801, got 00000803"),
        ("train-labels-idx1-ubyte", lambda p: p.write_bytes(idx(LABELS[:6])), "6 labels for 7 images"),
        (
            "train-labels-idx1-ubyte",
            lambda p: p.write_bytes(idx(LABELS + 1)),
            "must be from 0 to 9, got 1 to 10",
        ),
    ],
)
def test_bad_idx_files(tmp_path: Path, file: str, spoil: Callable[[Path], None], text: str) -> None:
    spoil(write_idx(tmp_path) / file)
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        load("mnist", tmp_path)
    assert str(tmp_path / file) in str(caught.value)


@pytest.mark.parametrize("spoil", [cut_short, lambda p: p.write_bytes(b"no gzip")])
def test_bad_gzip(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    file = write_idx(tmp_path, ".gz") / "t10k-images-idx3-ubyte.gz"
    spoil(file)
    with pytest.raises(ValueError, match=re.escape(f"{file}: truncated or not gzipped")):
        load("mnist", tmp_path)


CIFAR = RANDOM.integers(0, 256, (6, 4, 3, 32, 32)).astype(np.uint8)  # batch, image, color, row, column
CIFAR_LABELS = RANDOM.integers(0, 10, (6, 4))
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_cifar_binary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels, labels in zip(BATCHES, CIFAR, CIFAR_LABELS, strict=True):
        records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    return folder


def write_cifar_python(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels, labels in zip(BATCHES, CIFAR, CIFAR_LABELS, strict=True):
        batch = {b"data": pixels.reshape(4, -1), b"labels": labels.tolist(), b"batch_label": b"a batch"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


@pytest.mark.parametrize(
    ("write", "inside"),
    [
        (write_cifar_binary, "."),
        (write_cifar_binary, "cifar-10-batches-bin"),
        (write_cifar_python, "."),
        (write_cifar_python, "cifar-10-batches-py"),
    ],
)
def test_cifar10(tmp_path: Path, write: Callable[[Path], Path], inside: str) -> None:
    write(tmp_path / inside)
    data = load("cifar10", tmp_path)
    assert data.x_train.shape == (20, 32, 32, 3) and data.x_test.shape == (4, 32, 32, 3)
    assert data.x_train.flags.c_contiguous and data.x_test.flags.c_contiguous
    expected = CIFAR.transpose(0, 1, 3, 4, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(data.x_train, expected[:5].reshape(20, 32, 32, 3))
    np.testing.assert_array_equal(data.x_test, expected[5])
    np.testing.assert_array_equal(data.y_train, CIFAR_LABELS[:5].ravel())
    np.testing.assert_array_equal(data.y_test, CIFAR_LABELS[5])


def test_bad_cifar10_files(tmp_path: Path) -> None:
    cut_short(write_cifar_binary(tmp_path / "bin") / "data_batch_3.bin")
    with pytest.raises(ValueError, match=r"data_batch_3.bin: .* whole records of 3073 bytes, the file has 12287 bytes"):
        load("cifar10", tmp_path / "bin")
    python = write_cifar_python(tmp_path / "py")
    cut_short(python / "data_batch_2")
    with pytest.raises(ValueError, match=r"data_batch_2: not a CIFAR-10 batch: "):
        load("cifar10", python)
    (python / "data_batch_2").write_bytes(
        pickle.dumps({b"data": CIFAR[0].reshape(4, -1), b"labels": [1, 2]}, protocol=2)
    )
    with pytest.raises(
        ValueError, match=r"has data \(N, 3072\) of uint8 and N integer labels, got \(4, 3072\) of uint8 and"
    ):
        load("cifar10", python)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_cifar10_pickle_runs_nothing(tmp_path: Path) -> None:
    folder = write_cifar_python(tmp_path / "py")
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(tmp_path / "made")}, protocol=2))
    with pytest.raises(ValueError, match=r"it names \w+.mkdir, which no CIFAR-10 batch does"):
        load("cifar10", folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("fashion-mnist", "apt-get install dataset-fashion-mnist"),
        ("mnist", "yann.lecun.com/exdb/mnist"),
        ("cifar10", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    ],
)
def test_missing_files_say_where_it_looked_and_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    first = "data_batch_1.bin" if name == "cifar10" else "train-images-idx3-ubyte"
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))  # one of four is not enough
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    for part in (f"{name}: ", first, str(tmp_path), str(tmp_path / name), how, "$BITRING_DATA"):
        assert part in str(caught.value)
    if not (Path("/usr/share/datasets") / name).exists():
        monkeypatch.setenv("BITRING_DATA", str(tmp_path / "root"))
        with pytest.raises(FileNotFoundError) as caught:
            load(name)
        for part in (str(tmp_path / "root" / name), f"/usr/share/datasets/{name}", how):
            assert part in str(caught.value)


GOOD: dict[str, Any] = {"x_train": IMAGES, "y_train": LABELS, "x_test": TEST_IMAGES, "y_test": TEST_LABELS}


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "bytes.npz", **GOOD)
    check_tiny(load(str(tmp_path / "bytes.npz")))
    check_tiny(load("bytes.npz", tmp_path))
    x = RANDOM.standard_normal((5, 3))
    np.savez_compressed(tmp_path / "floats.npz", x_train=x, y_train=np.arange(5), x_test=x[:2], y_test=np.array([4, 4]))
    data = load(str(tmp_path / "floats.npz"))
    np.testing.assert_array_equal(data.x_train, x.astype(np.float32))
    assert data.y_test.tolist() == [4, 4] and data.classes == 5 and data.input_shape == (3,)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"y_test": None}, "it has no y_test, only x_train, y_train, x_test"),
        (
            {"y_train": LABELS[:5]},
            "and y_train (N,) with the same N from 1 on, got (7, 28, 28) and (5,)",
        ),
        ({"y_train": LABELS.astype(np.float32)}, "y_train must be integers, got float32"),
        ({"y_train": LABELS.astype(np.int64) - 1}, "y_train must not be negative, got -1"),
        ({"x_test": TEST_IMAGES.astype(np.int32)}, "x_test must be floating or uint8, got int32"),
        ({"x_test": TEST_IMAGES[:, :5]}, "x_train and x_test must have one shape, got (28, 28) and (5, 28)"),
        ({"x_test": TEST_IMAGES[:0], "y_test": TEST_LABELS[:0]}, "with the same N from 1 on, got (0, 28, 28) and (0,)"),
        ({"x_train": np.array([{}, {}], object)}, "Object arrays cannot be loaded when allow_pickle=False"),
    ],
)
def test_bad_npz_arrays(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    arrays: dict[str, Any] = {name: array for name, array in {**GOOD, **change}.items() if array is not None}
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


def test_bad_npz_files(tmp_path: Path) -> None:
    path = tmp_path / "cut.npz"
    np.savez(path, **GOOD)
    cut_short(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a usable .npz data set: ")):
        load(str(path))
    archive = io.BytesIO()
    tarfile.open(fileobj=archive, mode="w").close()
    for content in (b"", b"text", archive.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}: not a usable .npz data set: ")):
            load(str(path))
    np.save(tmp_path / "array.npy", IMAGES)
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a usable .npz data set: ")):
        load(str(path))
    with pytest.raises(FileNotFoundError, match=r"none.npz: no such file; expected an .npz file with the arrays"):
        load(str(tmp_path / "none.npz"))


def test_unknown_names_list_the_known_ones() -> None:
    assert {"cifar10", "digits", "fashion_mnist", "mnist"} <= set(datasets.names())
    known = f"known: {', '.join(datasets.names())}, or a path ending in .npz"
    with pytest.raises(ValueError, match=re.escape(f"load: unknown data set 'imagenet'; {known}")):
        load("imagenet")
