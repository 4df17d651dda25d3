"""One rank dies, stops, leaves or is late: the others do not hang, and say which it was (benchmarks/faults.py)."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.single

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
faults: Any = importlib.import_module("faults")

USUAL = faults.Trial(
    fault="kill",
    moment="during",
    ranks=3,
    algorithm="auto",
    way="plan",
    compression=None,
    resident=False,
    values=1 << 20,
    victim=1,
    seconds=0.6,
    within=1e-3,
    late=2e-3,
)

TRIALS = {
    "killed": USUAL,
    "killed in a started ring": dataclasses.replace(USUAL, algorithm="ring", way="start", ranks=4, victim=2),
    "killed before the library's call": dataclasses.replace(USUAL, moment="before", algorithm="mpi", ranks=2, victim=0),
    "killed in a 1-bit exchange": dataclasses.replace(USUAL, compression="onebit", values=16, victim=0),
    "stopped": dataclasses.replace(USUAL, fault="stop", way="allreduce", values=16),
    "raised": dataclasses.replace(USUAL, fault="exception", way="allreduce", resident=True),
    "exited after": dataclasses.replace(USUAL, fault="exit", moment="after", way="function", values=16, victim=2),
    "exited in a tree": dataclasses.replace(
        USUAL, fault="exit", algorithm="double_binary_tree", way="start", ranks=4, victim=3, values=16, seconds=1.2
    ),
    "ended at once": dataclasses.replace(USUAL, fault="os_exit", way="allreduce", resident=True),
    "killed in a trainer": dataclasses.replace(USUAL, way="trainer", compression="onebit", values=16, victim=0),
    "stopped in a raw communicator": dataclasses.replace(USUAL, fault="stop", way="raw plan", values=16),
    "late": dataclasses.replace(USUAL, fault="delay", algorithm="rabenseifner", way="allreduce"),
}


@pytest.fixture(scope="module", autouse=True)
def mpich() -> None:
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    text = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout if mpirun else ""
    if "HYDRA" not in text:
        pytest.skip("needs the mpirun of MPICH, which can be told to let the others live")


@pytest.fixture(scope="module")
def under_way(mpich: None) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """All trials; they mostly wait, so several run at a time."""
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(faults.run_trial, trial) for name, trial in TRIALS.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRIALS)
def test_the_others_are_told(under_way, name: str):
    result = under_way[name].result()
    assert not result["wrong"], result


def test_a_list_of_trials_is_the_same_again_and_covers_all_pairs():
    trials = [trial for trial, _ in zip(faults.draw(0), range(600), strict=False)]
    assert trials == [trial for trial, _ in zip(faults.draw(0), range(600), strict=False)]
    met = {(t.fault, t.moment, t.algorithm) for t in trials}
    assert len(met) == len(faults.FAULTS) * len(faults.MOMENTS) * len(faults.algorithms())
    assert {(t.ranks, t.victim) for t in trials} == {(p, r) for p in faults.RANKS for r in range(p)}


def test_the_kept_trials():
    """Who is told of a death is told within 10 s, and of a rank that is stopped so long after the timeout."""
    kept = json.loads((BENCHMARKS / "results" / "faults.json").read_text())["trials"]
    assert len(kept) == 600
    for trial in kept:
        limit = 10 + (faults.TIMEOUT if trial["fault"] == "stop" else 0)
        assert not trial["wrong"] and (trial["told_seconds"] or 0) < limit, trial


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_600_faults(tmp_path):
    results = faults.run_trials(600, 0, tmp_path / "faults.json", jobs=2)
    assert len(results) == 600
    assert [result for result in results if result["wrong"]] == []
