"""Machine code on disk: damaged, unreadable and foreign files are compiled again, replaced, and told of once."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from bitring import kernel_cache
from bitring.kernel_cache import with_cache

pytestmark = pytest.mark.single


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is, and a module of functions that are to be compiled."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "toy.py").write_text("def twice(x):\n    return x * 2\n\ndef thrice(x):\n    return x * 3\n")
    return tmp_path


def fresh(folder: Path, name: str = "twice") -> Any:
    """The function as a new process has it: nothing loaded yet, nothing told yet."""
    kernel_cache._damage_told.clear()
    kernel_cache._tell_compiling.cache_clear()
    spec = importlib.util.spec_from_file_location("toy", folder / "toy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    return with_cache(numba.njit(function), function)


def files(folder: Path, suffix: str) -> list[Path]:
    found = sorted((folder / "cache").rglob(f"*.{suffix}"))
    assert found
    return found


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def hole(file: Path) -> None:
    """As a dying node leaves them: the size is right, a block is not."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)


def garbage(file: Path) -> None:
    file.write_bytes(b"no pickle")


def folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [truncate, empty, hole, garbage])
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_file_is_replaced(folder: Path, damage: Callable[[Path], None], suffix: str, caplog):
    assert fresh(folder)(3) == 6
    for file in files(folder, suffix):
        damage(file)
    with caplog.at_level(logging.INFO, "bitring.kernels"):
        again = fresh(folder)
        assert (again(3), again(1.5)) == (6, 3.0)  # the second signature reads the index once more
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, warnings
    assert "damaged: compiling again, and replacing " in warnings[0]
    assert f".{suffix} (" in warnings[0]
    caplog.clear()
    with caplog.at_level(logging.INFO, "bitring.kernels"):
        loaded = fresh(folder)
        assert loaded(3) == 6
    assert sum(loaded.stats.cache_hits.values()) == 1
    assert caplog.records == []


def test_an_index_that_cannot_be_read_nor_replaced(folder: Path, caplog):
    assert fresh(folder)(3) == 6
    folder_in_its_place(files(folder, "nbi")[0])
    assert fresh(folder)(3) == 6
    assert "IsADirectoryError" in caplog.text


def test_a_cache_of_another_numba_is_replaced_silently(folder: Path, caplog):
    assert fresh(folder)(3) == 6
    for file in files(folder, "nbi"):
        file.write_bytes(pickle.dumps("0.1.0") + b"\x80\x7fwhat another version understands")
    assert fresh(folder)(3) == 6
    loaded = fresh(folder)
    assert loaded(3) == 6
    assert sum(loaded.stats.cache_hits.values()) == 1
    assert not [record for record in caplog.records if record.levelno > logging.INFO]  # but that kernels compile


def test_what_fits_another_installation_only_is_compiled_again(folder: Path, caplog, monkeypatch):
    assert fresh(folder)(3) == 6
    refused = []

    def refuse(*_: object) -> None:
        refused.append(True)
        raise AttributeError("module 'numba' has no attribute 'gone'")

    again = fresh(folder)
    monkeypatch.setattr(again._cache._impl, "rebuild", refuse)
    assert again(3) == 6
    assert refused
    assert "AttributeError" in caplog.text


def test_two_processes_that_number_their_files_alike(folder: Path):
    """Each saved its index before the other's could be read: one index, and the data file of the other."""
    assert fresh(folder)(3) == 6
    data = files(folder, "nbc")[0]
    of_integers = data.read_bytes()
    data.unlink()
    files(folder, "nbi")[0].unlink()
    assert fresh(folder)(1.5) == 3.0
    assert files(folder, "nbc") == [data]
    data.write_bytes(of_integers)
    assert fresh(folder)(1.5) == 3.0
    assert fresh(folder)(3) == 6


def test_a_full_disk(folder: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache._Files, "_dump", refuse)
        assert fresh(folder)(3) == 6
    assert not list((folder / "cache").rglob("*.nbc"))
    assert fresh(folder)(3) == 6
    assert files(folder, "nbc")


def test_compiling_is_told_once_loading_never(folder: Path, caplog):
    with caplog.at_level(logging.INFO, "bitring.kernels"):
        first = fresh(folder)
        assert (first(3), first(1.5)) == (6, 3.0)
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["compiling kernels"]
        caplog.clear()
        assert fresh(folder)(3) == 6
        assert caplog.records == []


@pytest.mark.parametrize(
    ("mode", "who"), [(0o700, None), (0o755, None), (0o1777, "every user"), (0o777, "every user"), (0o775, "group")]
)
def test_who_else_can_write_to_the_cache(tmp_path: Path, monkeypatch, mode: int, who: str | None):
    monkeypatch.setattr(kernel_cache, "_private", lambda group: False)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    found = kernel_cache.open_to(tmp_path / "cache")
    assert found is None if who is None else str(found).startswith(who)
    inside = tmp_path / "cache" / "inside"
    inside.mkdir()
    # Nobody replaces another's folder where the sticky bit is set.
    found = kernel_cache.open_to(inside)
    assert found is None if who is None or mode == 0o1777 else str(found).startswith(who)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_user_s_folder(tmp_path: Path):
    os.chown(tmp_path, 65534, 65534)
    assert str(kernel_cache.open_to(tmp_path)) == f"user nobody, who owns {tmp_path}"


ONEBIT = """
import numpy as np
from bitring.compression.encoders.onebit import OneBit
residual, payload = np.zeros(3, np.float32), np.zeros(9, np.uint8)
OneBit().encode(np.array([1, -2, 3], np.float32), residual, payload)
print(*payload[:8].view(np.float32), payload[8], *residual)
"""


def test_a_compressor_outlives_its_damaged_cache(tmp_path: Path, clean_environment: Callable[..., dict[str, str]]):
    said = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", ONEBIT],
            env=clean_environment(NUMBA_CACHE_DIR=str(tmp_path)),
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "-2.0 2.0 5 -1.0 0.0 1.0\n"), done.stderr
        said.append(done.stderr.count("damaged"))
        if len(said) == 1:
            for file in tmp_path.rglob("*.nb[ci]"):
                truncate(file)
    assert said == [0, 1, 0]
