"""Very many operations leave a process as large as it was. benchmarks/soak.py does them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

SOAK = Path(__file__).resolve().parent.parent / "benchmarks" / "soak.py"


def soak(clean_environment, tmp_path: Path, small: int, mixed: int, stores: int) -> None:
    kept = tmp_path / "soak.json"
    arguments = ["--small", str(small), "--mixed", str(mixed), "--stores", str(stores), "--json", str(kept)]
    done = subprocess.run(
        [sys.executable, SOAK, *arguments], env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(kept.read_text(encoding="utf-8"))
    assert result["grown"] == []
    assert [phase["ranks"][0][-1]["operations"] for phase in result["phases"]] == [small, mixed, stores]
    assert min(result["checks"]) > 0


@pytest.mark.timeout(300)
def test_a_short_soak(clean_environment, tmp_path):
    soak(clean_environment, tmp_path, 4_000, 400, 100)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_soak(clean_environment, tmp_path):
    soak(clean_environment, tmp_path, 1_000_000, 100_000, 10_000)
