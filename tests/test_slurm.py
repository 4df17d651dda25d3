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

    def run_script(self, launcher: str, *arguments: str) -> tuple[str, str]:
        """Submit the script with 2 tasks; its final state and what it printed."""
        self.environment |= {"LAUNCHER": launcher, "VENV": str(VENV)}
        output = self.folder / f"{launcher}.log"
        job = self.command("sbatch", "--parsable", "--ntasks=2", f"--output={output}", str(SCRIPT), *arguments).strip()
        assert job.isdigit(), f"{job}\n{self.logs()}"
        state = shown = ""

        def ended() -> bool:
            nonlocal state, shown
            shown = self.command("scontrol", "show", "job", job)
            found = re.search(r"JobState=(\w+)", shown)
            state = found[1] if found else ""
            return state not in ("", "PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

        wait_until(f"the end of job {job}", ended, 90, lambda: f"{self.logs()}\n{shown}")
        return state, output.read_text(encoding="utf-8")


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
    state, output = slurm.run_script(
        launcher, "--model", "softmax", "--data", "digits", "--epochs", "1", "--output", str(tmp_path / "run")
    )
    assert state == "COMPLETED", output
    assert f"2 ranks on {socket.gethostname().split('.')[0]}, by {launcher}" in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["ranks"] == 2


def test_an_unknown_launcher_is_named(slurm: Slurm):
    state, output = slurm.run_script("orterun")
    assert state == "FAILED", output
    assert "LAUNCHER is 'orterun'; known: srun, mpirun" in output
