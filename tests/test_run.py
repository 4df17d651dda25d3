"""tests/run.py: what a hang or a lonely failure costs, and what it shows."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.single, pytest.mark.timeout(300)]
HERE = Path(__file__).resolve().parent


@pytest.fixture
def run_tests(tmp_path: Path, clean_environment: Callable[..., dict[str, str]]):
    """``run_tests(text, ranks)``: exit status, output and counts of tests/run.py on a test file with this text."""
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(HERE / "conftest.py", tests)
    shutil.copy(HERE.parent / "pyproject.toml", tmp_path)

    def run_tests(text: str, ranks: int, *options: str) -> tuple[int, str, str]:
        (tests / "test_inner.py").write_text(text, encoding="utf-8")
        command = [
            sys.executable,
            str(HERE / "run.py"),
            *options,
            str(ranks),
            str(tmp_path / "logs"),
            "tests/test_inner.py",
        ]
        done = subprocess.run(
            command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=280, check=False
        )
        return done.returncode, done.stdout + done.stderr, (tmp_path / "logs" / "result").read_text(encoding="utf-8")

    return run_tests


def test_a_run_goes_on_with_what_has_not_passed(run_tests, tmp_path: Path):
    text = f"""
from pathlib import Path
ran = Path({str(tmp_path / "ran")!r})
def test_passes():
    with ran.open("a") as file:
        file.write("passes ")
def test_fails_once():
    before = ran.read_text()
    ran.write_text(before + "fails ")
    assert "fails" in before
"""
    assert run_tests(text, 1)[2].split() == ["1", "1", "0"]
    status, output, counts = run_tests(text, 1, "--resume")
    assert (status, counts.split()) == (0, ["2", "0", "0"]), output
    assert (tmp_path / "ran").read_text() == "passes fails fails "
    status, output, counts = run_tests(text, 1, "--resume")
    assert (status, counts.split()) == (0, ["2", "0", "0"]), output
    assert (tmp_path / "ran").read_text() == "passes fails fails "


def test_in_a_shell_s_background_tests_can_be_interrupted(run_tests):
    """A shell has its background jobs ignore Ctrl-C, and those hand that on to whatever they start."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status, output, _ = run_tests(
            """
import os, signal, subprocess, sys, pytest
def test_here():
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
def test_in_a_process_that_a_test_starts():
    program = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == -signal.SIGINT
""",
            1,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 0, output


def test_a_hang_costs_its_limit_and_shows_the_stacks_of_all_ranks(run_tests):
    status, output, counts = run_tests(
        """
import time, pytest
def test_before(comm):
    comm.Barrier()
@pytest.mark.timeout(3)
def test_hangs(comm):
    if comm.rank == 0:
        comm.Barrier()  # stands here
    else:
        time.sleep(1000)  # and here
def test_after(comm):
    comm.Barrier()
""",
        2,
    )
    assert status == 1
    assert counts.split() == ["2", "1", "0"], output
    assert "FAILED tests/test_inner.py::test_hangs: did not end within 3 s" in output
    stacks = output.split("FAILED tests/test_inner.py::test_hangs")[1].split("----- rank ")
    assert 'test_inner.py", line 8 in test_hangs' in stacks[1], output
    assert 'test_inner.py", line 10 in test_hangs' in stacks[2], output


@pytest.mark.slow
def test_a_rank_that_raises_alone_is_shown_beside_the_one_that_waits_for_it(run_tests):
    status, output, counts = run_tests(
        """
import pytest
@pytest.mark.timeout(3)
def test_raises(comm):
    if comm.rank == 1:
        raise RuntimeError("rank one is unhappy")
    comm.Barrier()
def test_after(comm):
    comm.Barrier()
""",
        2,
    )
    assert status == 1
    assert counts.split() == ["1", "1", "0"], output
    stacks = output.split("FAILED tests/test_inner.py::test_raises")[1].split("----- rank ")
    assert 'test_inner.py", line 7 in test_raises' in stacks[1], output
    assert "RuntimeError: rank one is unhappy" in stacks[2], output


def test_a_failure_on_one_rank_is_a_failure_of_the_test(run_tests):
    status, output, counts = run_tests(
        """
def test_one_rank_fails(comm):
    assert comm.rank != 1, "only here"
def test_after(comm, agree):
    agree(comm, comm.rank == 0, "not me")
""",
        2,
    )
    assert status == 1
    assert counts.split() == ["0", "2", "0"], output
    assert "passed here, but: rank 1 failed" in output
    assert "AssertionError: only here" in output
    assert "rank 1: not me" in output


def test_a_process_that_dies_fails_its_test_only(run_tests):
    status, output, counts = run_tests("import os\ndef test_dies(): os._exit(3)\ndef test_after(): pass\n", 1)
    assert status == 1
    assert counts.split() == ["1", "1", "0"], output
    assert "FAILED tests/test_inner.py::test_dies" in output


@pytest.mark.slow
def test_a_file_that_does_not_import_is_a_failure(run_tests):
    status, output, counts = run_tests("import nonesuch\n", 1)
    assert status == 1
    assert counts.split() == ["0", "1", "0"], output
    assert "No module named 'nonesuch'" in output


@pytest.mark.slow
def test_all_is_well(run_tests):
    status, output, counts = run_tests("def test_well(comm): comm.Barrier()\n", 3)
    assert status == 0, output
    assert counts.split() == ["1", "0", "0"]
    assert output.count("1 passed") == 2, output  # rank 0's line and the runner's: the other ranks are quiet
