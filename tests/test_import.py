"""``import bitring`` is cheap: it starts no MPI and loads no library that is only needed later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bitring

pytestmark = pytest.mark.single

IMPORT = """
import json, sys, time
begin = time.perf_counter()
import bitring
seconds = time.perf_counter() - begin
heavy = ("mpi4py.MPI", "cupy", "matplotlib", "sklearn", "rich", "numba", "torch")
print(json.dumps([seconds, [name for name in heavy if name in sys.modules], dir(bitring)]))
"""


def imported() -> tuple[float, list[str], list[str]]:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=150, check=True)
    seconds, heavy, names = json.loads(done.stdout)
    return seconds, heavy, names


def test_import_is_quick_and_loads_nothing_heavy():
    runs = [imported() for _ in range(3)]
    assert runs[0][1] == []
    assert min(seconds for seconds, _, _ in runs) < 0.5


def test_dir_lists_what_can_be_had():
    names = imported()[2]
    assert {"Communicator", "DataParallel", "OneBit", "SGD", "allreduce", "plan_allreduce", "shard"} <= set(names)


@pytest.mark.parametrize("command", ["train", "doctor", "bench"])
def test_help_starts_no_mpi(command: str):
    code = (
        "import sys\nfrom bitring.__main__ import main\n"
        f"sys.argv = ['bitring', {command!r}, '--help']\n"
        "try:\n    main()\nfinally:\n    assert 'mpi4py.MPI' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: bitring" in done.stdout


def test_a_file_holds_one_idea() -> None:
    """No Python file of the library is above 400 lines."""
    library = Path(bitring.__file__).parent
    files = [Path(folder) / name for folder, _, names in os.walk(library, followlinks=True) for name in names]
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files if file.suffix == ".py"}
    assert len(lengths) > 100
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
