"""Trainings that are preempted at random moments, again and again, and must end as undisturbed ones do.

    python benchmarks/preemptions.py --count 100 --json FILE

``--count`` signals (SIGTERM or SIGUSR1, to the launcher or to one rank) and as many SIGKILLs (of one rank or of all)
come to ``bitring train`` on two ranks, exact and onebit, sync and local, at moments drawn by ``--seed``, from the
launcher's start to its end. Each time it is started again with ``--resume``. A signal must lose no step, a
SIGKILL at most one checkpoint interval, and the run must end with the parameters and the records of an undisturbed one,
bit for bit. Three of four moments are soon after a step drawn beforehand. Interrupted, the same command goes on: FILE
keeps the runs that have ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from run import launcher  # how this environment's mpirun is called

CASES = [("sync", "none"), ("local", "onebit"), ("sync", "onebit"), ("local", "none")]
TAU = 4
INTERVAL_STEPS = 40
"""Between two checkpoints; a multiple of TAU, as they wait for a block's end."""

EVENTS_PER_RUN = 5
PATIENCE_SECONDS = 120.0
"""For a launcher to end after its signal; a busy machine is slow."""

# bitring train, which leaves its process number and the number of the last step it made.
RANK = """
import os, sys
folder, rank = sys.argv.pop(1), os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
with open(f"{folder}/pid-{rank}.new", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"{folder}/pid-{rank}.new", f"{folder}/pid-{rank}")
from bitring.__main__ import main
from bitring.training.data_parallel import DataParallel
made, step = os.open(f"{folder}/made-{rank}", os.O_WRONLY | os.O_CREAT), DataParallel.step
def counted(self, *arguments, **named):
    step(self, *arguments, **named)
    os.pwrite(made, b"%12d" % self.steps, 0)
DataParallel.step = counted
main()
"""


class Run:
    """One training, in a folder of its own, started as often as it takes."""

    def __init__(self, folder: Path, case: tuple[str, str], epochs: int) -> None:
        self.folder, self.output = folder, folder / "run"
        folder.mkdir()
        (mode, compression), (prefix, self.environment) = case, launcher(2)
        self.openmpi = "--oversubscribe" in prefix
        self.command = [*prefix, sys.executable, "-c", RANK, str(folder), "train", "--model", "mlp"]
        self.command += ["--mode", mode, "--compression", compression, "--epochs", str(epochs), "--resume"]
        self.command += ["--checkpoint-every", f"{INTERVAL_STEPS}steps", "--output", str(self.output)]
        self.command += ["--tau", str(TAU)] * (mode != "sync")

    def start(self) -> subprocess.Popen[str]:
        """Start the launcher."""
        for name in ("pid", "made"):
            for rank in range(2):
                (self.folder / f"{name}-{rank}").unlink(missing_ok=True)
        with (self.folder / "log").open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                self.command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def saved(self) -> int:
        """The steps in the last checkpoint."""
        for name in ("checkpoint.npz", "checkpoint.npz.previous"):
            if (self.output / name).exists():
                with zipfile.ZipFile(self.output / name) as file:
                    return int(json.loads(file.read("header.json"))["steps"])
        return 0

    def made(self) -> int:
        """The steps made since the last start: those of the rank that had made most."""
        files = [self.folder / f"made-{rank}" for rank in range(2)]
        return max(int(file.read_text() or 0) if file.exists() else 0 for file in files)

    def pids(self) -> list[int]:
        """Of the ranks that are up."""
        files = [self.folder / f"pid-{rank}" for rank in range(2)]
        return [int(file.read_text()) for file in files if file.exists()]

    def result(self) -> list[Any]:
        """What must be alike: the parameters' digest, and each epoch's record, but for its seconds."""
        alike = ("epoch", "train_loss", "test_accuracy", "bytes_sent", "bytes_exact", "digest")
        records = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((self.output / "summary.json").read_text())
        return [summary["digest"], *([record[name] for name in alike] for record in records)]

    def log(self) -> str:
        """What was printed."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]


def ended(process: subprocess.Popen[str], run: Run) -> int:
    """The launcher's exit status; it is killed, which is a failure, when it does not end."""
    try:
        return process.wait(PATIENCE_SECONDS)
    except BaseException as problem:
        os.killpg(process.pid, signal.SIGKILL)
        for pid in run.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        if isinstance(problem, subprocess.TimeoutExpired):
            raise AssertionError(f"no end within {PATIENCE_SECONDS} s\n{run.log()}") from None
        raise


