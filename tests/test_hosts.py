"""benchmarks/hosts.py: the sum is right, the wire is respected, and nothing stays behind, however a run ends. The
benchmarks that run on such hosts keep what they measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
HOSTS = BENCHMARKS / "hosts.py"
RATE = 25e6  # bytes a second of 200mbit

# What two hosts of one rank do in the tests; rank 0 prints.
SUM = """
import json, sys, time
import numpy as np
from mpi4py import MPI
import bitring
sys.path.insert(0, sys.argv[1])
import hosts
comm, lab = MPI.COMM_WORLD, hosts.lab()
x = np.full(1 << 20, comm.rank + 1, np.float32)
plan = bitring.plan_allreduce(x, comm=comm)
before = hosts.sent()
comm.Barrier()
begin = time.perf_counter()
plan()
seconds = time.perf_counter() - begin
comm.Barrier()
after = hosts.sent()
data = memoryview(bytearray(1 << 20))
stream = hosts.Stream(1, 2)
comm.Barrier()
(stream.send if hosts.host() == 1 else stream.receive)(data)
nodes = comm.allgather(comm.Split_type(MPI.COMM_TYPE_SHARED).size)
right = comm.allgather(bool(np.all(x == 3)))
if comm.rank == 0:
    payload = after.payload - before.payload
    print(json.dumps([right, nodes, seconds, payload, lab.rate, hosts.host()]))
"""

# Host 1 takes its own shaping off, and sends as fast as it can.
CHEAT = """
import socket, subprocess
if socket.gethostname() == "host1":
    subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _ in range(1500):
            s.sendto(bytes(60000), ("10.77.0.2", 9))
"""


@pytest.fixture(autouse=True)
def needs_hosts(possible: str | None) -> Iterator[None]:
    if possible is not None:
        pytest.skip(possible)
    yield
    assert leftovers(os.getpid()) == []


@pytest.fixture(scope="module")
def possible() -> str | None:
    done = subprocess.run([sys.executable, HOSTS, "--probe"], capture_output=True, text=True, timeout=150, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr).strip()


def leftovers(parent: int) -> list[str]:
    """Namespaces of runs that ``parent`` started or that are over."""
    found: list[str] = []
    for path in Path("/run/netns").glob("bitring-*"):
        stat = Path(f"/proc/{path.name.split('-')[1]}/stat")
        fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split() if stat.exists() else []
        if not fields or int(fields[1]) == parent:
            found.append(path.name)
    return found


@pytest.fixture
def start(clean_environment):
    """Starts hosts.py, or another script; whatever is still running at the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, script: Sequence[str | Path] = (HOSTS,)) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, script), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=150)


@pytest.fixture
def run(start):
    def run(*arguments: str | Path, script: Sequence[str | Path] = (HOSTS,)) -> tuple[int, str, str]:
        process = start(*arguments, script=script)
        out, err = process.communicate(timeout=150)
        return process.returncode, out, err

    return run


def wait_for(condition, seconds: float = 150) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def test_a_sum_over_the_wire(run):
    status, out, err = run("--rate", "200mbit", "--", sys.executable, "-c", SUM, str(BENCHMARKS))
    assert status == 0, err
    right, nodes, seconds, payload, rate, host = json.loads(out)
    assert right == [True, True]
    assert nodes == [1, 1]  # the MPI library takes the hosts for two machines
    assert rate == RATE
    assert host == 1
    # Two hosts: each has to send as many bytes as the buffer has, 4 MiB.
    assert 0.99 * (4 << 20) < payload < 1.05 * (4 << 20)
    assert seconds > (payload - (1 << 18)) / RATE
    assert err.count(" bytes left in ") == 2


def test_faster_than_the_wire_fails(run):
    status, _, err = run("--rate", "200mbit", "--", sys.executable, "-c", CHEAT)
    assert status == 1
    assert "faster than the wire's 25000000 bytes per second" in err


def test_the_exit_status_is_passed_on(run):
    status, _, err = run("--", sys.executable, "-c", "import sys; sys.exit(7)")
    assert status == 7, err


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_and_cleans_up(start, tmp_path: Path, kind: signal.Signals):
    process, marks = begin(start, tmp_path)
    process.send_signal(kind)
    assert process.wait(timeout=150) == 128 + kind
    assert leftovers(os.getpid()) == []
    assert not any(alive(pid) for pid in marks)


