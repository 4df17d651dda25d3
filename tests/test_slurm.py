"""scripts/run-slurm.sbatch in a real Slurm: munged, slurmctld and slurmd of this test's own, on unusual ports."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest

os.environ["PATH"] += os.pathsep + "/usr/sbin"  # where Debian puts daemons, and not every PATH looks

MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "mpirun") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.single,
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd wants root"),
]

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "run-slurm.sbatch"
VENV = Path(sys.executable).parent.parent

CONFIGURATION = """
ClusterName=bitring-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
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
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES State=UP
"""


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
            words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=30, check=False
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
            timeout=30,
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

    def until(self, job: str, *states: str, seconds: float = 60) -> dict[str, str]:
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
        found = self.until(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=90)
        return f"{found['JobState']} {found['ExitCode']}", self.output(job)

    def until_exists(self, *files: Path) -> None:
        wait_until(f"{files}", lambda: all(file.exists() for file in files), 60, self.logs)

    def start_again_now(self, job: str) -> None:
        """Slurm holds a job that was queued again for two minutes."""
        self.until(job, "PENDING")
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now")


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
    )
    (folder / "slurm.conf").write_text(configuration, encoding="utf-8")
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, timeout=10, check=True).stdout
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

        def start(*command: str) -> None:
            log = stack.enter_context((folder / f"{command[0]}.out.log").open("w", encoding="utf-8"))
            daemon = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(stop, daemon)

        start(*munged)
        wait_until("munged's start", (folder / "munge.socket").exists, 10, cluster.logs)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        wait_until(
            "an idle node",
            lambda: cluster.command("sinfo", "--noheader", "-o", "%t").strip() == "idle",
            30,
            cluster.logs,
        )
        yield cluster
        cluster.command("scancel", "--user=root")


def stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_the_script_trains_on_two_ranks(slurm: Slurm, launcher: str, tmp_path: Path):
    run = tmp_path / "a run"
    job = slurm.submit("--model", "softmax", "--epochs", "1", "--output", str(run), LAUNCHER=launcher)
    state, output = slurm.until_ended(job)
    assert state == "COMPLETED 0:0", output
    assert f"2 ranks on {socket.gethostname().split('.')[0]}, by {launcher}" in output
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["ranks"] == 2


def test_an_unknown_launcher_is_named(slurm: Slurm, tmp_path: Path):
    state, output = slurm.until_ended(slurm.submit("--output", str(tmp_path), LAUNCHER="orterun"))
    assert state == "FAILED 1:0", output
    assert "LAUNCHER is 'orterun'; known: srun, mpirun" in output


# What Slurm and the script make of a rank's end, shown by a stand-in for bitring train: it fails, or waits for a signal
# and then saves, unless it goes on from what was saved.
STAND_IN = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path
rank, arguments = os.environ["SLURM_PROCID"], sys.argv[1:]
if "--fail" in arguments and rank == "1":
    sys.exit("rank 1: no such data set")
received = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(number))
output = Path(arguments[arguments.index("--output") + 1])
if rank == "0":
    print(*arguments, flush=True)
if "--wait" in arguments and "--resume" not in arguments:
    (output / f"up-{{rank}}").touch()
    while not received:
        time.sleep(0.01)
    if signal.SIGINT in received:
        sys.exit(130)
    time.sleep(0.5 if rank == "1" else 0)  # saving takes one rank longer than the other
    (output / f"saved-{{rank}}").touch()
    sys.exit(75)
if rank == "0":
    (output / "summary.json").write_text("{{}}")
"""


@pytest.fixture(scope="module")
def stand_in(slurm: Slurm) -> str:
    folder = slurm.folder / "stand-in" / "bin"
    folder.mkdir(parents=True)
    (folder / "bitring").write_text(STAND_IN, encoding="utf-8")
    (folder / "bitring").chmod(0o755)
    return str(folder.parent)


