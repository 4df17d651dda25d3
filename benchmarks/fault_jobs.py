"""Jobs in which a fault befalls one rank: how they are started, watched, cleaned up after, and kept (``faults.py``)."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPORT_SECONDS = 30.0
"""From the fault until all other ranks have their error, on a machine that may take the processor away for seconds; how
long it took is in the results."""

END_SECONDS = 90.0
"""From the fault until the job is over."""

START_SECONDS = 180.0
"""From the job's start until the fault."""

# mpirun tells the others of a process's end by SIGUSR1, which ends them; and where a signal was the cause, it sometimes
# ends them by SIGKILL all the same.
_WRAPPER = ("sh", "-c", 'trap "" USR1; "$0" "$@" || exit 3', sys.executable)


def write(path: Path, content: dict[str, Any]) -> None:
    """Whoever sees the file sees all of it."""
    beside = path.with_name(path.name + "~")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _ours() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("bitring")}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _environment() -> dict[str, str]:
    launchers = ("PMI_", "PMIX_", "HYDRA_", "OMPI_", "BITRING_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return environment


def mpirun() -> str:
    """MPICH's. Ends the program where there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is not None:
        version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
        if "HYDRA" in version:
            return found
    sys.exit("faults.py needs the mpirun of MPICH, beside this Python or on PATH: pip install mpich")


def run_job(
    script: str,
    trial: Any,
    judge: Callable[[Any, Path, float, float | None, list[str], int], dict[str, Any]],
) -> dict[str, Any]:
    """Run ``script --work FOLDER`` on the ranks of ``trial``, a dataclass, which is in FOLDER/trial.json.

    Ranks leave files there: ``process-RANK``, pid and files mapped; ``fault``, when it came about; ``report-RANK``.
    ``judge`` makes the result: of the trial, FOLDER, when the job was begun and when
    it ended by itself, if it has, of what was wrong so far, and of mpirun's exit code.
    """
    with tempfile.TemporaryDirectory(prefix="bitring-faults-") as name:
        folder = Path(name)
        write(folder / "trial.json", asdict(trial))
        before = _ours()
        begun = time.monotonic()
        with (folder / "output").open("w") as output:
            job = subprocess.Popen(
                [mpirun(), "-disable-auto-cleanup", "-n", str(trial.ranks), *_WRAPPER, script, "--work", name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
            try:
                ended = _watch(trial, folder, job, begun)
            finally:
                processes = [read(path) for path in folder.glob("process-*[0-9]")]
                wrong = _clean_up(job, processes, before)
        return judge(trial, folder, begun, ended, wrong, job.returncode)


def _watch(trial: Any, folder: Path, job: subprocess.Popen[bytes], begun: float) -> float | None:
    """When the job ended by itself; None: it did not. Wakes, or ends, a stopped rank when its time has come."""
    survivors = [r for r in range(trial.ranks) if r != trial.victim]
    fault, pid, woken = None, 0, False
    while job.poll() is None:
        now = time.monotonic()
        if fault is None:
            fault = read(folder / "fault")
            process = read(folder / f"process-{trial.victim}")
            pid = process["pid"] if process else 0
        if now > (begun + START_SECONDS if fault is None else fault["at"] + END_SECONDS):
            return None
        if fault is not None and not woken:
            told = all((folder / f"report-{r}").exists() for r in survivors)
            if trial.fault == "delay" and trial.moment == "during" and now > fault["at"] + trial.seconds:
                woken = True
                _signal(pid, signal.SIGCONT)
            elif trial.fault == "stop" and (told or now > fault["at"] + REPORT_SECONDS + 4):
                woken = True
                _signal(pid, signal.SIGKILL)
        time.sleep(0.01)
    return time.monotonic()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _clean_up(job: subprocess.Popen[bytes], processes: list[Any], before: set[str]) -> list[str]:
    """End what is left, and say what it was."""
    wrong: list[str] = []
    if job.poll() is None:
        wrong.append("the job did not end by itself")
        for process in processes:
            _signal(process["pid"], signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    until = time.monotonic() + 30
    alive, left = [0], {""}
    while (alive or left) and time.monotonic() < until:
        alive = [process["pid"] for process in processes if _alive(process["pid"])]
        left = _ours() - before
        if alive or left:
            time.sleep(0.05)
    for pid in alive:
        _signal(pid, signal.SIGKILL)
    if alive:
        wrong.append(f"{len(alive)} processes were left")
    if left:
        wrong.append(f"in /dev/shm were left: {sorted(left)}")
    for path in {path for process in processes for path in process["shared"]}:
        with contextlib.suppress(OSError):  # the library's, for which nobody else cares after a kill
            os.unlink(path)
    return wrong


def describe() -> dict[str, Any]:
    """This machine, as a job of two ranks sees it."""
    text = "import json; from mpi4py import MPI; from bitring.nodes import describe as d; m = d(MPI.COMM_WORLD); "
    text += "print(json.dumps(m)) if MPI.COMM_WORLD.rank == 0 else None"
    done = subprocess.run(
        [mpirun(), "-n", "2", sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True
    )
    machine: dict[str, Any] = json.loads(done.stdout)
    return machine


def run_all(
    name: str,
    trials: Sequence[Any],
    run_trial: Callable[[Any], dict[str, Any]],
    seed: int,
    path: Path | None,
    jobs: int,
) -> list[dict[str, Any]]:
    """The results of ``trials``, ``jobs`` at a time; those that ``path`` has already are not run again."""
    kept: dict[str, Any] = {"benchmark": name, "seed": seed, "machine": None, "trials": []}
    if path is not None and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("seed") != seed:
            sys.exit(f"{path} has trials of seed {kept.get('seed')}")
    if kept["machine"] is None and path is not None:
        kept["machine"] = describe()
    fields = list(asdict(trials[0]))
    done = {tuple(each[field] for field in fields): each for each in kept["trials"]}
    results: dict[int, dict[str, Any]] = {}
    todo: list[int] = []
    for number, trial in enumerate(trials):
        known = done.get(tuple(asdict(trial)[field] for field in fields))
        if known is None:
            todo.append(number)
        else:
            results[number] = known
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_trial, trials[number]): number for number in todo}
        try:
            for future in as_completed(futures):
                number = futures[future]
                results[number] = future.result()
                if path is not None:
                    kept["trials"] = [results[number] for number in sorted(results)]
                    beside = path.with_name(path.name + "~")
                    beside.write_text(_as_text(kept), encoding="utf-8")
                    beside.replace(path)
                _show(len(results), len(trials), results[number])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[number] for number in range(len(trials))]


def command(
    description: str,
    count: int,
    work: Callable[[Path], None],
    run_trials: Callable[[int, int, Path | None, int], list[dict[str, Any]]],
    summary: Callable[[list[dict[str, Any]]], str],
) -> int:
    """The command line of a list of trials, and of one rank of a trial (``work``). Returns the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=count, help="trials (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the list of trials (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time; most only wait (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work is not None:
        work(asked.work)
        return 0
    begun = time.monotonic()
    results = run_trials(asked.count, asked.seed, asked.json, asked.jobs)
    failed = sum(bool(each["wrong"]) for each in results)
    print(f"\n{summary(results)}\n{len(results)} trials, {failed} failed, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


def _as_text(kept: dict[str, Any]) -> str:
    """A line a trial."""
    head = json.dumps({name: value for name, value in kept.items() if name != "trials"}, indent=1)
    lines = ",\n  ".join(json.dumps(each) for each in kept["trials"])
    return f'{head[:-2]},\n "trials": [\n  {lines}\n ]\n}}\n'


def _show(done: int, count: int, result: dict[str, Any]) -> None:
    if result["wrong"]:
        print(f"\r{' ' * 60}\rfailed: {json.dumps(result)}", flush=True)
    filled = 30 * done // count
    print(f"\r[{'#' * filled}{' ' * (30 - filled)}] {done} of {count}", end="", file=sys.stderr, flush=True)
