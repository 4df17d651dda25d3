"""``bitring bench allreduce``: right sums before times, and files that say where they were measured."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitring import __main__
from bitring.collectives.schedules.schedule import algorithms
from bitring.native import native

pytestmark = pytest.mark.single
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object):
    return CliRunner().invoke(__main__._bitring, ["bench", "allreduce", *map(str, arguments)], prog_name="bitring")


SIZES = (4, 10240, 1 << 20)
TORCH = importlib.util.find_spec("torch") is not None


def contenders(nbytes: int, *levels: str) -> list[str]:
    elsewhere = {"multilane", "leaders", *(["shared_memory"] if native() is None else [])}
    own = [name for name in algorithms.names() if name not in elsewhere]
    library = [f"{name}, {level}" for level in levels for name in ("library", "library out of place")]
    limit = native() is not None and nbytes >= 64 << 10
    return [*own, "auto, resident", "auto", "plain call", *library, *["gloo"] * TORCH, *["limit"] * limit]


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

    assert results["remarks"] == ([] if TORCH else ["no gloo: PyTorch is not installed"])
    shown = {nbytes: [row["contender"] for row in results["results"] if row["nbytes"] == nbytes] for nbytes in SIZES}
    assert shown == {nbytes: contenders(nbytes, "multiple", "single") for nbytes in SIZES}
    for row in results["results"]:
        assert len(row["samples"]) == 2
        assert row["seconds"] > 0
        assert row["best_of_the_library"].startswith("library")
    for nbytes in SIZES:
        rows = [row for row in results["results"] if row["nbytes"] == nbytes]
        library = [row for row in rows if row["contender"].startswith("library")]
        assert len(library) == 4
        best = min(library, key=lambda row: row["seconds"])
        assert {row["best_of_the_library"] for row in rows} == {best["contender"]}
        for row in rows:
            assert row["times_the_library"] == pytest.approx(best["seconds"] / row["seconds"])
    for row in results["results"]:
        assert (row["of_the_limit"] is not None) == ("limit" in shown[row["nbytes"]])
        assert row["contender"] != "limit" or row["of_the_limit"] == 1
    assert done.stdout.count("(best)") == 3
    assert len(done.stdout.splitlines()) == 2 + (not TORCH) + sum(map(len, shown.values()))  # rank 0 alone prints


@pytest.mark.skipif(native() is None, reason="the rest is the same without the native engine")
def test_other_types_and_another_thread_level(on_ranks, tmp_path: Path):
    kept = tmp_path / "a.json"
    arguments = ["--json", kept, "--sizes", "128KiB", "--samples", "1", "--dtype", "float16,bfloat16,int32"]
    env = {"MPI4PY_RC_THREAD_LEVEL": "single"}
    done = on_ranks(3, "-m", "bitring", "bench", "allreduce", *arguments, "--algorithms", "ring", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(kept.read_text())["results"]
    own = ["ring", "auto, resident", "auto", "plain call"]
    levels = ("single", "multiple")
    library = [f"{name}, {level}" for level in levels for name in ("library", "library out of place")]
    assert [(row["dtype"], row["contender"]) for row in rows] == [
        *(("float16", name) for name in [*own, "limit"]),
        *(("bfloat16", name) for name in [*own, "limit"]),
        *(("int32", name) for name in [*own, *library, "limit"]),
    ]
    assert {row["times_the_library"] for row in rows if row["dtype"] != "int32"} == {None}


def test_the_other_job_cannot_be_started(on_ranks, tmp_path: Path):
    code = (
        "import sys\nfrom bitring.__main__ import main\nfrom bitring.commands import _other_level\n"
        "_other_level._launcher = lambda size: (['false'], {})\n"
        "sys.argv = 'bitring bench allreduce --sizes 64 --samples 1 --algorithms ring'.split()\nmain()"
    )
    done = on_ranks(2, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "no library at thread level single: false ended with status 1" in done.stdout
    assert done.stdout.count("library") > 2


def test_one_rank():
    result = run("--sizes", "64", "--samples", "1", "--algorithms", "ring")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if line.startswith("      64 B")]
    assert [row.split()[2] for row in rows][:2] == ["ring", "auto,"]
    assert sum("library" in row for row in rows) in (2, 4)  # without a launcher, there is one thread level


class Broken:
    """A plan whose sum is wrong."""

    def __init__(self, x, algorithm: str) -> None:
        self.x, self.algorithm = x, algorithm

    def __call__(self) -> None:
        self.x += 1

    def free(self) -> None:
        pass


def test_a_wrong_sum_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    from bitring.commands import _bench_allreduce

    monkeypatch.setattr(_bench_allreduce, "plan_allreduce", lambda x, comm, algorithm: Broken(x, algorithm))
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
        (["--dtype", "float12"], "--dtype must name numeric types, such as float32 or bfloat16; got 'float12'"),
        (["--dtype", "float32,str"], "--dtype must name numeric types, such as float32 or bfloat16; got 'str'"),
        (["--plot", "a.jpeg2"], "--plot must end in .png, .svg or .pdf; got a.jpeg2"),
        (["--json", "/nowhere/a.json"], "/nowhere/a.json cannot be written: there is no folder /nowhere"),
    ],
)
def test_mistakes(arguments: list[str], message: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def bench(on_ranks, ranks: int, folder: Path, *arguments: str) -> tuple[dict[tuple[str, int, str], dict], str]:
    """Results by type, size and contender, and what was printed."""
    kept = folder / "a.json"
    done = on_ranks(ranks, "-m", "bitring", "bench", "allreduce", "--json", kept, *arguments, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(kept.read_text())
    assert results["machine"]["thread_level"] == "multiple"
    return {(row["dtype"], row["nbytes"], row["contender"]): row for row in results["results"]}, done.stdout


needs_native = pytest.mark.skipif(native() is None, reason="the native engine is not used")


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_native
def test_two_ranks_against_the_library(on_ranks, tmp_path: Path):
    """At every power of four, against the better of two thread levels, in place or not, in the same run."""
    found, shown = bench(on_ranks, 2, tmp_path, "--algorithms", "shared_memory")
    sizes = sorted({nbytes for _, nbytes, _ in found})
    assert sizes == [4**k for k in range(1, 15)]
    wrong: list[str] = []

    def hold(ok: bool, claim: str) -> None:
        if not ok:
            wrong.append(claim)

    for nbytes in sizes:
        row = {name: found["float32", nbytes, name] for _, size, name in found if size == nbytes}
        least = 1.0 if nbytes < 256 << 10 else 3.0 if nbytes <= 16 << 20 else 2.3
        resident, call = row["auto, resident"], row["plain call"]
        hold(
            resident["times_the_library"] >= least, f"resident, {nbytes}: {resident['times_the_library']:.2f} < {least}"
        )
        library = row[call["best_of_the_library"]]["seconds"]
        if nbytes >= 64 << 10:
            hold(call["times_the_library"] >= 1, f"plain call, {nbytes}: {call['times_the_library']:.2f} < 1")
        else:
            hold(
                call["seconds"] <= library + 2e-6, f"plain call, {nbytes}: {call['seconds']:.2e} > {library:.2e} + 2 us"
            )
        if nbytes >= 64 << 20:
            hold(resident["of_the_limit"] >= 0.8, f"resident, {nbytes}: {resident['of_the_limit']:.0%} of the limit")
    private = found["float32", 64 << 20, "auto"]["times_the_library"]
    hold(private >= 1.5, f"private, 64 MiB: {private:.2f} < 1.5")
    at_default = found["float32", 64 << 20, "library, multiple"]["seconds"]
    hold(at_default >= 5 * found["float32", 64 << 20, "auto, resident"]["seconds"], "5x the library's default level")
    blocking = min(
        found["float32", 4, name]["seconds"] for _, n, name in found if n == 4 and name.startswith("library")
    )
    hold(found["float32", 4, "auto"]["seconds"] <= 1.3 * blocking, "a plan's call at 4 B")
    assert not wrong, "\n".join([*wrong, shown])


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_native
def test_four_ranks_against_the_library(on_ranks, tmp_path: Path):
    found, shown = bench(on_ranks, 4, tmp_path, "--algorithms", "shared_memory")
    ratios = {nbytes: row["times_the_library"] for (_, nbytes, name), row in found.items() if name == "auto, resident"}
    assert min(ratios.values()) >= 1, shown
    assert ratios[64 << 20] >= 4, shown


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_native
def test_sixteen_bits_take_less_than_thirty_two(on_ranks, tmp_path: Path):
    sizes = ["--sizes", "32MiB,64MiB", "--algorithms", "shared_memory"]
    found, shown = bench(on_ranks, 2, tmp_path, *sizes, "--dtype", "float32,float16,bfloat16")
    name = "auto, resident"
    for dtype in ("float16", "bfloat16"):
        assert found["float32", 64 << 20, name]["seconds"] >= 1.7 * found[dtype, 32 << 20, name]["seconds"], shown


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed")
@needs_native
def test_eight_times_gloo(on_ranks, tmp_path: Path):
    found, shown = bench(on_ranks, 2, tmp_path, "--sizes", "64MiB", "--algorithms", "shared_memory")
    gloo, ours = found["float32", 64 << 20, "gloo"], found["float32", 64 << 20, "auto, resident"]
    assert gloo["seconds"] >= 8 * ours["seconds"], shown


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_kept_results_show_it_too(ranks: int):
    results = json.loads((ROOT / "benchmarks" / "results" / f"allreduce-portable-{ranks}-ranks.json").read_text())
    assert results["machine"]["ranks"] == ranks
    assert results["machine"]["thread_level"] == "multiple"
    seconds = {row["contender"]: row["seconds"] for row in results["results"] if row["nbytes"] == 64 << 20}
    assert seconds["library"] >= 2 * seconds["ring"]
