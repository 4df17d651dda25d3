"""Injected faults: one rank dies, stops, leaves or is late; the others must not hang, and must say which it was.

    python benchmarks/faults.py --count 600 --json FILE

Each trial is a job of its own: a few AllReduces, and on one rank a fault before, during or after one of them. Trials
are drawn, by the seed, so that all pairs of conditions come equally often. MPICH's mpirun is told not to end a job
because one of its processes died (-disable-auto-cleanup): it is bitring's detection that is tested. FILE is kept up to
date; a run that was ended goes on where it was.

What must hold: a rank that is killed, or exits, is named by a DeadRankError on every other rank soon, or by a
PeerError where it has broken off a collective before it exits; one that is stopped by a TimeoutError soon after
BITRING_TIMEOUT; an uncaught exception ends the job, with the traceback and the rank's number; a delay changes nothing.
Then the job ends by itself, and leaves no process and nothing in /dev/shm.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fault_jobs import REPORT_SECONDS, command, read, run_all, run_job, write

FAULTS = ("kill", "stop", "exception", "exit", "os_exit", "delay")
MOMENTS = ("before", "during", "after")
RANKS = (2, 3, 4)
WAYS = ("plan", "start", "allreduce", "function", "raw plan", "raw start", "raw function", "trainer")
_COMPRESSED = ("plan", "start", "raw plan", "raw start", "trainer")
SMALL, LARGE = 16, (1 << 20, 1 << 22)

TIMEOUT = 4
"""BITRING_TIMEOUT of the trials in which a rank is stopped, from the round of the fault on."""

_WARM, _ROUNDS = 2, 5  # the fault is in round _WARM
_RAISED = "injected"


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
    from bitring.collectives.runtime import watch

    made = bitring.Communicator(MPI.COMM_WORLD, algorithm=trial.algorithm)
    way = trial.way.removeprefix("raw ")
    comm: Any = made if trial.way == way != "trainer" else MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    shared = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}
    write(folder / f"process-{rank}", {"pid": os.getpid(), "shared": sorted(shared)})
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
            if number == _WARM and trial.fault == "stop":
                os.environ["BITRING_TIMEOUT"] = f"{TIMEOUT:g}"
                watch.timeout.cache_clear()
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
    write(folder / f"report-{rank}", {**report, "at": time.monotonic(), "right": right})
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
        write(self._folder / "fault", {"at": time.monotonic()})

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
            write(self._folder / "missed", {})
            while not (self._folder / "fault").exists():
                time.sleep(0.01)

    def _strike_from_beside(self) -> None:
        time.sleep(self._trial.within)
        if self._trial.fault != "delay":
            self.strike()
        self._tell()
        os.kill(os.getpid(), signal.SIGSTOP)  # and is continued from outside


def run_trial(trial: Trial) -> dict[str, Any]:
    """Run it. ``wrong`` lists what did not hold; empty where all did."""
    return run_job(__file__, trial, _judge)


def _judge(
    trial: Trial, folder: Path, begun: float, ended: float | None, wrong: list[str], code: int
) -> dict[str, Any]:
    output = (folder / "output").read_text(encoding="utf-8", errors="replace")
    fault = read(folder / "fault")
    late = trial.fault == "delay"
    witnesses = [r for r in range(trial.ranks) if late or r != trial.victim]
    reports = {r: read(folder / f"report-{r}") for r in witnesses}
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


def run_trials(count: int, seed: int, path: Path | None, jobs: int = 1) -> list[dict[str, Any]]:
    """The results of ``count`` trials; see ``fault_jobs.run_all``."""
    return run_all("faults", list(itertools.islice(draw(seed), count)), run_trial, seed, path, jobs)


if __name__ == "__main__":
    sys.exit(command("Injected faults.", 600, work, run_trials, summary))
