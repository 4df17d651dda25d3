"""scripts/run-slurm.sbatch in a real Slurm: munged, slurmctld and slurmd of this test's own, on unusual ports."""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["PATH"] += os.pathsep + "/usr/sbin"  # where Debian puts daemons, and not every PATH looks

MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "mpirun") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.single,
    pytest.mark.timeout(600),  # jobs of all tests run beside each other
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd wants root"),
]

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "run-slurm.sbatch"
VENV = Path(sys.executable).parent.parent

# A machine may take the processor away for long: no daemon gives another up for that, no node its jobs' processes, and
# no job that has ended is forgotten before its test asks for it.
CONFIGURATION = """
ClusterName=bitring-test
SlurmctldHost={host}(127.0.0.1)
FirstJobId={first_job}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=60
MinJobAge=86400
UnkillableStepTimeout=600
BatchStartTimeout=600
MessageTimeout=60
TCPTimeout=30
SlurmdTimeout=0
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES State=UP
"""


PR_SET_CHILD_SUBREAPER = 36


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until(what: str, ready: Callable[[], bool], seconds: float, log: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {seconds} s\n{log()}")
        time.sleep(0.1)


class Slurm:
    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def command(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=150, check=False
        )
        return done.stdout if done.returncode == 0 else f"{words}: {done.stdout}{done.stderr}"

    def logs(self) -> str:
        parts = [f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in sorted(self.folder.glob("*.log"))]
        return "\n".join(parts)

    def submit(self, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit the script with 2 tasks; the job's number. It prints to NUMBER.log."""
        environment = self.environment | {"VENV": str(VENV)} | variables
        words = ["sbatch", "--parsable", "--ntasks=2", f"--output={self.folder}/%j.log", *options, str(SCRIPT)]
        done = subprocess.run(
            [*words, *arguments],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.stdout.strip().isdigit(), f"{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def shown(self, job: str) -> dict[str, str]:
        """What Slurm has to say of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", job)))

    def output(self, job: str) -> str:
        log = self.folder / f"{job}.log"
        return log.read_text(encoding="utf-8") if log.exists() else ""

    def until(self, job: str, *states: str, seconds: float = 200) -> dict[str, str]:
        """Wait for one of these states."""
        wait_until(
            f"job {job} being {' or '.join(states)}",
            lambda: self.shown(job).get("JobState") in states,
            seconds,
            lambda: f"{self.logs()}\n{self.shown(job)}\n{self.output(job)}",
        )
        return self.shown(job)

    def until_ended(self, job: str) -> tuple[str, str]:
        """The job's final state and exit code, as STATE CODE:SIGNAL, and what it printed."""
        found = self.until(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=250)
        return f"{found['JobState']} {found['ExitCode']}", self.output(job)

    def until_exists(self, *files: Path) -> None:
        wait_until(f"{files}", lambda: all(file.exists() for file in files), 200, self.logs)

    def start_again_now(self, job: str) -> None:
        """Slurm holds a job that was queued again for two minutes. The new start has all the time that it wants."""
        self.until(job, "PENDING", seconds=150)
        time.sleep(2)  # slurmd refuses a job that has ended in the same second
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Generator[Slurm, None, None]:
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    configuration = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        controller_port=free_port(),
        daemon_port=free_port(),
        # MPICH names its files in /dev/shm by a job's number: what another cluster's jobs have left is in nobody's way.
        first_job=secrets.randbelow(60_000_000) + 1,
    )
    (folder / "slurm.conf").write_text(configuration, encoding="utf-8")
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, timeout=150, check=True).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (23, 11):  # earlier ones know no such plugin, and need none
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf-8")
    ours = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    cluster = Slurm(folder, environment)

    munged = [
        *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
        *(f"--{name}-file={folder}/munge.{name}" for name in ("pid", "seed")),
        *(f"--socket={folder}/munge.socket", f"--log-file={folder}/munged.log"),
    ]
    with ExitStack() as stack:
        stack.enter_context(orphans_are_reaped())

        def start(*command: str) -> None:
            log = stack.enter_context((folder / f"{command[0]}.out.log").open("w", encoding="utf-8"))
            daemon = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(stop, daemon)

        start(*munged)
        wait_until("munged's start", (folder / "munge.socket").exists, 60, cluster.logs)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        wait_until(
            "an idle node",
            lambda: cluster.command("sinfo", "--noheader", "-o", "%t").strip() == "idle",
            150,
            cluster.logs,
        )
        yield cluster
        cluster.command("scancel", "--user=root")
        wait_until("the jobs' end", lambda: cluster.command("squeue", "--noheader") == "", 200, cluster.logs)


@contextmanager
def orphans_are_reaped() -> Generator[None, None, None]:
    """What jobs leave behind becomes this process's, and is waited for.

    Where nobody does, as in a container without an init, the child of an srun that has ended is a zombie for ever, and
    its job, for which Slurm waits until its last process is gone, does not end.
    """
    prctl, over = ctypes.CDLL(None).prctl, threading.Event()

    def reap() -> None:
        while not over.wait(0.2):
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):
                    state, parent, _, session = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
                    ours = int(parent) == os.getpid() and int(session) != os.getsid(0)  # else a subprocess of a test's
                    if state == "Z" and ours:
                        os.waitpid(int(stat.parent.name), os.WNOHANG)

    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reaper = threading.Thread(target=reap)
    reaper.start()
    yield
    over.set()
    reaper.join()
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


