"""mpi4py's own tests of collectives on buffers pass with a bitring.Communicator, whatever the algorithm.

They are in mpi4py's source distribution; it is fetched once into build/.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import mpi4py
import pytest
from run import launcher

from bitring.collectives.schedules.schedule import algorithms

pytestmark = pytest.mark.single

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
NAME = f"mpi4py-{mpi4py.__version__}"


def fetch() -> Path:
    """The folder of mpi4py's tests, of the installed version; skips the test where it cannot be had."""
    folder = BUILD / NAME / "test"
    if folder.is_dir():
        return folder
    BUILD.mkdir(exist_ok=True)
    archive = BUILD / f"{NAME}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "mpi4py"]
        command += ["--dest", str(BUILD), f"mpi4py=={mpi4py.__version__}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
            why = done.stderr.strip()[-300:]
        except subprocess.TimeoutExpired:
            why = "pip took too long"
        if not archive.exists():
            pytest.skip(f"mpi4py's source distribution cannot be fetched: {why}")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(f"{NAME}/test/")]
        tar.extractall(BUILD, members=members, filter="data")
    return folder


def conform(clean_environment, ranks: int, names: list[str], *options: str) -> None:
    prefix, extra = launcher(ranks)
    script = [sys.executable, str(HERE / "mpi4py_conformance.py"), str(fetch()), "--algorithms", *names, *options]
    done = subprocess.run(
        [*prefix, *script], env=clean_environment(**extra), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == names, done.stdout


ALGORITHMS = ["auto", *algorithms.names()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_bitring_answers(clean_environment, ranks: int):
    names = {1: ["ring"], 2: ALGORITHMS, 3: ["auto", "binomial_tree", "rabenseifner"]}[ranks]
    conform(clean_environment, ranks, names, "--quick")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ALGORITHMS, ids="with_{}".format)  # pytest-mpi takes "mpi" for its mark
def test_everything(clean_environment, ranks: int, name: str):
    conform(clean_environment, ranks, [name])
