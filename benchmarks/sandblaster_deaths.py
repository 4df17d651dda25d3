"""Deaths in Sandblaster: one rank is killed in the midst of training, or two; the others must lose no bit.

    python benchmarks/sandblaster_deaths.py --count 100 --json FILE

Each trial is a job of its own (``fault_jobs.py``): 12 steps of L-BFGS; a rank is killed at a drawn moment, in a
third of the trials a second one up to 50 ms later, be they rank 0 or not, and the others in a step or where they all
meet. What must hold on those that are left: they make all steps, and their losses and parameters are one rank's to the
bit. Where a shard and its copy were on the two ranks they may have a DeadRankError that names both. Then the job ends
by itself.
FILE is kept up to date; a run that was ended goes on where it was. ``seconds_to_go_on``: from the last death until all
that are left have the shards that they go on with.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fault_jobs import REPORT_SECONDS, command, read, run_all, run_job, write

STEPS = 12
PORTION_SECONDS = 1e-3


@dataclass(frozen=True)
class Trial:
    """``victim`` is killed ``seconds`` after the first step's begin, ``second``, unless it is -1, ``gap`` later."""

    ranks: int
    victim: int
    second: int
    seconds: float
    gap: float
    fault: str = "kill"

    @property
    def victims(self) -> tuple[int, ...]:
        """Who is killed."""
        return (self.victim,) if self.second < 0 else (self.victim, self.second)