# bitring train, which waits for a signal at its step 30 when MARK names a folder, and says there that it is so far; but
# not when the run goes on. FAIL: rank 1 ends before it has begun.
TRAIN = f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
mark, rank = os.environ.get("MARK"), os.environ["PMI_RANK"]
if "FAIL" in os.environ and rank == "1":
    sys.exit("rank 1: no such data set")
from bitring.__main__ import main
from bitring.training import preemption
from bitring.training.data_parallel import DataParallel
step = DataParallel.step
def waiting(self, *arguments, **named):
    step(self, *arguments, **named)
    if self.steps == 30:
        (Path(mark) / f"up-{{rank}}").touch()
        while not any(each.noted for each in preemption._active):
            time.sleep(0.02)
if mark and "--resume" not in sys.argv:
    DataParallel.step = waiting
sys.argv[0] = "bitring"
main()
"""

MODES = {
    "sync": ["--mode", "sync"],
    "local": ["--mode", "local", "--tau", "4"],
    "local onebit": ["--mode", "local", "--tau", "4", "--compression", "onebit"],
    "sync onebit": ["--mode", "sync", "--compression", "onebit"],
}

# What is sent to the job, and how its ranks train. With a limit that is less than 120 s ahead the signal of 120 s
# before is due at once: Slurm looks for such jobs every half minute.
PREEMPTED = {
    "TERM": (["scancel", "--signal=TERM", "{}"], "sync"),
    "USR1": (["scancel", "--signal=USR1", "{}"], "local onebit"),
    "time limit": (["scontrol", "update", "JobId={}", "TimeLimit={limit}"], "sync onebit"),
}
FAILED = {"INT": (["scancel", "--signal=INT", "{}"], "local"), "KILL": (["scancel", "--signal=KILL", "{}.0"], "sync")}


@pytest.fixture(scope="module")
def environment_of_slow_training(slurm: Slurm) -> str:
    folder = slurm.folder / "slow" / "bin"
    folder.mkdir(parents=True)
    (folder / "bitring").write_text(TRAIN, encoding="utf-8")
    (folder / "bitring").chmod(0o755)
    return str(folder.parent)


@pytest.fixture(scope="module")
def jobs(slurm: Slurm, environment_of_slow_training: str) -> dict[str, str]:
    """All jobs that train, by name; a folder of that name has their output. They run, and are waited for, together."""
    venv, jobs = environment_of_slow_training, dict[str, str]()

    def submit(name: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> None:
        words = ["--model", "mlp", "--epochs", "3", "--output", str(slurm.folder / name), *arguments]
        jobs[name] = slurm.submit(*words, options=options, **variables)

    submit("whole sync", *MODES["sync"], LAUNCHER="srun")
    submit("whole local onebit", *MODES["local onebit"], LAUNCHER="mpirun")
    submit("whole sync onebit", *MODES["sync onebit"], LAUNCHER="srun")
    for name, (_, mode) in {**PREEMPTED, **FAILED}.items():
        (slurm.folder / name).mkdir()
        submit(name, *MODES[mode], "--fresh", VENV=venv, MARK=str(slurm.folder / name))
    submit("fail", VENV=venv, FAIL="yes")
    options = ("--array=0-2", f"--output={slurm.folder}/%A_%a.log", "--ntasks=2")
    submit("array", "--seed", "%a", options=options)
    for name, (words, _) in {**PREEMPTED, **FAILED}.items():
        slurm.until_exists(*(slurm.folder / name / f"up-{rank}" for rank in range(2)))
        hours, minutes, _ = map(int, slurm.shown(jobs[name])["RunTime"].split(":"))
        slurm.command(*(word.format(jobs[name], limit=60 * hours + minutes + 2) for word in words))
    slurm.until_ended(jobs["KILL"])
    slurm.command("scontrol", "requeue", jobs["KILL"])
    for name in (*PREEMPTED, "KILL"):
        slurm.start_again_now(jobs[name])
    return jobs


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def same_as_undisturbed(slurm: Slurm, jobs: dict[str, str], name: str, mode: str) -> str:
    """What the job ``name`` printed, whose second start has ended with the same bits as one that was left alone."""
    output, whole = slurm.folder / name, slurm.folder / f"whole {mode}"
    for each in (name, whole.name):
        state, said = slurm.until_ended(jobs[each])
        assert state == "COMPLETED 0:0", said
    assert slurm.shown(jobs[name])["Restarts"] == "1"
    assert summary(output)["digest"] == summary(whole)["digest"]
    with np.load(output / "checkpoint.npz") as one, np.load(whole / "checkpoint.npz") as other:
        assert set(one.files) == set(other.files)
        for array in set(one.files) - {"header.json"}:
            np.testing.assert_array_equal(one[array], other[array], err_msg=array)
    assert [file.name for file in output.glob(".*")] == []
    return slurm.output(jobs[name])


@pytest.mark.parametrize("name", list(PREEMPTED))
def test_a_preempted_job_is_queued_again_and_ends_as_an_undisturbed_one(slurm: Slurm, jobs: dict[str, str], name: str):
    said = same_as_undisturbed(slurm, jobs, name, PREEMPTED[name][1])
    assert "checkpoint.npz holds all that was trained, up to step " in said
    assert f"job {jobs[name]}: queued again to go on" in said
    assert "checkpoint.npz: going on after step " in said


def test_what_a_killed_job_has_left_in_dev_shm_is_not_in_the_way_of_its_next_start(slurm: Slurm, jobs: dict[str, str]):
    """Queued again it has the same number, by which MPICH would name its files."""
    said = same_as_undisturbed(slurm, jobs, "KILL", "sync")
    assert "run-slurm.sbatch: training failed with status 137" in said


@pytest.mark.parametrize(("name", "launcher"), [("whole sync", "srun"), ("whole local onebit", "mpirun")])
def test_the_script_trains_on_two_ranks(slurm: Slurm, jobs: dict[str, str], name: str, launcher: str):
    state, output = slurm.until_ended(jobs[name])
    assert state == "COMPLETED 0:0", output
    assert f"2 ranks on {socket.gethostname().split('.')[0]}, by {launcher}" in output
    assert summary(slurm.folder / name)["ranks"] == 2


def test_an_interrupted_job_has_failed(slurm: Slurm, jobs: dict[str, str]):
    state, output = slurm.until_ended(jobs["INT"])
    assert state in ("FAILED 130:0", "FAILED 137:0"), (
        output
    )  # whichever srun sees first: a rank's end, or its MPI_Abort
    assert "interrupted; --resume goes on after epoch 1" in output
    assert {"checkpoint.npz", "metrics.jsonl"} <= {file.name for file in (slurm.folder / "INT").iterdir()}
    assert not (slurm.folder / "INT" / "summary.json").exists()


def test_a_rank_that_fails_at_once_ends_the_job_with_the_cause(slurm: Slurm, jobs: dict[str, str]):
    """The other would wait for it until the time limit."""
    state, output = slurm.until_ended(jobs["fail"])
    assert state.startswith("FAILED "), output
    assert state != "FAILED 0:0"
    assert "rank 1: no such data set" in output
    assert not (slurm.folder / "fail" / "summary.json").exists()


def test_each_task_of_an_array_has_a_folder_of_its_own(slurm: Slurm, jobs: dict[str, str]):
    digests = set()
    for task in range(3):
        state, output = slurm.until_ended(f"{jobs['array']}_{task}")
        assert state == "COMPLETED 0:0", output
        found = summary(slurm.folder / "array" / str(task))
        assert found["seed"] == task
        digests.add(found["digest"])
    assert len(digests) == 3


def test_an_unknown_launcher_is_named(slurm: Slurm, tmp_path: Path):
    state, output = slurm.until_ended(slurm.submit("--output", str(tmp_path), LAUNCHER="orterun"))
    assert state == "FAILED 1:0", output
    assert "LAUNCHER is 'orterun'; known: srun, mpirun" in output


# What the script makes of a signal, shown by a stand-in for bitring train that waits for one and then saves.
STAND_IN = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path
rank, output = os.environ["SLURM_PROCID"], Path(sys.argv[sys.argv.index("--output") + 1])
received = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: received.append(number))
(output / f"up-{{rank}}").touch()
while not received:
    time.sleep(0.01)
time.sleep(0.5 if rank == "1" else 0)  # saving takes one rank longer than the other
(output / f"saved-{{rank}}").touch()
sys.exit(75)
"""


