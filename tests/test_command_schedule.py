"""``bitring schedule``, and the frame of the command line around it."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import bitring
from bitring import __main__
from bitring.collectives.schedules.schedule import algorithms

pytestmark = pytest.mark.single

WITHOUT_MPI = """
import sys

class NoMPI:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mpi4py", "cupy", "sklearn", "numba"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, NoMPI())
from bitring.__main__ import main
main()
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(__main__._bitring, arguments, prog_name="bitring")


def shell(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ring_of_four():
    result = run("schedule", "ring", "--ranks", "4")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == "ring allreduce, 4 ranks"
    assert lines[1] == "round 0   0->1:+3  1->2:+0  2->3:+1  3->0:+2"
    assert lines[6] == "round 5   0->1:=2  1->2:=3  2->3:=0  3->0:=1"
    assert lines[7].startswith("check    passed: each contribution exactly once in every chunk")
    assert "rounds   6" in lines
    assert "sent     3/2 n by a rank" in lines
    assert "reduced  3/4 n by a rank" in lines


def test_ranges_and_spreads():
    result = run("schedule", "rabenseifner", "--ranks", "3")
    assert "0->1:+1-2" in result.output
    assert "messages 2 to 4 sent by a rank" in result.output


def test_root():
    result = run("schedule", "binomial_tree", "--ranks", "2", "--collective", "broadcast", "--root", "1")
    assert result.output.splitlines()[:2] == ["binomial_tree broadcast, 2 ranks, root 1", "round 0   1->0:=0"]
    assert "check    passed: the root's chunks on every rank" in result.output


def test_many_ranks_are_abbreviated():
    result = run("schedule", "ring", "--ranks", "64")
    lines = result.output.splitlines()
    assert len(lines) < 60
    assert all(len(line) <= 120 for line in lines)
    assert "  ... 86 more rounds" in lines
    assert lines[1].endswith("... 56 more")


# An id of "mpi" alone would be taken for pytest-mpi's marker.
@pytest.mark.parametrize("name", algorithms.names(), ids="name={}".format)
def test_every_algorithm(name: str):
    collectives = algorithms.get(name).collectives()
    for collective in collectives:
        result = run("schedule", name, "--ranks", "7", "--collective", collective)
        assert result.exit_code == 0, result.output
        assert "check    passed" in result.output
    if not collectives:
        assert run("schedule", name).exit_code == 1


def test_mpi_explains_itself():
    result = run("schedule", "mpi")
    assert result.exit_code == 1
    assert "mpi has no schedule to show: it hands every call to the MPI library" in result.output


def test_plot(tmp_path: Path):
    path = tmp_path / "ring.png"
    result = run("schedule", "ring", "--ranks", "3", "--plot", str(path))
    assert result.output.splitlines()[-1] == f"picture  {path}"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["rign"], "unknown algorithm 'rign'; known: binomial_tree, double_binary_tree, leaders, mpi, "),
        (["binomial_tree", "--collective", "allgather"], "binomial_tree has no allgather; it has: allreduce, reduce, "),
        (["ring", "--collective", "reduce", "--root", "8"], "expected a root below 8 (--ranks), got 8"),
        (["ring", "--root", "1"], "allreduce has no root"),
        (["ring", "--ranks", "0"], "0 is not in the range x>=1"),
        (["ring", "--plot", "/no/such/folder/ring.png"], "--plot /no/such/folder/ring.png: "),
        (["ring", "--plot", "ring.nonsense"], "--plot ring.nonsense: Format 'nonsense' is not supported"),
    ],
)
def test_users_mistakes(arguments: list[str], text: str):
    result = run("schedule", *arguments)
    assert result.exit_code in (1, 2)
    assert text in result.output


def test_unknown_command_lists_the_known():
    result = run("shedule")
    assert result.exit_code == 2
    assert "unknown command 'shedule'; known: " in result.output
    assert "schedule" in result.output.split("known: ")[1]


def test_version_and_module():
    assert shell(sys.executable, "-m", "bitring", "--version") == f"bitring, version {bitring.__version__}\n"


def test_help_lists_every_command_and_imports_none():
    output = shell(sys.executable, "-c", WITHOUT_MPI, "--help")
    assert "Show and check the schedule of an algorithm" in output
    for file in Path(__main__.__file__).parent.glob("commands/[!_]*.py"):
        assert f"\n  {file.stem}" in output


def test_needs_no_mpi(tmp_path: Path):
    path = str(tmp_path / "picture.png")
    assert "check    passed" in shell(sys.executable, "-c", WITHOUT_MPI, "schedule", "ring", "--plot", path)
    assert "algorithm" in shell(sys.executable, "-c", WITHOUT_MPI, "schedule", "--help").lower()


def test_the_hook_of_these_tests_works():
    with pytest.raises(AssertionError, match=r"mpi4py is imported"):
        shell(sys.executable, "-c", WITHOUT_MPI.replace("main()", "import mpi4py"))
