"""The launch scripts, around a stand-in for bitring: arguments, variables, signals, and when a run counts as done."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MPIRUN = shutil.which("mpirun")
pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(MPIRUN is None, reason="no mpirun on PATH; pip install mpich"),
]

# What bitring train does, in short: it may fail, or wait for a signal; else it writes a summary.
TRAIN = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path
from mpi4py import MPI
comm, arguments = MPI.COMM_WORLD, sys.argv[1:]
output = Path(arguments[arguments.index("--output") + 1])
received = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: received.append(number))
signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
if comm.rank == 0:
    print(comm.size, *arguments, sep="|", flush=True)
if "--show" in arguments:
    handed_on = sorted(name for name, value in os.environ.items() if value == "handed on")
    (output / f"handed-on-{{comm.rank}}").write_text(" ".join(handed_on))
if "--fail" in arguments and comm.rank == 1:
    os._exit(3)
if "--wait" in arguments and "--resume" not in arguments:
    (output / f"up-{{comm.rank}}").touch()
    while not received:
        time.sleep(0.01)
    comm.Barrier()
    time.sleep(1.5 if comm.rank else 0)  # saving takes one rank longer than the other
    MPI.Finalize()
    sys.exit(75)
if comm.rank == 0 and "--lost" not in arguments:
    (output / "summary.json").write_text("{{}}")
"""

SSH = """#!/bin/sh
# On another host there is nothing of this environment but what is handed there.
echo "$*" >>"$0.log"
while [ $# -gt 1 ]; do case $1 in -*) shift ;; *) break ;; esac; done
shift
exec env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$*"
"""


@pytest.fixture
def environment(tmp_path: Path, clean_environment: Callable[..., dict[str, str]]) -> dict[str, str]:
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    (folder / "bitring").write_text(TRAIN, encoding="utf-8")
    (folder / "bitring").chmod(0o755)
    return clean_environment(VENV=str(folder.parent))


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path):
    """``start(script, arguments..., NAME=value)``: the script's process, in a folder of its own."""

    def start(script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(ROOT / "scripts" / script), *arguments],
            cwd=tmp_path,
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    output, _ = process.communicate(timeout=150)
    return process.returncode, output.splitlines()