@pytest.mark.parametrize("words", [["--signal=TERM"], ["--signal=USR1"], ["time limit"]])
def test_a_job_that_saved_is_queued_again_and_goes_on(slurm: Slurm, stand_in: str, tmp_path: Path, words: list[str]):
    """At the time limit Slurm sends what "scancel --batch --signal=USR1" does; its seconds are exact to a minute."""
    options = ("--time=00:02:00", "--signal=B:USR1@118") if words == ["time limit"] else ()
    job = slurm.submit("--output", str(tmp_path), "--wait", "--fresh", options=options, VENV=stand_in)
    if words != ["time limit"]:
        slurm.until_exists(tmp_path / "up-0", tmp_path / "up-1")
        slurm.command("scancel", *words, job)
    slurm.until_exists(tmp_path / "saved-0", tmp_path / "saved-1")
    slurm.start_again_now(job)
    state, output = slurm.until_ended(job)
    assert state == "COMPLETED 0:0", output
    assert slurm.shown(job)["Restarts"] == "1"
    assert f"job {job}: queued again to go on" in output
    assert f"train --output {tmp_path} --wait --fresh" in output
    assert f"train --output {tmp_path} --wait --resume" in output
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_a_job_is_queued_again_a_bounded_number_of_times(slurm: Slurm, stand_in: str, tmp_path: Path):
    job = slurm.submit("--output", str(tmp_path), "--wait", VENV=stand_in, REQUEUES="0")
    slurm.until_exists(tmp_path / "up-0", tmp_path / "up-1")
    slurm.command("scancel", "--signal=TERM", job)
    state, output = slurm.until_ended(job)
    assert state == "FAILED 75:0", output
    assert "run-slurm.sbatch: not queued again after 0 times; --resume goes on" in output


def test_a_cancelled_job_saves_and_is_not_queued_again(slurm: Slurm, stand_in: str, tmp_path: Path):
    job = slurm.submit("--output", str(tmp_path), "--wait", VENV=stand_in)
    slurm.until_exists(tmp_path / "up-0", tmp_path / "up-1")
    slurm.command("scancel", job)
    slurm.until_exists(tmp_path / "saved-0", tmp_path / "saved-1")
    state, output = slurm.until_ended(job)
    assert state.startswith("CANCELLED"), output
    wait_until("the script's end", lambda: "--resume goes on from there" in slurm.output(job), 20, slurm.logs)


def test_an_interrupted_job_has_failed(slurm: Slurm, stand_in: str, tmp_path: Path):
    job = slurm.submit("--output", str(tmp_path), "--wait", VENV=stand_in)
    slurm.until_exists(tmp_path / "up-0", tmp_path / "up-1")
    slurm.command("scancel", "--signal=INT", job)
    state, output = slurm.until_ended(job)
    assert state == "FAILED 130:0", output


def test_a_rank_that_fails_at_once_ends_the_job_with_the_cause(slurm: Slurm, stand_in: str, tmp_path: Path):
    """The other would wait for it until the time limit."""
    job = slurm.submit("--output", str(tmp_path), "--wait", "--fail", VENV=stand_in)
    state, output = slurm.until_ended(job)
    assert state.startswith("FAILED "), output
    assert state != "FAILED 0:0"
    assert "rank 1: no such data set" in output


def test_each_task_of_an_array_has_a_folder_of_its_own(slurm: Slurm, stand_in: str, tmp_path: Path):
    options = ("--array=0-2", f"--output={tmp_path}/%A_%a.log")
    job = slurm.submit("--seed", "%a", "--output", str(tmp_path / "run"), options=options, VENV=stand_in)
    summaries = [tmp_path / "run" / str(task) / "summary.json" for task in range(3)]
    slurm.until_exists(*summaries)
    for task in range(3):
        log = (tmp_path / f"{job}_{task}.log").read_text(encoding="utf-8")
        assert f"train --seed {task} --output {tmp_path}/run/{task}" in log
    slurm.command("scancel", job)
