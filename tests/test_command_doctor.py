"""``bitring doctor``: right where all is well, and clear where it is not."""

from __future__ import annotations

import io
import os
import re
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitring import __main__
from bitring.commands._findings import Finding, show_plainly

pytestmark = pytest.mark.single


def rows(output: str) -> dict[str, str]:
    """The table's text by check, joined over its lines."""
    found: dict[str, str] = {}
    last = ""
    for line in output.splitlines():
        cells = [cell.strip() for cell in re.split("[│|]", line)]
        if len(cells) < 4:
            continue
        last = cells[1] or last
        found[last] = " ".join(filter(None, [found.get(last, ""), *cells[2:]]))
    return found


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch):
    """A run of the command on one rank, and what makes it worse."""

    def run() -> tuple[int, dict[str, str], str]:
        result = CliRunner().invoke(__main__._bitring, ["doctor"], prog_name="bitring")
        return result.exit_code, rows(result.output), result.output

    return run, monkeypatch


def test_two_ranks(on_ranks):
    done = on_ranks(2, "-m", "bitring", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bitring doctor:") == 1  # rank 0 alone prints
    found = rows(done.stdout)
    assert found["ranks"] == "ok 2"
    assert found["thread level"] == "ok multiple"
    assert re.match(r"ok ranks 0-1: cores .*, \d+ threads? per rank", found["node 0"]), found["node 0"]
    for name in ("ring", "mpi", "binomial_tree", "double_binary_tree", "recursive_doubling", "rabenseifner", "onebit"):
        assert found[f"allreduce {name}"].startswith("ok right on all ranks"), found
    assert re.search(r"µs for 8 bytes, [\d.]+ GB/s for 4 MiB", found["rank 0 to 1"])
    assert {"MPI library", "/dev/shm", "open files", "locked memory", "kernel cache", "CUDA-aware MPI"} <= set(found)
    assert "all checks passed" in done.stdout


def test_mpich_under_a_launcher_that_it_does_not_know(clean_environment):
    try:
        number = version("mpich")
    except PackageNotFoundError:
        pytest.skip("the MPI library is not MPICH's wheel")
    environment = clean_environment(PMIX_NAMESPACE="prterun-1@1", PMIX_RANK="0", OMPI_COMM_WORLD_RANK="0")
    command = [sys.executable, "-m", "bitring", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "bitring: these ranks were started by Open MPI's mpirun, or otherwise through PMIx, and "
        f"MPICH {number} does not know it: start them by {sys.prefix}/bin/mpirun, or srun --mpi=pmi2"
    )
    others = subprocess.run(
        command,
        env=environment | {"OMPI_COMM_WORLD_RANK": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert "bitring:" not in others.stderr


def test_a_wrong_sum_fails(doctor):
    from bitring.commands import _doctor_self_test

    run, monkeypatch = doctor

    def wrong(*arguments: object, **options: object):
        plan = right(*arguments, **options)
        if options.get("algorithm") == "ring":
            x = arguments[0]
            x += 1  # pyright: ignore
        return plan

    right = _doctor_self_test.plan_allreduce
    monkeypatch.setattr(_doctor_self_test, "plan_allreduce", wrong)
    status, found, output = run()
    assert status == 1
    assert found["allreduce ring"].startswith("FAIL rank 0: the sum of 1 values is off by 1"), output
    assert found["allreduce mpi"].startswith("ok")
    assert "1 check failed" in output


def test_a_low_thread_level_is_explained(doctor):
    from mpi4py import MPI

    run, monkeypatch = doctor
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SINGLE)
    status, found, _ = run()
    assert status == 0
    assert "note single: a started plan or request moves only while it is waited for" in found["thread level"]
    assert "unset MPI4PY_RC_THREAD_LEVEL" in found["thread level"]


def test_processes_that_do_not_know_each_other(on_ranks):
    """As they come from the mpirun of another MPI library than the one that mpi4py has loaded."""
    done = on_ranks(1, "-m", "bitring", "doctor", env={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"})
    assert done.returncode == 1
    assert "4 processes were started, and each takes itself for the only one" in done.stdout
    other = on_ranks(1, "-m", "bitring", "doctor", env={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"})
    assert (other.returncode, other.stdout) == (1, "")


def test_small_shared_memory_and_few_files_are_noted(doctor):
    run, monkeypatch = doctor
    real = os.statvfs("/dev/shm")

    class Small:
        f_frsize, f_blocks, f_bavail = real.f_frsize, (64 << 20) // real.f_frsize, (60 << 20) // real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
    status, found, output = run()
    assert status == 0, output
    assert found["/dev/shm"].startswith("note 64 MiB, too small")
    assert "--shm-size=1g" in found["/dev/shm"]
    assert found["open files"].startswith("note 256")
    assert "ulimit -n 4096" in found["open files"]


def test_a_cache_that_cannot_be_written(doctor, tmp_path):
    run, monkeypatch = doctor

    def refuse(self: object, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    status, found, _ = run()
    assert status == 0
    assert found["kernel cache"].startswith("note cannot be written")
    assert "NUMBA_CACHE_DIR" in found["kernel cache"]


def test_a_cache_that_others_can_write_to(doctor, tmp_path, monkeypatch):
    run, _ = doctor
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    status, found, _ = run()
    assert status == 0
    assert "open to every user, who can write to" in found["kernel cache"]
    assert "mkdir -m 700" in found["kernel cache"]


@pytest.mark.parametrize(
    ("asked", "works", "status", "text"),
    [
        (True, True, "ok", "a message between device buffers arrived"),
        (True, False, "FAIL", "set BITRING_CUDA_AWARE=0"),
        (False, True, "note", "BITRING_CUDA_AWARE=1 saves the staging"),
        (False, False, "ok", "staged through pinned memory"),
    ],
)
def test_the_cuda_probe(monkeypatch, asked: bool, works: bool, status: str, text: str):
    """The child is replaced by one that only ends well or badly: there need be no GPU."""
    from bitring.commands import _doctor_cuda

    monkeypatch.setattr(_doctor_cuda, "_devices", lambda: 2)
    monkeypatch.setattr(_doctor_cuda, "_PROBE", f"raise SystemExit({int(not works)})")
    finding = _doctor_cuda._probed(asked)
    assert finding.status == status
    assert text in f"{finding.text} {finding.advice}"


@pytest.mark.gpu
def test_the_cuda_probe_on_a_gpu():
    from bitring.collectives.interop.cuda_aware import cuda_aware
    from bitring.commands import _doctor_cuda

    finding = _doctor_cuda._probed(cuda_aware())
    assert finding.status != "FAIL", finding


def test_the_plain_table(capsys):
    show_plainly([Finding("what", "note", "found", "do this")])
    assert capsys.readouterr().out.splitlines() == [
        f"{'what':<28} note  found",
        f"{'':<34} → do this",
    ]


def test_a_locale_without_our_signs(monkeypatch: pytest.MonkeyPatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", plain)
        patch.setattr(sys, "argv", ["bitring", "doctor", "--help"])
        with pytest.raises(SystemExit):
            __main__.main()
        print("237 µs", flush=True)
    assert plain.buffer.getvalue().endswith(b"237 ?s\n")  # type: ignore[attr-defined]
