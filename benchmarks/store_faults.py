"""Faults in stores: a worker or an owner dies, stops, leaves, ends early, raises or has a NaN; nobody hangs for it.

    python benchmarks/store_faults.py --count 300 --json FILE

Each trial is a job of its own (``fault_jobs.py``): steps in one of the free modes, or of a ``ParameterStore``; on one
rank a fault, before or in the midst of a step; and ``synchronize`` at the end. Trials are drawn, by the seed, so that
all pairs of conditions come equally often. FILE is kept up to date; a run that was ended goes on where it was.

What must hold on all other ranks: of one that is killed they have a DeadRankError that names it, of one that is
stopped a TimeoutError that does, in ``synchronize`` at the latest. Who leaves, has a NaN, ends early or raises changes
nothing: they make all their steps. In a trainer's ``synchronize``, where all must meet, they have a DeadRankError of
who has ended, and a PeerError of who has raised (which in hogwild, where there is no store, ends the job); a NaN was
raised on each once, as a NonFiniteError; and where updates are added up, without compression, they come to their
number. Then the job ends by itself, and leaves no process and nothing in /dev/shm.

With copies of shards the others go on without who was killed, has ended or has raised: they make all their steps, and
where updates are added up each of theirs is there once, beside a number of the dead rank's that it may have made.
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

FAULTS = ("kill", "stop", "leave", "end", "exception", "nan")
MODES = (
    "store",  # a ParameterStore
    "asynchronous:scale=none",
    "ssp:staleness=1",
    "ssp:staleness=1,fetch=2,push=2",
    "soft_sync:gather=2",
    "backup_workers:gather=2",
    "project_adam",
    "peers",
    "hogwild:locks=true",
)
_ADDING = ("store", "asynchronous", "ssp", "project_adam", "hogwild")
"""Those in which the parameters are the number of updates."""

SERVERS = (None, 1, 4)
"""None: in shared memory where that serves; 1: rank 0 is the owner; 4: all ranks are."""

COMPRESSIONS = ("float16", "onebit")
"""The first is served by the portable service, the second by the native one."""

RANKS = (2, 3, 4)

TIMEOUT = 8
"""BITRING_TIMEOUT of the trials in which a rank is stopped, when the ranks have met."""

STEPS = 24
WINDOW = 4
"""So many pushes may be under way from a rank to a shard; with those of two steps each, of twice as many steps."""

_MARK = 1000.0
"""So large are the updates of a rank that the others outlive: told from theirs in the sum."""

_RAISED = "injected"


@dataclass(frozen=True)
class Trial:
    """``step``: of the fault; ``within``: seconds from its beginning to the fault, 0: before it."""

    fault: str
    mode: str
    servers: int | None
    ranks: int
    compression: str | None
    values: int
    victim: int
    step: int
    within: float
    copies: int = 0


def draw(seed: int) -> Iterator[Trial]:
    """An endless list of trials, the same for the same seed."""
    rng = random.Random(seed)
    seen: Counter[tuple[object, ...]] = Counter()

    def features(t: Trial) -> Iterable[tuple[object, ...]]:
        conditions = (t.fault, t.mode, t.servers, t.ranks, t.compression, t.values > 1000, t.within > 0, t.copies)
        yield from itertools.combinations(enumerate(conditions), 2)
        yield (t.fault, t.victim == 0, t.servers)
        yield (t.fault, t.mode, t.servers)
        yield (t.fault, t.mode, t.copies)
        yield (t.fault, t.victim == 0, t.copies, t.servers)

    def candidate() -> Trial:
        mode, fault, ranks = rng.choice(MODES), rng.choice(FAULTS), rng.choice(RANKS)
        served = mode not in ("peers", "hogwild:locks=true")
        compressed = served and mode != "store" and rng.random() < 0.3
        return Trial(
            copies=int(served and rng.random() < 0.4),
            fault=fault,
            mode=mode,
            servers=rng.choice(SERVERS) if served else None,
            ranks=ranks,
            compression=rng.choice(COMPRESSIONS) if compressed else None,
            values=rng.choice((40, 200_000)),
            victim=rng.randrange(ranks),
            step=rng.randrange(1, STEPS - 4),
            within=round(rng.choice((0.0, rng.uniform(0, 4e-3))), 6) if fault in ("kill", "stop") else 0.0,
        )

    while True:
        trial = min((candidate() for _ in range(30)), key=lambda t: sum(seen[f] for f in features(t)))
        seen.update(features(trial))
        yield trial


class _Trainer:
    """The steps of a trial in a mode."""

    def __init__(self, comm: Any, trial: Trial) -> None:
        import numpy as np

        import bitring

        self.w: Any = comm.empty(trial.values) if trial.mode.startswith("hogwild") else np.empty(trial.values, "f")
        self.w[:] = 0
        self._ones = np.ones_like(self.w)
        mode = trial.mode
        if trial.servers is not None:
            mode += f"{',' if ':' in mode else ':'}servers={trial.servers}"
        if trial.copies:
            mode += f"{',' if ':' in mode else ':'}copies={trial.copies}"
        options: dict[str, Any] = {"mode": mode, "compression": trial.compression}
        self._trainer = bitring.DataParallel({"w": self.w}, bitring.SGD(lr=1.0), comm=comm, **options)
        self.told = 0

    def step(self, factor: float = -1.0) -> None:
        """A step; of a NonFiniteError, in which it was not made, it is made again."""
        from bitring import NonFiniteError

        try:
            self._trainer.step({"w": factor * self._ones})
        except NonFiniteError:
            self.told += 1
            self.step()

    def leave(self) -> None:
        self._trainer.leave()

    def synchronize(self) -> None:
        from bitring import NonFiniteError

        try:
            self._trainer.synchronize()
        except NonFiniteError:  # it is complete all the same
            self.told += 1

    def free(self) -> None:
        self._trainer.free()


class _Store:
    """The same of a store's clocks."""

    def __init__(self, comm: Any, trial: Trial) -> None:
        import numpy as np

        import bitring

        self.w: Any = np.zeros(trial.values, "f")
        self._ones = np.ones_like(self.w)
        options: dict[str, Any] = {"staleness": 1, "servers": trial.servers, "copies": trial.copies}
        self._store = bitring.ParameterStore({"w": self.w}, bitring.SGD(lr=1.0), comm=comm, **options)
        self.told = 0

    def step(self, factor: float = -1.0) -> None:
        from bitring import NonFiniteError

        self._store.get()
        try:
            self._store.inc({"w": factor * self._ones})
        except NonFiniteError:
            self.told += 1
        self._store.clock()

    def leave(self) -> None:
        self._store.leave()

    def synchronize(self) -> None:
        self.w = self._store.synchronize()["w"]

    def free(self) -> None:
        self._store.free()


