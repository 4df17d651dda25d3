"""Random calls, threads and interrupts: no hang, no wrong sum, no crash. benchmarks/stress.py makes them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.single

STRESS = Path(__file__).resolve().parent.parent / "benchmarks" / "stress.py"
SPEC = importlib.util.spec_from_file_location("stress_steps", STRESS.with_name("stress_steps.py"))
assert SPEC is not None and SPEC.loader is not None
steps: Any = importlib.util.module_from_spec(SPEC)
sys.modules["stress_steps"] = steps
SPEC.loader.exec_module(steps)


def run(clean_environment, tmp_path: Path, calls: int, ranks: int, **environment: str) -> None:
    kept = tmp_path / "stress.json"
    arguments = ["--calls", str(calls), "--ranks", str(ranks), "--json", str(kept)]
    done = subprocess.run(
        [sys.executable, STRESS, *arguments],
        env=clean_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(kept.read_text(encoding="utf-8"))
    assert result["failures"] == []
    assert result["steps"] == calls
    # It was no idle run.
    assert {"right", "MismatchError", "PeerError", "RuntimeError", "KeyboardInterrupt"} <= set(result["outcomes"])


@pytest.mark.timeout(300)
def test_a_short_stress_run(clean_environment, tmp_path):
    run(clean_environment, tmp_path, 60, 2)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("ranks", "native"), [(2, ""), (3, ""), (4, ""), (3, "0")])
def test_10000_calls(clean_environment, tmp_path, ranks: int, native: str):
    run(clean_environment, tmp_path, 10_000, ranks, **({"BITRING_NATIVE": native} if native else {}))


def test_a_step_is_the_same_again_and_all_kinds_come():
    drawn = [steps.draw(0, number, 3) for number in range(2000)]
    assert drawn == [steps.draw(0, number, 3) for number in range(2000)]
    assert {step.kind for step in drawn} == set(steps.KINDS)
    assert {call.function for step in drawn for calls in step.rounds for call in calls} == set(steps.FUNCTIONS)


Call = steps.Call


@pytest.mark.parametrize(
    ("calls", "outcomes"),
    [
        ([Call("Allreduce")] * 2, [("right",)] * 2),
        ([Call("Allreduce"), Call("Allreduce", op="MAX")], [("MismatchError",)] * 2),
        ([Call("Allreduce"), Call("Allgather")], [("MismatchError",)] * 2),
        ([Call("Allreduce"), Call("Allreduce", bad="short")], [("PeerError",), steps.OWN]),
        ([Call("Bcast"), Call("Reduce", bad="root")], [("MismatchError",), steps.OWN]),
        ([Call("kept"), Call("kept", index=3)], [("MismatchError",)] * 2),
        ([Call("trainer", bad="nan")] * 2, [("NonFiniteError",)] * 2),
    ],
)
def test_what_each_rank_must_get(calls, outcomes):
    assert steps.expected(calls) == outcomes


def test_what_ranks_get_is_judged():
    step = steps.draw(0, next(n for n in range(100) if steps.draw(0, n, 2).kind == "legal"), 2)
    assert steps.judge(step, [["right"], ["right"]], True) == ""
    assert steps.judge(step, [["right"], ["wrong: [1], not [2]"]], True) == "rank 1, round 0 should get right"
    assert steps.judge(step, [["TimeoutError: a wait"], ["right"]], True) == "rank 0, round 0 should get right"