def test_the_next_start_removes_what_a_killed_run_left(start, run, tmp_path: Path):
    process, marks = begin(start, tmp_path)
    process.kill()
    process.wait(timeout=150)
    assert len(leftovers(os.getpid())) == 3  # two hosts and the switch
    assert all(alive(pid) for pid in marks)
    status, _, err = run("--", "true")
    assert status == 0, err
    assert leftovers(os.getpid()) == []
    assert not any(alive(pid) for pid in marks)


def test_two_runs_at_once(start, run, tmp_path: Path):
    process, marks = begin(start, tmp_path)
    status, _, err = run("--hosts", "3", "--", "true")
    assert status == 0, err
    assert all(alive(pid) for pid in marks)
    assert process.poll() is None


def begin(start, folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A run whose two processes sleep; returns it and their ids."""
    sleep = f"import os, pathlib, time; pathlib.Path(f'{folder}/{{os.getpid()}}').touch(); time.sleep(60)"
    process = start("--", sys.executable, "-c", sleep)
    wait_for(lambda: len(list(folder.iterdir())) == 2)
    return process, [int(path.name) for path in folder.iterdir()]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rate", "fast", "--", "true"], "a rate is a number with kbit, mbit or gbit"),
        (["--hosts", "0", "--", "true"], "expected 1 to 250; got '0'"),
        ([], "expected a command after --"),
    ],
)
def test_mistakes(run, arguments: list[str], expected: str):
    status, _, err = run(*arguments)
    assert status == 2
    assert expected in err


def test_without_root(run):
    somebody = "import os, runpy, sys; os.geteuid = lambda: 1000; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    status, _, err = run(str(HOSTS), "--", "true", script=["-c", somebody])
    assert status == 2
    assert err == "hosts.py: emulated hosts need root\n"


def test_network_allreduce(run, tmp_path: Path):
    kept = tmp_path / "a.json"
    arguments = ["--hosts", "2", "--rate", "200mbit", "--sizes", "64KiB,1MiB", "--samples", "2", "--algorithms", "ring"]
    script = [BENCHMARKS / "network_allreduce.py"]
    status, out, err = run(*arguments, "--json", kept, "--plot", tmp_path / "a.png", script=script)
    assert status == 0, err
    results = json.loads(kept.read_text())
    assert results["network"] == {"emulated": True, "hosts": 2, "ranks_per_host": 1, "rate": RATE, "burst": 1 << 17}
    assert results["machine"]["nodes"] == 2
    names = ["ring", "Communicator.Allreduce", "bitring.allreduce", "library", "library out of place"]
    names += [*["gloo"] * (find_spec("torch") is not None), "TCP stream"]
    rows = results["results"]
    assert [(row["nbytes"], row["contender"]) for row in rows] == [(n, c) for n in (1 << 16, 1 << 20) for c in names]
    for row in rows:
        assert row["has_to_leave"] == row["nbytes"]  # 2(N-1)/N·n of two hosts
        assert row["seconds"] > (row["nbytes"] - (1 << 17)) / RATE
        assert row["processor_seconds"] > 0
        assert 0.99 < row["left_a_host"] / row["has_to_leave"] < 1.2
        assert row["left_a_host"] <= row["left_a_host_with_headers"]
    assert rows[-1]["part_of_the_stream"] == 1
    assert len(out.splitlines()) == 2 + len(rows)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_overlap(run, tmp_path: Path):
    kept = tmp_path / "o.json"
    arguments = ["--rate", "200mbit", "--mib", "1", "--samples", "2", "--json", kept]
    status, _, err = run(*arguments, script=[BENCHMARKS / "overlap.py"])
    assert status == 0, err
    results = json.loads(kept.read_text())
    assert results["seconds"]["alone"] > ((1 << 20) - (1 << 17)) / RATE
    assert results["beside_against_alone"] > 0
    assert results["loop_against_alone"] > 0
    assert results["loop_beside_tcp_against_alone"] > 0


def test_fixed_cost(run, tmp_path: Path):
    kept = tmp_path / "f.json"
    arguments = ["--sizes", "8,1KiB", "--samples", "2", "--json", kept]
    status, _, err = run(*arguments, script=[BENCHMARKS / "fixed_cost.py"])
    assert status == 0, err
    rows = json.loads(kept.read_text())["results"]
    assert [row["nbytes"] for row in rows] == [8, 1024]
    for row in rows:
        assert min(row["plan"], row["bare"], row["library"], row["python_seconds"]) > 0