def work(folder: Path) -> None:
    """One rank of a trial."""
    trial = Trial(**json.loads((folder / "trial.json").read_text(encoding="utf-8")))
    from mpi4py import MPI

    import bitring

    comm = bitring.Communicator(MPI.COMM_WORLD)
    rank, size = comm.Get_rank(), comm.Get_size()
    shared = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}
    write(folder / f"process-{rank}", {"pid": os.getpid(), "shared": sorted(shared)})
    if trial.fault == "stop":
        os.environ["BITRING_TIMEOUT"] = f"{TIMEOUT:g}"
    training = (_Store if trial.mode == "store" else _Trainer)(comm, trial)
    victim = rank == trial.victim
    weight = _MARK if victim and _outlived(trial) else 1.0
    training.step(-weight)
    training.synchronize()

    def strike() -> None:
        write(folder / "fault", {"at": time.monotonic()})
        if trial.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif trial.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif trial.fault == "end":
            sys.exit()
        else:
            assert trial.fault == "exception"
            raise KeyError(_RAISED)

    report: dict[str, Any] = {"error": None}
    made = 1
    try:
        for number in range(1, STEPS):
            factor = -weight
            if victim and number == trial.step:
                if trial.fault == "leave":
                    write(folder / "fault", {"at": time.monotonic()})
                    training.leave()
                    break
                if trial.fault == "nan":
                    write(folder / "fault", {"at": time.monotonic()})
                    factor = float("nan")
                elif not trial.within:
                    strike()
                else:
                    threading.Timer(trial.within, strike).start()
            training.step(factor)
            made += 1
            time.sleep(2e-3)
        if victim and trial.within:
            time.sleep(30)  # until the fault
        training.synchronize()
    except Exception as error:
        if victim and trial.fault == "exception":
            raise
        report = {"error": type(error).__name__, "text": str(error)}
    report |= {"at": time.monotonic(), "made": made, "told": training.told}
    report |= {"least": float(training.w.min()), "most": float(training.w.max())}
    write(folder / f"report-{rank}", report)
    if report["error"] is None and (trial.fault in ("leave", "nan") or trial.copies):
        training.free()
        return
    # Each rank must find out by itself, and not from the end of another.
    until = time.monotonic() + REPORT_SECONDS
    others = [r for r in range(size) if r != trial.victim]
    while time.monotonic() < until and not all((folder / f"report-{r}").exists() for r in others):
        time.sleep(0.02)


def run_trial(trial: Trial) -> dict[str, Any]:
    """Run it. ``wrong`` lists what did not hold; empty where all did."""
    return run_job(__file__, trial, _judge)


def _ends_all(trial: Trial) -> bool:
    """Whether the job ends, as without a store: no rank of a hogwild run has anything that others need."""
    return trial.fault == "exception" and trial.mode.startswith("hogwild")


def _outlived(trial: Trial) -> bool:
    """Whether the others go on when the rank is killed."""
    return trial.fault == "kill" and trial.copies > 0


