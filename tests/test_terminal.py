"""Whether somebody watches: what the launcher's output is, not a terminal that the launcher made for its ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitring.commands._terminal import terminal_width

# Gives its command a terminal, as Open MPI's mpirun does, and passes on what it reads there.
MPIRUN = f"""#!{sys.executable}
import pty, sys
sys.exit(pty.spawn(sys.argv[1:]) >> 8)
"""

ASK = "from bitring.commands._terminal import terminal_width; print(terminal_width())"


@pytest.mark.skipif("BITRING_TEST_LOGS" not in os.environ, reason="somebody may be watching")
def test_tests_write_to_a_log(comm, agree):
    """Under Open MPI each rank's output is a terminal all the same."""
    width = terminal_width()
    agree(comm, width is None, f"a terminal of {width} columns")


@pytest.mark.single
@pytest.mark.parametrize("name", ["mpirun", "prted", "another"])
def test_a_launcher_s_own_terminals_do_not_count(
    name: str, tmp_path: Path, clean_environment: Callable[..., dict[str, str]]
):
    launcher = tmp_path / name
    launcher.write_text(MPIRUN, encoding="utf-8")
    launcher.chmod(0o755)
    done = subprocess.run(
        [str(launcher), sys.executable, "-c", ASK],
        env=clean_environment(COLUMNS="77"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stdout.strip() == ("77" if name == "another" else "None"), done.stderr