def both_up(folder: Path) -> None:
    end = time.monotonic() + 150
    while not all((folder / f"up-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_arguments_reach_the_ranks_as_they_are(start, tmp_path: Path):
    status, output = ended(start("run-mpirun.sh", "--model", "a  b$c", "--output", "with space", RANKS="3"))
    assert status == 0, output
    assert "3|train|--model|a  b$c|--output|with space" in output
    assert [file.name for file in (tmp_path / "with space").iterdir()] == ["summary.json"]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_save_at_a_signal_end_the_script_with_75(start, tmp_path: Path, kind: signal.Signals):
    process = start("run-mpirun.sh", "--output", "run", "--wait")
    both_up(tmp_path / "run")
    process.send_signal(kind)
    status, output = ended(process)
    assert status == 75, output


def test_ctrl_c_reaches_the_ranks(start, tmp_path: Path):
    process = start("run-mpirun.sh", "--output", "run", "--wait")
    both_up(tmp_path / "run")
    for _ in range(10):  # Open MPI's may want it twice
        process.send_signal(signal.SIGINT)
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            continue
        break
    status, output = ended(process)
    assert status not in (0, 75), output


def test_a_rank_that_fails_ends_the_script(start):
    status, output = ended(start("run-mpirun.sh", "--output", "run", "--fail", "--wait"))
    assert status not in (0, 75), output


def test_only_a_new_summary_is_success(start, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("an earlier run's")
    status, output = ended(start("run-mpirun.sh", "--output", "run", "--lost"))
    assert status == 1
    assert "run-mpirun.sh: the launcher ended well, but there is no new run/summary.json" in output


def test_where_the_results_go_must_be_said(start):
    status, output = ended(start("run-mpirun.sh", "--model", "cnn"))
    assert (status, output) == (2, ["run-mpirun.sh: say where the results go: --output FOLDER"])


def test_variables_reach_other_hosts(start, tmp_path: Path):
    """Of this machine's loopback addresses one stands for another host, which is reached by a stand-in for ssh."""
    ssh = tmp_path / "ssh"
    ssh.write_text(SSH, encoding="utf-8")
    ssh.chmod(0o755)
    names = ("BITRING_TIMEOUT", "BITRING_DATA", "OMP_PLACES", "NUMBA_CACHE_DIR", "MKL_NUM_THREADS")
    process = start(
        *("run-mpirun.sh", "--output", str(tmp_path / "run"), "--show"),
        **dict.fromkeys(names, "handed on"),
        HOSTS="127.0.0.1,127.0.0.2",
        HYDRA_LAUNCHER_EXEC=str(ssh),
        PRTE_MCA_plm_ssh_agent=str(ssh),
    )
    status, output = ended(process)
    assert status == 0, output
    reached = (tmp_path / "ssh.log").exists()
    assert reached, output
    for rank in range(2):
        assert (tmp_path / "run" / f"handed-on-{rank}").read_text().split() == sorted(names)


# ---- PBS, whose commands are stand-ins ----


@pytest.fixture
def pbs(environment: dict[str, str], start, tmp_path: Path):
    """``pbs(arguments, NAME=value)``: the script's process in a job of two ranks, which may last 10 hours.

    With a WALLTIME the script hears of it when both ranks are up: they must mind signals when it has passed.
    """
    nodes = tmp_path / "nodes"
    nodes.write_text("localhost\nlocalhost\n", encoding="utf-8")
    up = " && ".join(f"[ -e {tmp_path}/run/up-{rank} ]" for rank in range(2))
    for name, text in (
        (
            "qstat",
            f'[ -z "$WALLTIME" ] || until {up}; do sleep 0.1; done\n'
            'echo "    Resource_List.walltime = ${WALLTIME:-10:00:00}"',
        ),
        ("qrerun", f'echo "$*" >>{tmp_path}/qrerun.log; kill $PPID'),
    ):
        command = Path(environment["VENV"]) / "bin" / name
        command.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        command.chmod(0o755)

    def pbs(arguments: str, **variables: str) -> subprocess.Popen[str]:
        return start(
            "run-pbs.pbs",
            ARGUMENTS=arguments,
            PBS_NODEFILE=str(nodes),
            PBS_O_WORKDIR=str(tmp_path),
            PBS_JOBID="7.server",
            **({"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} | variables),
        )

    return pbs


def test_pbs_takes_ranks_from_the_node_file_and_arguments_from_a_variable(pbs):
    status, output = ended(pbs("--model mlp --output 'my run'"))
    assert status == 0, output
    assert output[0] == "job 7.server: 2 ranks on localhost"
    assert "2|train|--model|mlp|--output|my run" in output


def test_pbs_saves_before_the_time_is_over_and_is_run_again(pbs, tmp_path: Path):
    status, output = ended(pbs("--output run --wait --fresh", WALLTIME="00:02:01"))
    assert status == 75, output
    assert "job 7.server: run again to go on" in output
    assert (tmp_path / "qrerun.log").read_text() == "7.server\n"
    status, output = ended(pbs("--output run --wait --fresh"))
    assert status == 0, output
    assert "2|train|--output|run|--wait|--resume" in output
    assert [file.name for file in (tmp_path / "run").glob(".*")] == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (signal.SIGUSR1, "not run again after 0 times; --resume goes on"),
        (signal.SIGTERM, "cancelled; what was saved is in run, and --resume goes on from there"),
    ],
)
def test_pbs_is_run_again_a_bounded_number_of_times_and_not_when_deleted(pbs, tmp_path: Path, kind, said: str):
    process = pbs("--output run --wait", REQUEUES="0")
    both_up(tmp_path / "run")
    process.send_signal(kind)
    status, output = ended(process)
    assert status == 75
    assert f"run-pbs.pbs: {said}" in output
    assert not (tmp_path / "qrerun.log").exists()


@pytest.mark.parametrize("given", ["--seed %a --output run", "--seed %a --output run/%a"])
def test_each_task_of_an_array_has_a_folder_of_its_own(pbs, tmp_path: Path, given: str):
    status, output = ended(pbs(given, PBS_ARRAY_INDEX="2"))
    assert status == 0, output
    assert "2|train|--seed|2|--output|run/2" in output
    assert (tmp_path / "run" / "2" / "summary.json").exists()