def _expected(trial: Trial) -> str | None:
    """The error that the others have."""
    if trial.copies and trial.fault != "stop":
        return None
    if trial.fault in ("kill", "stop"):
        return {"kill": "DeadRankError", "stop": "TimeoutError"}[trial.fault]
    if trial.mode == "store" or trial.fault in ("leave", "nan"):
        return None
    return {"end": "DeadRankError", "exception": "PeerError"}[trial.fault]


def _names(text: str, victim: int) -> bool:
    """Whether the error's text names the rank, alone or among others."""
    alone = re.search(rf"rank {victim}\b", text)
    return alone is not None or any(str(victim) in found.split(", ") for found in re.findall(r"\[([\d, ]*)\]", text))


def _judge(
    trial: Trial, folder: Path, begun: float, ended: float | None, wrong: list[str], code: int
) -> dict[str, Any]:
    output = (folder / "output").read_text(encoding="utf-8", errors="replace")
    fault = read(folder / "fault")
    at = fault["at"] if fault else begun
    lives = trial.fault in ("leave", "nan")
    reports = {r: read(folder / f"report-{r}") for r in range(trial.ranks) if lives or r != trial.victim}
    limit = 2 * REPORT_SECONDS + (TIMEOUT if trial.fault == "stop" else 0)
    expected = _expected(trial)
    if fault is None:
        wrong.append("the fault did not come about")
    for rank, report in reports.items():
        if report is None:
            if not _ends_all(trial):
                wrong.append(f"rank {rank} said nothing")
            continue
        if _ends_all(trial):
            continue  # it had made all its steps by then
        text = f"{report['error']}: {report.get('text')}"
        if report["error"] != expected or (expected is not None and not _names(text, trial.victim)):
            wrong.append(f"rank {rank}: {text}")
        elif report["at"] - at > limit:
            wrong.append(f"rank {rank} said so after {report['at'] - at:.1f} s")
        elif report["made"] != STEPS and expected is None and rank != trial.victim:
            wrong.append(f"rank {rank} has made {report['made']} steps")
    if (lives or _outlived(trial)) and not wrong:
        wrong += _wrong_sums(trial, reports)
    if lives and code != 0:
        wrong.append(f"mpirun returned {code}")
    if trial.fault == "exception" and f"[rank {trial.victim}] KeyError: '{_RAISED}'" not in output:
        wrong.append("the exception was not shown")
    told = [report["at"] - at for report in reports.values() if report is not None and report["error"]]
    result: dict[str, Any] = {
        **asdict(trial),
        "errors": sorted({str(report["error"]) for report in reports.values() if report is not None}),
        "told_seconds": round(max(told), 2) if told else None,
        "end_seconds": None if ended is None else round(ended - at, 2),
        "trial_seconds": round(time.monotonic() - begun, 2),
        "wrong": wrong,
    }
    if wrong:
        result["output"] = output[-3000:]
    return result


def _wrong_sums(trial: Trial, reports: dict[int, dict[str, Any]]) -> Iterator[str]:
    """What all ranks have at the end, and were told."""
    nan = trial.fault == "nan"
    for rank, report in reports.items():
        told = nan * (trial.mode != "store" or rank == trial.victim)
        if report["told"] != told:
            yield f"rank {rank} has raised {report['told']} NonFiniteErrors"
    ends = {(report["least"], report["most"]) for report in reports.values()}
    if len(ends) > 1:
        yield f"ranks differ: {sorted(ends)}"
    made = sum(report["made"] for report in reports.values()) - nan
    if _outlived(trial):
        if trial.compression is None and trial.mode.startswith(_ADDING):
            for end in itertools.chain.from_iterable(ends):
                theirs, ours = divmod(end, _MARK)
                if ours != made or not trial.step - 2 * WINDOW <= theirs <= STEPS:
                    yield f"{made} updates of those that are left came to {ours:g}, beside {theirs:g} of the dead rank"
        return
    if trial.compression is None and trial.mode.startswith(_ADDING) and ends != {(made, made)}:
        yield f"{made} updates came to {sorted(ends)}"


def summary(results: list[dict[str, Any]]) -> str:
    """A table by fault."""
    lines = [f"{'fault':<10} {'trials':>6} {'at owners':>10} {'told (s), slowest':>18} {'failed':>7}"]
    for fault in FAULTS:
        these = [each for each in results if each["fault"] == fault]
        told = [each["told_seconds"] for each in these if each["told_seconds"] is not None]
        owners = sum(each["servers"] != 1 or each["victim"] == 0 for each in these)
        lines.append(
            f"{fault:<10} {len(these):>6} {owners:>10} {max(told, default=0):>18.2f} "
            f"{sum(bool(each['wrong']) for each in these):>7}"
        )
    return "\n".join(lines)


def run_trials(count: int, seed: int, path: Path | None, jobs: int = 1) -> list[dict[str, Any]]:
    """The results of ``count`` trials; see ``fault_jobs.run_all``."""
    return run_all("store_faults", list(itertools.islice(draw(seed), count)), run_trial, seed, path, jobs)


if __name__ == "__main__":
    sys.exit(command("Faults in stores.", 300, work, run_trials, summary))
