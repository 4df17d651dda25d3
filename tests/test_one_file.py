"""A new algorithm, encoder, reducer, mode, optimizer, model and data set are one file each: found, tested and run.

The files in tests/one_file/, KIND_NAME.py, go into a copy of the library as NAME.py, and nothing else is edited.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitring
from bitring.native import native

pytestmark = pytest.mark.single

TESTS = Path(__file__).parent
ROOMS = {
    "algorithm": "collectives/algorithms",
    "encoder": "compression/encoders",
    "reducer": "compression/reducers",
    "mode": "training/modes",
    "optimizer": "training/optimizers",
    "model": "models/networks",
    "dataset": "models/datasets",
}
FILES = sorted((TESTS / "one_file").glob("*.py"))
NEW = {file.stem.partition("_")[0]: file.stem.partition("_")[2] for file in FILES}

# An editable installation finds the original before PYTHONPATH is looked at.
FIND_THE_COPY = """import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the library and the new files."""
    folder = tmp_path_factory.mktemp("copy")
    source = Path(str(bitring.__file__)).resolve().parent
    shutil.copytree(source, folder / "bitring", ignore=shutil.ignore_patterns("__pycache__"))
    module: Any = native()
    if module is not None:
        extension = Path(module.__file__)
        if not (folder / "bitring" / extension.name).exists():
            (folder / "bitring" / extension.name).symlink_to(extension)
    for file in FILES:
        kind, _, name = file.stem.partition("_")
        shutil.copy(file, folder / "bitring" / ROOMS[kind] / f"{name}.py")
    (folder / "sitecustomize.py").write_text(FIND_THE_COPY, encoding="utf-8")
    return folder


@pytest.fixture
def environment(copy: Path) -> dict[str, str]:
    """The bytecode and kernels of the library as it is are taken from where they are."""
    return {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}


def test_each_kind_has_a_file_of_at_most_60_lines() -> None:
    assert set(NEW) == set(ROOMS)
    assert all(len(file.read_text(encoding="utf-8").splitlines()) <= 60 for file in FILES)


@pytest.mark.timeout(300)
def test_the_registry_tests_find_and_pass_them(
    environment: dict[str, str], clean_environment: Callable[..., dict[str, str]]
) -> None:
    files = ["schedule", "encoders", "reducers", "modes", "optimizers", "models", "compressor"]
    words = [name for kind, name in NEW.items() if kind not in ("encoder", "reducer", "dataset")]
    words += [name.title().replace("_", "") for kind, name in NEW.items() if kind in ("encoder", "reducer")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " or ".join(words)]
        + [str(TESTS / f"test_{name}.py") for name in files],
        env=clean_environment(**environment),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 60, done.stdout


@pytest.mark.timeout(300)
def test_train_predict_and_bench_run_them(
    environment: dict[str, str], on_ranks: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    def run(ranks: int, *arguments: str) -> str:
        done = on_ranks(ranks, "-m", "bitring", *arguments, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    trained = ("--model", NEW["model"], "--data", NEW["dataset"], "--epochs", "8", "--mode", NEW["mode"])
    trained += ("--batch", "16", "--lr", "0.01")
    for kind in ("encoder", "reducer"):
        more = ("--optimizer", NEW["optimizer"], "--algorithm", NEW["algorithm"], "--compression", NEW[kind])
        run(2, "train", *trained, *more, "--warmup-steps", "2", "--output", kind)
        summary = json.loads((tmp_path / kind / "summary.json").read_text(encoding="utf-8"))
        assert summary["compression"] == NEW[kind] and summary["mode"] == NEW["mode"]
        assert summary["algorithm"] == NEW["algorithm"] and summary["ranks"] == 2
        assert summary["bytes_sent"] > 0 and summary["test_accuracy"] > 1 / 4
    kept = ("--json", "machine.json", "--values", "20000", "--samples", "1", "--dtype", "float32")
    assert f"{NEW['encoder']} encode" in run(1, "bench", "compress", *kept, "--compressors", NEW["encoder"])
    predicted = run(1, "predict", "--model", NEW["model"], "--ranks", "4", "--bandwidth", "1Gbit")
    assert re.search(rf"^{NEW['encoder']} ", predicted, re.MULTILINE), predicted
    machine = run(
        1, "predict", "--model", NEW["model"], "--ranks", "4", "--bandwidth", "1Gbit", "--machine", "machine.json"
    )
    assert re.search(rf"^{NEW['encoder']} ", machine, re.MULTILINE), machine
