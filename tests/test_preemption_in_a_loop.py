"""The loop in docs/training.md that saves when it is to end, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

DOCS = Path(__file__).resolve().parent.parent / "docs" / "training.md"

# Runs the script in two folders; in the second the last rank gets signals, and all are started again.
RUNS = """
import os, runpy, signal, sys
from mpi4py import MPI
from bitring.training.data_parallel import DataParallel

step, moments = DataParallel.step, []

def disturbed(self, *arguments, **named):
    step(self, *arguments, **named)
    if self.steps in moments and self.rank == self.size - 1:
        signal.raise_signal(signal.SIGUSR1)

DataParallel.step = disturbed
for folder, runs in (("whole", [[]]), ("parts", [[6], [22], []])):
    os.chdir(os.path.join(sys.argv[1], folder))
    for moments in runs:
        code = 0
        try:
            runpy.run_path(sys.argv[2], run_name="__main__")
        except SystemExit as end:
            code = end.code
        assert code == (75 if moments else 0), (folder, moments, code)
        MPI.COMM_WORLD.Barrier()
"""


@pytest.mark.timeout(300)
def test_the_script_goes_on_where_it_was_ended(on_ranks, tmp_path: Path):
    (block,) = re.findall(r"^```python\n(import sys.*?)^```", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    script = tmp_path / "preempted.py"
    script.write_text(block, encoding="utf-8")
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    done = on_ranks(2, "-c", RUNS, tmp_path, script, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, parts = done.stdout.splitlines()
    assert whole == parts
    assert whole.startswith("trained to ")
