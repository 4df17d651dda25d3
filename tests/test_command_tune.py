"""``bitring tune``: what it measures is found again, on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitring import __main__
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.selection.table import Rules, Table, read_table, write_table
from bitring.native import native

pytestmark = pytest.mark.single

TINY = ["--sizes", "64,64KiB", "--dtype", "float32", "--seconds", "0"]

CHOICES = """
import numpy as np
from mpi4py import MPI
import bitring
comm = bitring.Communicator(MPI.COMM_WORLD)
plans = [bitring.plan_allreduce(np.ones(n, np.float32), comm=comm) for n in (10, 1000)]
plans.append(bitring.plan_allreduce(comm.empty(10), comm=comm))
x = np.ones(1000, np.float32)
comm.Allreduce(MPI.IN_PLACE, x)
assert (x == comm.size).all()
lines = comm.gather([bitring.explain(plan) for plan in plans])
if comm.rank == 0:
    print(*lines[0], sep="\\n")
    print(all(each == lines[0] for each in lines))
"""


def test_what_is_measured_is_used(on_ranks, tmp_path: Path):
    path = tmp_path / "config" / "bitring" / "table.json"
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "BITRING_TABLE": ""}
    other = Rules("MPI of old", 7, 1, 4, False, True, ((0, "mpi"),))
    write_table(path, Table((other,)))
    done = on_ranks(2, "-m", "bitring", "tune", *TINY, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    table = read_table(path)
    assert other in table.rules
    measured = [rules for rules in table.rules if rules != other]
    places = [False] if native() is None else [False, True]
    assert [rules.resident for rules in measured] == places
    for rules in measured:
        assert (rules.ranks, rules.nodes, rules.itemsize, rules.native) == (2, 1, 4, native() is not None)
        assert {name for _, name in rules.best} <= set(algorithms.names())
    lines = done.stdout.splitlines()
    assert lines[-1] == f"written to {path}"
    assert lines[0].startswith(f"2 ranks on 1 node, 4-byte values, private: {measured[0].best[0][1]}")
    assert len(lines) == 1 + len(places)
    shown = on_ranks(2, "-c", CHOICES, env=env)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0] == (
        f"{measured[0].algorithm(40)}: measured on this machine to be the best of 40 bytes with "
        "2 ranks on 1 node, 4-byte values, private"
    )
    assert shown.stdout.splitlines()[-1] == "True"


def test_only_rank_0_has_a_table(on_ranks, tmp_path: Path):
    """The others have one that says otherwise; all take what rank 0's says, for the nearest number of ranks."""
    from bitring.collectives.interop.mpi_library import library_version

    for name, best in (("0", ((0, "ring"), (100, "rabenseifner"))), ("1", ((0, "double_binary_tree"),))):
        kinds = [(ranks, resident) for ranks in (2, 64) for resident in (False, True)]
        rules = [Rules(library_version(), ranks, 1, 4, where, native() is not None, best) for ranks, where in kinds]
        if name == "0":
            rules[1] = rules[1]._replace(best=((0, "binomial_tree"),))
        write_table(tmp_path / f"{name}.json", Table(tuple(rules)))
    code = (
        "import os\nfrom bitring.launcher import launched_rank\n"
        f"os.environ['BITRING_TABLE'] = {str(tmp_path)!r} + ('/0.json' if launched_rank() == 0 else '/1.json')\n"
    )
    done = on_ranks(3, "-c", code + CHOICES)
    assert done.returncode == 0, done.stderr
    *choices, alike = done.stdout.splitlines()
    resident = "ring" if native() is None else "binomial_tree"
    assert [choice.split(":")[0] for choice in choices] == ["ring", "rabenseifner", resident]
    assert all("with 2 ranks on 1 node" in choice for choice in choices)
    assert alike == "True"


def test_a_broken_table_is_told_once_and_not_used(on_ranks, tmp_path: Path):
    path = tmp_path / "table.json"
    path.write_text("{")
    done = on_ranks(2, "-c", CHOICES, env={"BITRING_TABLE": str(path)})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is not used, the built-in default is") == 1
    *choices, alike = done.stdout.splitlines()
    assert all(choice.endswith("(built-in default)") for choice in choices)
    assert alike == "True"


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BITRING_TABLE", str(tmp_path / "table.json"))
    for arguments, message in (
        ([], "there is nothing to choose for one rank; try: mpirun -n 4 bitring tune"),
        (
            ["--dtype", "float16"],
            "--dtype must name types that the MPI library reduces, to compare with it; got float16",
        ),
        (["--sizes", "0"], "expected sizes in bytes"),
    ):
        result = CliRunner().invoke(__main__._bitring, ["tune", *arguments], prog_name="bitring")
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "table.json").exists()


def test_help_starts_no_mpi():
    code = (
        "import sys\nfrom bitring.__main__ import main\nsys.argv = ['bitring', 'tune', '--help']\n"
        "try:\n    main()\nfinally:\n    assert 'mpi4py.MPI' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: bitring tune" in done.stdout


def test_between_nodes_others_must_be_clearly_faster_than_what_checks_itself():
    from bitring.commands._tune import as_calls  # here, as it initialises MPI

    found = as_calls({"leaders": 1.0, "ring": 0.96, "mpi": 0.9})
    assert min(found, key=found.__getitem__) == "mpi"
    del found["mpi"]
    assert min(found, key=found.__getitem__) == "leaders"
