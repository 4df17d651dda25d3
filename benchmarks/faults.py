"""Injected faults: one rank dies, stops, leaves or is late; the others must not hang, and must say which it was.

    python benchmarks/faults.py --count 600 --json FILE

Each trial is a job of its own: a few AllReduces, and on one rank a fault before, during or after one of them. Trials
are drawn, by the seed, so that all pairs of conditions come equally often. MPICH's mpirun is told not to end a job
because one of its processes died (-disable-auto-cleanup): it is bitring's detection that is tested. FILE is kept up to
date; a run that was ended goes on where it was.

What must hold: a rank that is killed, or exits, is named by a DeadRankError on every other rank within 10 s, or by a
PeerError where it has broken off a collective before it exits; one that is stopped by a TimeoutError soon after
BITRING_TIMEOUT; an uncaught exception ends the job, with the traceback and the rank's number; a delay changes nothing.
Then the job ends by itself, and leaves no process and nothing in /dev/shm.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FAULTS = ("kill", "stop", "exception", "exit", "os_exit", "delay")
MOMENTS = ("before", "during", "after")
RANKS = (2, 3, 4)
WAYS = ("plan", "start", "allreduce", "function", "raw plan", "raw start", "raw function", "trainer")
_COMPRESSED = ("plan", "start", "raw plan", "raw start", "trainer")
SMALL, LARGE = 16, (1 << 20, 1 << 22)

TIMEOUT = 4
"""BITRING_TIMEOUT of the trials in which a rank is stopped."""

REPORT_SECONDS = 10.0
"""From the fault until all other ranks have their error."""

END_SECONDS = 25.0
"""From the fault until the job is over."""

_WARM, _ROUNDS = 2, 5  # the fault is in round _WARM
_START_SECONDS = 60.0
_RAISED = "injected"

# mpirun tells the others of a process's end by SIGUSR1, which ends them; and where a signal was the cause, it sometimes
# ends them by SIGKILL all the same.
_WRAPPER = ("sh", "-c", 'trap "" USR1; "$0" "$@" || exit 3', sys.executable)


@dataclass(frozen=True)
class Trial:
    """``way``: ``plan()``, ``plan.start()`` and ``wait()``, ``comm.Allreduce``, ``bitring.allreduce``, or a trainer's
    step; "raw" ways and the trainer are handed MPI.COMM_WORLD in place of a ``bitring.Communicator``.

    ``resident``: on an array of ``comm.empty``. ``seconds``: the delay; ``within``: from the collective's beginning to
    a fault during it; ``late``: how much later than the victim the other ranks come to it.
    """

    fault: str
    moment: str
    ranks: int
    algorithm: str
    way: str
    compression: str | None
    resident: bool
    values: int
    victim: int
    seconds: float
    within: float
    late: float


def algorithms() -> list[str]:
    """What a trial may ask for; ``multilane`` is for several nodes."""
    import bitring

    return ["auto", *(name for name in bitring.algorithms() if name != "multilane")]


def draw(seed: int) -> Iterator[Trial]:
    """An endless list of trials, the same for the same seed."""
    rng = random.Random(seed)
    names = algorithms()
    seen: Counter[tuple[object, ...]] = Counter()

    def features(t: Trial) -> Iterable[tuple[object, ...]]:
        size = t.values > SMALL
        conditions = (t.fault, t.moment, t.ranks, t.algorithm, t.way, t.compression, t.resident, size)
        yield from itertools.combinations(enumerate(conditions), 2)
        yield (t.fault, t.moment, t.algorithm)
        yield (t.fault, t.moment, t.compression)
        yield (t.fault, t.victim, t.ranks)

    def candidate() -> Trial:
        way, ranks, large = rng.choice(WAYS), rng.choice(RANKS), rng.random() < 0.5
        return Trial(
            fault=rng.choice(FAULTS),
            moment=rng.choice(MOMENTS),
            ranks=ranks,
            algorithm=rng.choice(names),
            way=way,
            compression="onebit" if way in _COMPRESSED and rng.random() < 0.5 else None,
            resident=rng.random() < 0.5,
            values=rng.choice(LARGE) if large else SMALL,
            victim=rng.randrange(ranks),
            seconds=round(rng.uniform(0.5, 1.5), 2),
            within=round(rng.uniform(0, 6e-3 if large else 1e-3), 6),
            late=round(rng.choice((0.0, rng.uniform(0, 3e-3))), 6),
        )

    while True:
        trial = min((candidate() for _ in range(30)), key=lambda t: sum(seen[f] for f in features(t)))
        seen.update(features(trial))
        yield trial


def work(folder: Path) -> None:
    """One rank of a trial."""
    trial = Trial(**json.loads((folder / "trial.json").read_text(encoding="utf-8")))
    import numpy as np
    from mpi4py import MPI

    import bitring

    made = bitring.Communicator(MPI.COMM_WORLD, algorithm=trial.algorithm)
    way = trial.way.removeprefix("raw ")
    comm: Any = made if trial.way == way != "trainer" else MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    shared = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}
    _write(folder / f"process-{rank}", {"pid": os.getpid(), "shared": sorted(shared)})
    x = made.empty(trial.values) if trial.resident else np.empty(trial.values, np.float32)
    plan: Any = None
    trainer: Any = None
    w = np.zeros_like(x)
    if way == "trainer":
        options: dict[str, Any] = {"compression": trial.compression, "algorithm": trial.algorithm}
        trainer = bitring.DataParallel({"w": w}, bitring.SGD(lr=1.0), comm=comm, **options)
    elif way in ("plan", "start"):
        plan = bitring.plan_allreduce(x, comm=comm, algorithm=trial.algorithm, compression=trial.compression)

    def collective(meanwhile: Any = None) -> None:
        if way == "trainer":
            w[:] = 0
            trainer.step({"w": x})
            x[:] = -size * w
        elif way == "plan":
            plan()
        elif way == "start":
            plan.start()
            if meanwhile is not None:
                meanwhile()
            plan.wait()
        elif way == "allreduce":
            comm.Allreduce(MPI.IN_PLACE, x)
        else:
            bitring.allreduce(x, out=x, comm=comm, algorithm=trial.algorithm)

    right = 0

    def run(number: int, do: Any = collective) -> None:
        nonlocal right
        x[:] = rank + 1 + number
        do()
        assert np.allclose(x, size * (size + 1) / 2 + size * number, rtol=1e-5), f"round {number}: wrong sum: {x}"
        right += 1

    victim = rank == trial.victim
    fault = _Fault(trial, folder)
    report: dict[str, Any] = {"error": None}
    try:
        for number in range(_ROUNDS):
            if number == _WARM and victim:
                if trial.moment == "before":
                    fault.strike()
                run(number, lambda: fault.during(collective) if trial.moment == "during" else collective())
                if trial.moment == "after":
                    fault.strike()
                continue
            if number == _WARM:
                time.sleep(trial.late)
            run(number)
    except Exception as error:
        if victim and trial.fault == "exception":
            raise
        if victim and trial.fault == "exit":
            return  # caught, and the end of the script
        report = {"error": type(error).__name__, "text": str(error)}
    _write(folder / f"report-{rank}", {**report, "at": time.monotonic(), "right": right})
    # Each rank must find out by itself, and not from the end of another.
    others = [r for r in range(size) if trial.fault == "delay" or r != trial.victim]
    until = time.monotonic() + REPORT_SECONDS
    while time.monotonic() < until and not all((folder / f"report-{r}").exists() for r in others):
        time.sleep(0.02)


class _Fault:
    """What befalls the victim."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self._trial = trial
        self._folder = folder

    def strike(self, *_: object) -> None:
        """Now, in this thread."""
        fault = self._trial.fault
        self._tell()
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "os_exit":
            os._exit(3)
        elif fault == "delay":
            time.sleep(self._trial.seconds)
        elif fault == "exit" and self._trial.seconds > 1:
            sys.exit(0)
        else:
            raise KeyError(_RAISED)

    def _tell(self) -> None:
        _write(self._folder / "fault", {"at": time.monotonic()})

    def during(self, collective: Any) -> None:
        """While ``collective`` runs."""
        trial = self._trial
        if trial.fault in ("exception", "exit"):
            # As from a signal's handler, or between start and wait.
            if trial.way.endswith("start"):
                collective(lambda: (time.sleep(trial.within), self.strike()))
            signal.signal(signal.SIGALRM, self.strike)
            signal.setitimer(signal.ITIMER_REAL, trial.within + 1e-6)
            collective()
        else:
            threading.Thread(target=self._strike_from_beside, daemon=True).start()
            collective()
        if not (self._folder / "fault").exists():
            _write(self._folder / "missed", {})
            time.sleep(1)

    def _strike_from_beside(self) -> None:
        time.sleep(self._trial.within)
        if self._trial.fault != "delay":
            self.strike()
        self._tell()
        os.kill(os.getpid(), signal.SIGSTOP)  # and is continued from outside


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whoever sees the file sees all of it."""
    beside = path.with_name(path.name + "~")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _ours() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("bitring")}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _environment(trial: Trial) -> dict[str, str]:
    launchers = ("PMI_", "PMIX_", "HYDRA_", "OMPI_", "BITRING_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return environment | ({"BITRING_TIMEOUT": f"{TIMEOUT:g}"} if trial.fault == "stop" else {})


def mpirun() -> str:
    """MPICH's. Ends the program where there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is not None:
        version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
        if "HYDRA" in version:
            return found
    sys.exit("faults.py needs the mpirun of MPICH, beside this Python or on PATH: pip install mpich")