@pytest.fixture(scope="module")
def stand_in(slurm: Slurm) -> str:
    folder = slurm.folder / "stand-in" / "bin"
    folder.mkdir(parents=True)
    (folder / "bitring").write_text(STAND_IN, encoding="utf-8")
    (folder / "bitring").chmod(0o755)
    return str(folder.parent)


def test_a_job_is_queued_again_a_bounded_number_of_times(slurm: Slurm, stand_in: str, tmp_path: Path):
    job = slurm.submit("--output", str(tmp_path), VENV=stand_in, REQUEUES="0")
    slurm.until_exists(tmp_path / "up-0", tmp_path / "up-1")
    slurm.command("scancel", "--signal=TERM", job)
    state, output = slurm.until_ended(job)
    assert state == "FAILED 75:0", output
    assert "run-slurm.sbatch: not queued again after 0 times; --resume goes on" in output


def test_a_cancelled_job_saves_and_is_not_queued_again(slurm: Slurm, stand_in: str, tmp_path: Path):
    job = slurm.submit("--output", str(tmp_path), VENV=stand_in)
    slurm.until_exists(tmp_path / "up-0", tmp_path / "up-1")
    slurm.command("scancel", job)
    slurm.until_exists(tmp_path / "saved-0", tmp_path / "saved-1")
    state, output = slurm.until_ended(job)
    assert state.startswith("CANCELLED"), output
    wait_until("the script's end", lambda: "--resume goes on from there" in slurm.output(job), 150, slurm.logs)
