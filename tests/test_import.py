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
import json, sys
before = len(sys.modules)
import bitring
count = len(sys.modules) - before
heavy = ("mpi4py.MPI", "cupy", "matplotlib", "sklearn", "rich", "numba", "torch")
print(json.dumps([count, [name for name in heavy if name in sys.modules], dir(bitring)]))
"""


def imported() -> tuple[int, list[str], list[str]]:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=150, check=True)
    count, heavy, names = json.loads(done.stdout)
    return count, heavy, names


def test_import_is_quick_and_loads_nothing_heavy():
    count, heavy, _ = imported()
    assert heavy == []
    assert count < 100  # modules, Python's own among them


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