def run_trial(trial: Trial) -> dict[str, Any]:
    """Run it. ``wrong`` lists what did not hold; empty where all did."""
    with tempfile.TemporaryDirectory(prefix="bitring-faults-") as name:
        folder = Path(name)
        _write(folder / "trial.json", asdict(trial))
        before = _ours()
        begun = time.monotonic()
        with (folder / "output").open("w") as output:
            job = subprocess.Popen(
                [mpirun(), "-disable-auto-cleanup", "-n", str(trial.ranks), *_WRAPPER, __file__, "--work", name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(trial),
                start_new_session=True,
            )
            try:
                ended = _watch(trial, folder, job, begun)
            finally:
                processes = [_read(path) for path in folder.glob("process-*[0-9]")]
                wrong = _clean_up(job, processes, before)
        return _judge(trial, folder, begun, ended, wrong, job.returncode)


def _watch(trial: Trial, folder: Path, job: subprocess.Popen[bytes], begun: float) -> float | None:
    """When the job ended by itself; None: it did not. Wakes, or ends, a stopped rank when its time has come."""
    survivors = [r for r in range(trial.ranks) if r != trial.victim]
    fault, pid, woken = None, 0, False
    while job.poll() is None:
        now = time.monotonic()
        if fault is None:
            fault = _read(folder / "fault")
            process = _read(folder / f"process-{trial.victim}")
            pid = process["pid"] if process else 0
        if now > (begun + _START_SECONDS if fault is None else fault["at"] + END_SECONDS):
            return None
        if fault is not None and not woken:
            told = all((folder / f"report-{r}").exists() for r in survivors)
            if trial.fault == "delay" and trial.moment == "during" and now > fault["at"] + trial.seconds:
                woken = True
                _signal(pid, signal.SIGCONT)
            elif trial.fault == "stop" and (told or now > fault["at"] + REPORT_SECONDS + 1):
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
    until = time.monotonic() + 2
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


def _judge(
    trial: Trial, folder: Path, begun: float, ended: float | None, wrong: list[str], code: int
) -> dict[str, Any]:
    output = (folder / "output").read_text(encoding="utf-8", errors="replace")
    fault = _read(folder / "fault")
    late = trial.fault == "delay"
    witnesses = [r for r in range(trial.ranks) if late or r != trial.victim]
    reports = {r: _read(folder / f"report-{r}") for r in witnesses}
    at = fault["at"] if fault else begun
    limit = REPORT_SECONDS + (TIMEOUT if trial.fault == "stop" else 0)
    if fault is None:
        wrong.append("the fault did not come about")
    for rank, report in reports.items():
        if report is None:
            if trial.fault != "exception":
                wrong.append(f"rank {rank} said nothing")
        elif late:
            if report["error"] or report["right"] != _ROUNDS:
                wrong.append(f"rank {rank}: {report['error']}: {report.get('text')}")
        elif not _names(report, trial):
            wrong.append(f"rank {rank}: {report['error']}: {report.get('text')}")
        elif report["at"] - at > limit:
            wrong.append(f"rank {rank} said so after {report['at'] - at:.1f} s")
    if trial.fault == "exception":
        if f"[rank {trial.victim}] KeyError: '{_RAISED}'" not in output:
            wrong.append("the exception was not shown")
        if ended is not None and ended - at > REPORT_SECONDS:
            wrong.append(f"the job ended after {ended - at:.1f} s")
    if late and code != 0:
        wrong.append(f"mpirun returned {code}")
    told = [report["at"] - at for report in reports.values() if report is not None and report["error"]]
    result: dict[str, Any] = {
        **asdict(trial),
        "hit": trial.moment == "during" and not (folder / "missed").exists(),
        "errors": sorted({str(report["error"]) for report in reports.values() if report is not None}),
        "told_seconds": round(max(told), 2) if told else None,
        "end_seconds": None if ended is None else round(ended - at, 2),
        "trial_seconds": round(time.monotonic() - begun, 2),
        "wrong": wrong,
    }
    if wrong:
        result["output"] = output[-3000:]
    return result


def _names(report: dict[str, Any], trial: Trial) -> bool:
    """Whether the error is the one to be had, and names the victim."""
    text = report.get("text", "")
    if report["error"] == "TimeoutError" and trial.fault == "stop":
        found = re.search(r"(?:not come to it|messages due from ranks):? \[([\d, ]*)\]", text)
        return found is not None and str(trial.victim) in found[1].split(", ")
    if report["error"] == "PeerError" and trial.fault in ("exception", "exit"):  # in the call, or before it
        what = f"KeyError: '{_RAISED}'"
        said = ("has failed in it", f"could not take part: {what}", f"raised {what}")
        return any(f"rank {trial.victim} {words}" in text for words in said)
    return report["error"] == "DeadRankError" and f"rank {trial.victim} is gone" in text


def summary(results: list[dict[str, Any]]) -> str:
    """A table by fault."""
    lines = [f"{'fault':<10} {'trials':>6} {'hit during':>11} {'told (s), slowest':>18} {'failed':>7}"]
    for fault in FAULTS:
        these = [each for each in results if each["fault"] == fault]
        told = [each["told_seconds"] for each in these if each["told_seconds"] is not None]
        during = [each["hit"] for each in these if each["moment"] == "during"]
        lines.append(
            f"{fault:<10} {len(these):>6} {sum(during):>5} of {len(during):<3} {max(told, default=0):>17.2f} "
            f"{sum(bool(each['wrong']) for each in these):>7}"
        )
    return "\n".join(lines)


def describe() -> dict[str, Any]:
    """This machine, as a job of two ranks sees it."""
    text = "import json; from mpi4py import MPI; from bitring.nodes import describe as d; m = d(MPI.COMM_WORLD); "
    text += "print(json.dumps(m)) if MPI.COMM_WORLD.rank == 0 else None"
    done = subprocess.run(
        [mpirun(), "-n", "2", sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True
    )
    machine: dict[str, Any] = json.loads(done.stdout)
    return machine


def run_trials(count: int, seed: int, path: Path | None, jobs: int = 1) -> list[dict[str, Any]]:
    """The results of ``count`` trials, ``jobs`` at a time; those that ``path`` has already are not run again."""
    trials = list(itertools.islice(draw(seed), count))
    kept: dict[str, Any] = {"benchmark": "faults", "seed": seed, "machine": None, "trials": []}
    if path is not None and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("seed") != seed:
            sys.exit(f"{path} has trials of seed {kept.get('seed')}")
    if kept["machine"] is None and path is not None:
        kept["machine"] = describe()
    fields = list(asdict(trials[0]))
    done = {tuple(each[name] for name in fields): each for each in kept["trials"]}
    results: dict[int, dict[str, Any]] = {}
    todo: list[int] = []
    for number, trial in enumerate(trials):
        known = done.get(tuple(asdict(trial)[name] for name in fields))
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
                _show(len(results), count, results[number])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[number] for number in range(count)]


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Injected faults.")
    parser.add_argument("--count", type=int, default=600, help="trials (%(default)s)")
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


if __name__ == "__main__":
    sys.exit(main())