def draw(seed: int) -> Iterator[Trial]:
    """An endless list of trials, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        ranks = rng.choice((2, 3, 4, 5))
        victim, second = rng.sample(range(ranks), 2)
        if ranks == 2 or rng.random() < 0.5:
            second = -1
        gap = 0.0 if second < 0 else round(rng.choice((0.0, rng.uniform(0, 5e-3), rng.uniform(0, 0.05))), 6)
        yield Trial(ranks, victim, second, round(rng.uniform(0, 0.15), 6), gap)


def work(folder: Path) -> None:
    """One rank of a trial."""
    trial = Trial(**json.loads((folder / "trial.json").read_text(encoding="utf-8")))
    import numpy as np
    from mpi4py import MPI

    import bitring

    class Sleeper(bitring.Softmax):
        seconds = 0.0

        def loss_and_gradients(self, *args: Any, **more: Any) -> Any:
            time.sleep(self.seconds)
            return super().loss_and_gradients(*args, **more)

    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 5)), rng.integers(0, 3, 200)

    def begun(comm: Any) -> tuple[Any, Any]:
        model = Sleeper((5,), 3, dtype=np.float64, seed=comm.Get_rank())
        return model, bitring.Sandblaster(model, bitring.LBFGS(memory=4), comm=comm, portions=20)

    alone = begun(MPI.COMM_SELF)[1]
    wanted = [alone.step(x, y) for _ in range(STEPS)]
    end = alone.parameters()
    alone.free()
    model, job = begun(comm)
    model.seconds = PORTION_SECONDS
    rank = comm.Get_rank()
    shared = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}
    write(folder / f"process-{rank}", {"pid": os.getpid(), "shared": sorted(shared)})
    job.synchronize()

    def strike() -> None:
        with contextlib.suppress(OSError):  # both write it at the same time
            write(folder / "fault", {"at": time.monotonic()})
        os.kill(os.getpid(), signal.SIGKILL)

    went_on: list[float] = []

    def watch() -> None:
        while job._service.held.era < len(trial.victims):
            time.sleep(1e-3)
        went_on.append(time.monotonic())

    threading.Thread(target=watch, daemon=True).start()
    if rank in trial.victims:
        threading.Timer(trial.seconds + trial.gap * (rank == trial.second), strike).start()
    report: dict[str, Any] = {"error": None}
    try:
        losses = [job.step(x, y) for _ in range(STEPS)]
        if rank in trial.victims:
            time.sleep(30)  # until it is killed
        got = job.parameters()
        report["equal"] = losses == wanted and all((w == end[name]).all() for name, w in got.items())
        report["left"] = job.comm.Get_size()
    except Exception as error:
        report |= {"error": type(error).__name__, "text": str(error)}
    report |= {"at": time.monotonic(), "went_on": max(went_on, default=None)}
    write(folder / f"report-{rank}", report)
    if report["error"] is None:
        job.free()
        return
    # Each rank must find out by itself, and not from the end of another.
    until = time.monotonic() + REPORT_SECONDS
    others = [r for r in range(trial.ranks) if r not in trial.victims]
    while time.monotonic() < until and not all((folder / f"report-{r}").exists() for r in others):
        time.sleep(0.02)


def run_trial(trial: Trial) -> dict[str, Any]:
    return run_job(__file__, trial, _judge)


def _may_be_lost(trial: Trial) -> bool:
    """Whether a shard and its copy, half of the ranks further, were on the two victims."""
    distance = trial.ranks // 2
    pairs = ((rank, (rank + distance) % trial.ranks) for rank in range(trial.ranks))
    return any(set(pair) == set(trial.victims) for pair in pairs)


def _judge(
    trial: Trial, folder: Path, begun: float, ended: float | None, wrong: list[str], code: int
) -> dict[str, Any]:
    output = (folder / "output").read_text(encoding="utf-8", errors="replace")
    fault = read(folder / "fault")
    reports = {r: read(folder / f"report-{r}") for r in range(trial.ranks) if r not in trial.victims}
    if fault is None:
        wrong.append("nobody was killed")
    for rank, report in reports.items():
        if report is None:
            wrong.append(f"rank {rank} said nothing")
        elif report["error"] is not None:
            named = all(str(victim) in report["text"] for victim in trial.victims)
            if report["error"] != "DeadRankError" or not named or not _may_be_lost(trial):
                wrong.append(f"rank {rank}: {report['error']}: {report['text']}")
        elif not report["equal"] or report["left"] != len(reports):
            wrong.append(f"rank {rank} has other bits, or other ranks: {report['left']}")
    said = [report for report in reports.values() if report is not None]
    if len({report["error"] for report in said}) > 1:
        wrong.append("ranks have different errors")
    went_on = [report["went_on"] for report in said if report["went_on"] is not None]
    result: dict[str, Any] = {
        **asdict(trial),
        "lost": any(report["error"] is not None for report in said),
        "seconds_to_go_on": round(max(went_on) - fault["at"], 3) if went_on and fault else None,
        "trial_seconds": round(time.monotonic() - begun, 2),
        "wrong": wrong,
    }
    if wrong:
        result["output"] = output[-3000:]
    return result


def summary(results: list[dict[str, Any]]) -> str:
    """A table by the number of deaths."""
    lines = [
        f"{'deaths':<8} {'trials':>6} {'rank 0':>7} {'lost':>5} {'to go on (s), median':>21} {'most':>6} {'failed':>7}"
    ]
    for deaths in (1, 2):
        these = [each for each in results if (each["second"] >= 0) == (deaths == 2)]
        took = [each["seconds_to_go_on"] for each in these if each["seconds_to_go_on"] is not None] or [0]
        lines.append(
            f"{deaths:<8} {len(these):>6} {sum(0 in (each['victim'], each['second']) for each in these):>7} "
            f"{sum(each['lost'] for each in these):>5} {statistics.median(took):>21.3f} {max(took):>6.3f} "
            f"{sum(bool(each['wrong']) for each in these):>7}"
        )
    return "\n".join(lines)


def run_trials(count: int, seed: int, path: Path | None, jobs: int = 1) -> list[dict[str, Any]]:
    """The results of ``count`` trials; see ``fault_jobs.run_all``."""
    return run_all("sandblaster_deaths", list(itertools.islice(draw(seed), count)), run_trial, seed, path, jobs)


if __name__ == "__main__":
    sys.exit(command("Deaths in Sandblaster.", 100, work, run_trials, summary))
