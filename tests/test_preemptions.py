"""Preempted at random moments, a training ends as an undisturbed one. benchmarks/preemptions.py preempts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

PREEMPTIONS = Path(__file__).resolve().parent.parent / "benchmarks" / "preemptions.py"


def preempted(clean_environment, tmp_path: Path, count: int, epochs: int) -> None:
    kept = tmp_path / "preemptions.json"
    done = subprocess.run(
        [sys.executable, PREEMPTIONS, "--count", str(count), "--epochs", str(epochs), "--json", str(kept)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [event["kind"] for run in json.loads(kept.read_text())["runs"] for event in run["events"]]
    assert sorted(kinds) == ["kill"] * count + ["signal"] * count


@pytest.mark.timeout(300)
def test_a_signal_and_a_kill(clean_environment, tmp_path):
    preempted(clean_environment, tmp_path, 1, 8)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred(clean_environment, tmp_path):
    preempted(clean_environment, tmp_path, 100, 20)