def deliver(kind: str, process: subprocess.Popen[str], run: Run, rng: random.Random) -> str:
    """Send it; in words, what was sent to whom."""
    ranks = run.pids()
    whole = rng.random() < 0.5 or len(ranks) < 2
    if kind == "kill":
        victims = ranks if whole else [ranks[rng.randrange(2)]]
        number = signal.SIGKILL
    else:
        number = rng.choice((signal.SIGTERM, signal.SIGUSR1))
        if whole and run.openmpi:
            number = signal.SIGUSR1  # after SIGTERM its ranks have no time
        victims = [process.pid] if whole else [ranks[rng.randrange(2)]]
    for pid in victims:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return f"{number.name} to {('all ranks' if kind == 'kill' else 'the launcher') if whole else 'a rank'}"


def disturb(
    kinds: list[str], reference: tuple[list[Any], int, float], run: Run, rng: random.Random
) -> list[dict[str, Any]]:
    """Train with an event of each kind as long as training goes on; what came of each. Raises AssertionError."""
    expected, total, seconds = reference
    kinds, events = kinds.copy(), list[dict[str, Any]]()
    for _ in range(5 * EVENTS_PER_RUN):
        before = run.saved()
        process = run.start()
        begin, sent = time.monotonic(), ""
        # Most of the time goes by before the first step and after the last.
        step = rng.randint(min(before + 1, total), total) if rng.random() < 0.75 else 0
        moment = rng.uniform(0.0, 0.02 if step else seconds)
        while process.poll() is None:
            if run.made() < step:
                begin = time.monotonic()
            if kinds and time.monotonic() - begin > moment and (kinds[0] != "kill" or run.pids()):
                sent = deliver(kinds[0], process, run, rng)
                break
            time.sleep(0.001)
        status = ended(process, run)
        if sent:
            made, saved = max(run.made(), before), run.saved()
            kind, most = kinds.pop(0), 0
            if kind == "kill":
                most = INTERVAL_STEPS
            event = {"kind": kind, "sent": sent, "after_step": step, "after_seconds": moment, "status": status}
            events.append(event | {"steps_made": made, "steps_saved": saved, "before": before})
            assert 0 <= made - saved <= most, f"{events[-1]}: at most {most} steps may be lost\n{run.log()}"
            assert kind == "kill" or status in (0, 75) or made == before, f"{events[-1]}: not saved\n{run.log()}"
        else:
            assert status == 0, run.log()
        if status == 0:
            assert run.result() == expected, f"other results than undisturbed, after {events}"
            return events
    raise AssertionError(f"the run does not end: {events}\n{run.log()}")


def undisturbed(folder: Path, case: tuple[str, str], epochs: int) -> tuple[list[Any], int, float]:
    """What a run ends with, its steps, and its seconds from start to end."""
    run = Run(folder, case, epochs)
    begin = time.monotonic()
    status = ended(run.start(), run)
    assert status == 0, run.log()
    return run.result(), run.saved(), time.monotonic() - begin


def main() -> int:
    """Preempt until there are ``--count`` events of each kind, or one has lost something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="signals, and as many SIGKILLs")
    parser.add_argument("--epochs", type=int, default=20, help="of 23 steps each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, required=True, help="keep the results there, and go on from them")
    options = parser.parse_args()
    settings = {"count": options.count, "epochs": options.epochs, "seed": options.seed}
    kept: dict[str, Any] = {"settings": settings, "runs": []}
    if options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            parser.error(f"{options.json} has results of other settings: {found['settings']}")
        kept = found
    references: dict[tuple[str, str], Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        while True:
            done = [event["kind"] for run in kept["runs"] for event in run["events"]]
            number = len(kept["runs"])
            rng = random.Random(f"{options.seed} {number}")
            missing = [kind for kind in ("signal", "kill") for _ in range(options.count - done.count(kind))]
            if not missing:
                break
            kinds = rng.sample(missing, min(EVENTS_PER_RUN, len(missing)))
            case = CASES[number % len(CASES)]
            if case not in references:
                references[case] = undisturbed(Path(scratch) / f"whole {'-'.join(case)}", case, options.epochs)
            run = Run(Path(scratch) / f"run {number}", case, options.epochs)
            events = disturb(kinds, references[case], run, rng)
            shutil.rmtree(run.folder)
            kept["runs"].append({"case": case, "events": events})
            options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            print(f"run {number}, {', '.join(case)}: {len(events)} times", flush=True)
    everything = [event for run in kept["runs"] for event in run["events"]]
    for kind in ("signal", "kill"):
        lost = [event["steps_made"] - event["steps_saved"] for event in everything if event["kind"] == kind]
        inside = sum(event["steps_made"] > event["before"] for event in everything if event["kind"] == kind)
        print(f"{len(lost)} of the kind {kind}, {inside} after first steps: at most {max(lost)} steps lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
