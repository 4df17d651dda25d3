"""The shell scripts: checked by a linter, and what they do around the commands that they start."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.single
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    script
    for script in (*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci" / "run")
    if not script.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3")
]

# Stands in for an interpreter: answers questions as the real one, and only writes down what pip is asked to install.
STUB_PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv")
    for last; do :; done
    mkdir -p "$last/bin" && cp "$0" "$last/bin/python"
    printf '#!/bin/sh\\necho "mpirun $*"\\n' >"$last/bin/mpirun" && chmod +x "$last/bin/mpirun" ;;
"-m pip") echo "$*" >>"$PIP_LOG"; exit "${PIP_STATUS:-0}" ;;
*) exec REAL "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, clean_environment: Callable[..., dict[str, str]]):
    """``checkout(**variables)`` runs quickstart in a copy, ``checkout.folder``, with a stub for Python."""

    class Checkout:
        folder = tmp_path / "copy"
        python = tmp_path / "python3"
        log = tmp_path / "pip.log"

        @property
        def installs(self) -> list[str]:
            return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []

        def __call__(self, **variables: str) -> subprocess.CompletedProcess[str]:
            environment = clean_environment(**{"PYTHON": str(self.python), "PIP_LOG": str(self.log), **variables})
            return subprocess.run(
                [str(self.folder / "scripts" / "quickstart")],
                env=environment,
                capture_output=True,
                text=True,
                timeout=150,
                check=False,
            )

    checkout = Checkout()
    shutil.copytree(ROOT / "scripts", checkout.folder / "scripts")
    for name in ("pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, checkout.folder)
    shutil.copytree(ROOT / "collectives" / "native", checkout.folder / "collectives" / "native")
    checkout.python.write_text(STUB_PYTHON.replace("REAL", sys.executable), encoding="utf-8")
    checkout.python.chmod(0o755)
    return checkout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script: Path):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=150, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert shellcheck is not None, "the test extra brings shellcheck"
    command = [shellcheck, "--external-sources", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_that_are_started_are_executable():
    for script in SCRIPTS:
        if script.name != "environment.sh":
            assert script.stat().st_mode & stat.S_IXUSR, script


def test_quickstart_installs_once_and_trains_on_two_ranks(checkout):
    first = checkout()
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == (
        "mpirun -n 2 bitring train --model cnn --data digits --compression onebit --output runs/quickstart --fresh"
    )
    assert len(checkout.installs) == 1
    assert checkout.installs[0].endswith("--editable .[mpich,demo]")
    second = checkout(PIP_STATUS="1")
    assert second.returncode == 0, second.stderr
    assert "Installing" not in second.stdout
    assert len(checkout.installs) == 1


def test_quickstart_installs_again_when_the_project_changed(checkout):
    checkout()
    with (checkout.folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# another dependency\n")
    assert checkout().returncode == 0
    assert len(checkout.installs) == 2


def test_quickstart_shows_what_went_wrong_and_tries_again(checkout):
    failed = checkout(PIP_STATUS="7")
    assert failed.returncode == 7
    assert "failed after" in failed.stderr
    assert "install.log" in failed.stderr
    assert "mpirun" not in failed.stdout
    assert checkout().returncode == 0
    assert len(checkout.installs) == 2


def test_quickstart_says_which_python_it_wants(checkout, tmp_path: Path):
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$2" in *version_info?:3*) echo 3.9.2 ;; *) exit 1 ;; esac\n', encoding="utf-8")
    old.chmod(0o755)
    done = checkout(PYTHON=str(old))
    assert done.returncode == 1
    assert f"bitring needs Python 3.10 or newer; '{old}' is 3.9.2. Set PYTHON to a newer one." in done.stderr
    done = checkout(PYTHON="nonesuch-python")
    assert done.returncode == 1
    assert "'nonesuch-python' does not run" in done.stderr


def test_scripts_test_names_its_stages(clean_environment):
    done = subprocess.run(
        [str(ROOT / "scripts" / "test"), "mpich-9"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 2
    assert "unknown stage 'mpich-9'; known: lint types shell single commands jobs mpich-2" in done.stderr


def test_test_gpu_says_what_it_skips_and_why(tmp_path: Path) -> None:
    """Without time no step is run; a dry run has all steps but those of device memory."""
    for arguments in ([], ["--dry-run"]):
        command = [sys.executable, str(ROOT / "scripts" / "test-gpu"), "--minutes", "0", "--output", str(tmp_path)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=150, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        kept = json.loads((tmp_path / "steps.json").read_text())
        assert kept["dry_run"] == bool(arguments)
        assert {step["result"] for step in kept["steps"]} == {"skipped"}
        why = {step["name"]: step["why"] for step in kept["steps"]}
        assert {"wheels", "extension", "tests-1-staged", "tests-4-cuda-aware", "bench-2", "train-2"} <= set(why)
        assert why["doctor"] == "the time is up"
        assert all(f"{name} skipped {reason}" in done.stdout for name, reason in why.items())
        if arguments:
            assert why["tests-2-staged"] == "the time is up"
            assert why["tests-2-cuda-aware"] == "a dry run has no device memory"
