"""A whole host dies: all ranks of one emulated host are killed at once; the others must say so within 10 s.

    python benchmarks/host_faults.py --count 24 --json FILE

Each trial is a job on emulated hosts (hosts.py; needs root) of a few collectives, during or before one of which the
first rank of a host kills all processes of that host's ranks. MPICH's mpirun is told not to end a job because processes
died (-disable-auto-cleanup), and lets the ranks of other hosts live; its own process on that host lives on, without
which it would end the whole job. What must hold: every rank of every other host raises a DeadRankError, which names a
rank of the dead host and no other, within 10 s of the kill.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hosts

REPORT_SECONDS = 10.0
"""From the kill until all other ranks have their error."""

WAYS = ("plan", "start", "Allreduce", "Bcast", "Reduce", "Allgather", "trainer", "onebit")

_WARM, _ROUNDS = 2, 5  # the kill is in round _WARM
_JOB_SECONDS = 60.0

# mpirun tells the others of a process's end by SIGUSR1, which would end them.
_WRAPPER = ("-disable-auto-cleanup", "sh", "-c", 'trap "" USR1; "$0" "$@" || exit 3', sys.executable)


@dataclass(frozen=True)
class Trial:
    """``within``: seconds from the collective's beginning to the kill; 0: before it begins."""

    hosts: int
    ranks_per_host: int
    way: str
    values: int
    victim: int
    within: float


def draw(seed: int) -> Iterator[Trial]:
    """An endless list of trials, the same for the same seed."""
    rng = random.Random(seed)
    for way in itertools.cycle(WAYS):
        places, large = rng.choice([(2, 1), (4, 1), (2, 2), (3, 2)]), rng.random() < 0.5
        yield Trial(
            hosts=places[0],
            ranks_per_host=places[1],
            way=way,
            values=1 << 20 if large else 16,
            victim=rng.randrange(places[0]),
            within=round(rng.choice((0.0, rng.uniform(0, 20e-3 if large else 1e-3))), 6),
        )


def work(folder: Path) -> None:
    """One rank of a trial."""
    trial = Trial(**json.loads((folder / "trial.json").read_text(encoding="utf-8")))
    import numpy as np
    from mpi4py import MPI

    import bitring

    comm = bitring.Communicator(MPI.COMM_WORLD.Dup())
    rank, size = comm.Get_rank(), comm.Get_size()
    everyone = comm.allgather((hosts.host(), os.getpid()))
    x, y = np.ones(trial.values, np.float32), np.empty(trial.values, np.float32)
    gathered, w = np.empty((size, trial.values), np.float32), np.zeros(trial.values, np.float32)
    plan: Any = bitring.plan_allreduce(x, comm=comm) if trial.way in ("plan", "start") else None
    trainer: Any = None
    if trial.way in ("trainer", "onebit"):
        compression = "onebit" if trial.way == "onebit" else None
        trainer = bitring.DataParallel({"w": w}, bitring.SGD(lr=1e-3), comm=comm, compression=compression)

    def collective() -> None:
        if trial.way == "plan":
            plan()
        elif trial.way == "start":
            plan.start()
            plan.wait()
        elif trainer is not None:
            trainer.step({"w": x})
        elif trial.way == "Bcast":
            comm.Bcast(x, 0)
        elif trial.way == "Allgather":
            comm.Allgather(x, gathered)
        else:
            getattr(comm, trial.way)(x, y)

    def kill_host() -> None:
        time.sleep(trial.within)
        (folder / "fault").write_text(str(time.monotonic()))
        for host, pid in sorted(everyone, key=lambda each: each[1] == os.getpid()):
            if host == trial.victim + 1:
                os.kill(pid, signal.SIGKILL)

    report: dict[str, Any] = {"error": None}
    try:
        for number in range(_ROUNDS):
            if number == _WARM and rank == trial.victim * trial.ranks_per_host:
                if trial.within == 0:
                    kill_host()
                threading.Thread(target=kill_host, daemon=True).start()
            collective()
            if number >= _WARM:
                time.sleep(0.05)  # a root of a broadcast may have returned
    except Exception as error:
        report = {"error": type(error).__name__, "text": str(error), "ranks": list(getattr(error, "ranks", ()))}
    report["at"] = time.monotonic()
    beside = folder / f"report-{rank}~"
    beside.write_text(json.dumps(report), encoding="utf-8")
    beside.replace(folder / f"report-{rank}")
    time.sleep(2)  # each must find out by itself, and not from the end of another
    os._exit(0)


def run_trial(trial: Trial) -> dict[str, Any]:
    """Run it. ``wrong`` lists what did not hold; empty where all did."""
    with tempfile.TemporaryDirectory(prefix="bitring-host-faults-") as name:
        folder = Path(name)
        (folder / "trial.json").write_text(json.dumps(asdict(trial)), encoding="utf-8")
        script = Path(hosts.__file__)
        options = ["--hosts", str(trial.hosts), "--ranks-per-host", str(trial.ranks_per_host), "--rate", "1gbit", "--"]
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(script), *options, *_WRAPPER, __file__, "--work", name],
            capture_output=True,
            text=True,
            timeout=_JOB_SECONDS,
            check=False,
        )
        wrong: list[str] = []
        dead = range(trial.victim * trial.ranks_per_host, (trial.victim + 1) * trial.ranks_per_host)
        fault, told = folder / "fault", []
        if not fault.exists():
            wrong.append("the kill did not come about")
        for rank in range(trial.hosts * trial.ranks_per_host):
            if rank in dead or not fault.exists():
                continue
            path = folder / f"report-{rank}"
            report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if report is None:
                wrong.append(f"rank {rank} said nothing")
                continue
            told.append(report["at"] - float(fault.read_text()))
            named = report.get("ranks") or []
            if report["error"] != "DeadRankError" or not named or not set(named) <= set(dead):
                wrong.append(f"rank {rank}: {report}")
            elif told[-1] > REPORT_SECONDS:
                wrong.append(f"rank {rank} said so after {told[-1]:.1f} s")
        result = {
            **asdict(trial),
            "told_seconds": round(max(told), 2) if told else None,
            "trial_seconds": round(time.monotonic() - begun, 2),
            "wrong": wrong,
        }
        if wrong:
            result["output"] = (done.stdout + done.stderr)[-2000:]
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Hosts that die.")
    parser.add_argument("--count", type=int, default=24, help="trials (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the list of trials (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work is not None:
        work(asked.work)
        return 0
    results: list[dict[str, Any]] = []
    for trial in itertools.islice(draw(asked.seed), asked.count):
        results.append(run_trial(trial))
        print(json.dumps(results[-1]), flush=True)
        if asked.json:
            lines = ",\n  ".join(map(json.dumps, results))
            text = f'{{\n "benchmark": "host_faults",\n "seed": {asked.seed},\n "trials": [\n  {lines}\n ]\n}}\n'
            asked.json.write_text(text, encoding="utf-8")
    failed = sum(bool(each["wrong"]) for each in results)
    slowest = max((each["told_seconds"] for each in results if each["told_seconds"] is not None), default=0)
    print(f"{len(results)} trials, {failed} failed; told within {slowest:.2f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
