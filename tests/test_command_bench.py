"""``bitring bench allreduce``: right sums before times, and files that say where they were measured."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitring import __main__

pytestmark = pytest.mark.single
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object):
    return CliRunner().invoke(__main__._bitring, ["bench", "allreduce", *map(str, arguments)], prog_name="bitring")


def test_two_ranks(on_ranks, tmp_path: Path):
    kept, plot = tmp_path / "a.json", tmp_path / "a.png"
    arguments = ["--json", kept, "--plot", plot, "--sizes", "4,10KiB,1MiB", "--samples", "2"]
    done = on_ranks(2, "-m", "bitring", "bench", "allreduce", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(kept.read_text())
    assert plot.read_bytes()[:4] == b"\x89PNG"
    machine = results["machine"]
    assert machine["ranks"] == 2
    assert machine["nodes"] == 1
    assert machine["thread_level"] == "multiple"
    assert {"python", "mpi", "bitring", "mpi4py", "numpy", "numba"} <= set(machine["versions"])
    text = kept.read_text()
    assert socket.gethostname() not in text.replace(machine["processor"], "")
    assert "/" not in text

    from bitring.collectives.schedule import algorithms

    names = [*algorithms.names(), "library", "library out of place"]
    assert [(row["nbytes"], row["contender"]) for row in results["results"]] == [
        (nbytes, name) for nbytes in (4, 10240, 1 << 20) for name in names
    ]
    for row in results["results"]:
        assert len(row["samples"]) == 2
        assert row["seconds"] > 0
    by_size = [row for row in results["results"] if row["nbytes"] == 4 and row["contender"].startswith("library")]
    assert max(row["times_the_library"] for row in by_size) == 1
    assert len(done.stdout.splitlines()) == 2 + 3 * len(names)  # rank 0 alone prints


def test_one_rank():
    result = run("--sizes", "64", "--samples", "1", "--algorithms", "ring")
    assert result.exit_code == 0, result.output
    assert [line.split()[2] for line in result.output.splitlines()[2:]] == ["ring", "library", "library"]


def test_a_wrong_sum_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    from bitring.commands import _bench_allreduce

    monkeypatch.setattr(_bench_allreduce, "plan_allreduce", lambda x, comm, algorithm: lambda: x.__iadd__(1))
    result = run("--sizes", "64", "--samples", "1", "--algorithms", "ring")
    assert isinstance(result.exception, RuntimeError)
    assert str(result.exception) == "ring: a wrong sum of 16 values on rank 0"
    assert "ring  " not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "rnig"], "unknown algorithm 'rnig'; known: binomial_tree,"),
        (["--sizes", "4,x"], "expected sizes in bytes, such as 4,64KiB,1MiB; got 'x'"),
        (["--sizes", "0"], "expected sizes in bytes, such as 4,64KiB,1MiB; got '0'"),
        (["--plot", "a.jpeg2"], "--plot must end in .png, .svg or .pdf; got a.jpeg2"),
        (["--json", "/nowhere/a.json"], "/nowhere/a.json cannot be written: there is no folder /nowhere"),
    ],
)
def test_mistakes(arguments: list[str], message: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 4])
def test_twice_the_library_at_64_mib(on_ranks, tmp_path: Path, ranks: int):
    """In place, the portable executor, at mpi4py's default thread level, in the same run."""
    kept = tmp_path / "a.json"
    arguments = ["--json", kept, "--sizes", "64MiB", "--samples", "9"]
    done = on_ranks(ranks, "-m", "bitring", "bench", "allreduce", *arguments, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(kept.read_text())
    assert results["machine"]["thread_level"] == "multiple"
    seconds = {row["contender"]: row["seconds"] for row in results["results"]}
    assert seconds["library"] >= 2 * seconds["ring"], done.stdout


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_kept_results_show_it_too(ranks: int):
    results = json.loads((ROOT / "benchmarks" / "results" / f"allreduce-portable-{ranks}-ranks.json").read_text())
    assert results["machine"]["ranks"] == ranks
    assert results["machine"]["thread_level"] == "multiple"
    seconds = {row["contender"]: row["seconds"] for row in results["results"] if row["nbytes"] == 64 << 20}
    assert seconds["library"] >= 2 * seconds["ring"]
