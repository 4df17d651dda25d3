"""Run the tests on some ranks, so that a test that hangs costs its own time limit and not the rest of the run.

    python tests/run.py [--resume] RANKS LOGS [pytest arguments]

Rank 0's output is shown, the other ranks' goes to files under LOGS. conftest.py writes each rank's progress and, at a
test's time limit, its stacks; the run is then ended from here, when all ranks have written theirs. A test inside which
a run ended, or crashed, has failed: its stacks on all ranks are shown, and a fresh start runs the tests after it.
LOGS/result ends up with the numbers passed, failed and skipped. With --resume the tests that an interrupted run of the
same tests left in LOGS as passed or skipped count as they are, and are not run again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

STARTS = 6
"""How often one configuration is started at most: after this many hangs the rest would hang too."""

START_SECONDS = 400.0
"""A run that has not said anything after this time is ended, and one that has not collected its tests so long after
that; conftest.py knows it too."""

BETWEEN_SECONDS = 180.0
"""A rank has this long between two tests, and from the last test to its end; conftest.py knows it too."""

GRACE_SECONDS = 20.0
"""From the time limit until all ranks have written their stacks, at most."""

# There may be more ranks than cores.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}

# Rank 0 keeps the screen. Each rank has a folder for pytest's temporary files, which are numbered and pruned.
RANK_COMMAND = """
rank=${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}
mkdir -p "$BITRING_TEST_SCRATCH/$rank"
export PYTEST_DEBUG_TEMPROOT="$BITRING_TEST_SCRATCH/$rank"
[ "$rank" = 0 ] || exec >"$BITRING_TEST_LOGS/rank-$rank.log" 2>&1
exec "$@"
"""


def launcher(ranks: int) -> tuple[list[str], dict[str, str]]:
    """The mpirun command for this environment's MPI library, and what it wants in the environment."""
    if ranks == 1:
        return [], {}
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        sys.exit(f"run.py: no mpirun beside {sys.executable} nor on PATH; pip install mpich brings one")
    extra = dict(ONE_THREAD)
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60).stdout
    if "Open MPI" in version:
        extra |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return [mpirun, "--oversubscribe", "--bind-to", "none", "-n", str(ranks)], extra
    return [mpirun, "-n", str(ranks)], extra


class Progress:
    """What the ranks of one start have recorded so far."""

    def __init__(self, logs: Path, ranks: int) -> None:
        self._files = [logs / f"progress-{rank}.jsonl" for rank in range(ranks)]
        self._offsets = [0] * ranks
        self._changed = [time.monotonic()] * ranks
        self.records: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]

    def read(self) -> None:
        for rank, path in enumerate(self._files):
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._offsets[rank])
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written
                    self._offsets[rank] += len(line)
                    self._changed[rank] = time.monotonic()
                    self.records[rank].append(json.loads(line))

    def overdue(self) -> bool:
        """Whether a rank has been where it is for longer than it may."""
        for records, changed in zip(self.records, self._changed, strict=True):
            if not records or records[-1]["event"] == "began":
                allowed = START_SECONDS
            elif records[-1]["event"] in ("start", "failing"):
                allowed = next(record["limit"] for record in reversed(records) if record["event"] == "start")
            else:
                allowed = BETWEEN_SECONDS
            if time.monotonic() - changed > allowed:
                return True
        return False

    def each(self, event: str) -> list[dict[str, Any]]:
        return [record for records in self.records for record in records if record["event"] == event]

    def outcomes(self) -> dict[str, str]:
        return {record["test"]: record["outcome"] for record in self.each("end")}

    def stuck(self) -> str | None:
        """The test that a rank began and none ended."""
        outcomes = self.outcomes()
        return next((record["test"] for record in self.each("start") if record["test"] not in outcomes), None)


def run_once(command: list[str], environment: dict[str, str], logs: Path, ranks: int) -> tuple[int, Progress]:
    """Run ``command`` to its end, or end it when it is overdue. Returns its exit status and the ranks' progress."""
    progress = Progress(logs, ranks)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    shower = threading.Thread(target=show, args=(process.stdout, logs / "rank-0.log"), daemon=True)
    shower.start()
    while process.poll() is None:
        time.sleep(0.2)
        progress.read()
        if progress.overdue():
            await_stacks(logs, ranks)
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(2)
            # Ranks may be in sessions of their own, where the launcher's end does not reach them.
            for pid in [process.pid, *(record["pid"] for record in progress.each("began"))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    shower.join(timeout=30)
    progress.read()
    return process.wait(), progress


def await_stacks(logs: Path, ranks: int) -> None:
    """Wait until all ranks have written where they are, which the processor may be taken away from."""
    until = time.monotonic() + GRACE_SECONDS
    files = [logs / f"stacks-{rank}.log" for rank in range(ranks)]
    while time.monotonic() < until and not all(file.exists() and file.stat().st_size for file in files):
        time.sleep(0.1)
    time.sleep(1)  # a file may be half written


def show(stream: Any, log: Path) -> None:
    with log.open("wb") as file:
        while piece := os.read(stream.fileno(), 65536):
            file.write(piece)
            file.flush()
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()


def stacks(file: Path) -> str:
    """A rank's recorded stacks, without the frames of the test runner itself."""
    if not file.exists():
        return ""
    runner = ("/_pytest/", "/pluggy/", "/pytest/__main__.py", "<frozen runpy>", "/pytest_timeout.py", "/pytest_mpi/")
    lines = file.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not any(part in line for part in runner))


def tail(file: Path, lines: int = 40) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if file.exists() else ""


def report_stuck(test: str, progress: Progress, logs: Path) -> None:
    limit = next(record["limit"] for record in progress.each("start") if record["test"] == test)
    print(f"\nFAILED {test}: did not end within {limit:g} s, or took its process with it")
    for rank, records in enumerate(progress.records):
        print(f"----- rank {rank}")
        for record in records:
            if record["event"] == "failing" and record["test"] == test:
                print(record["text"])
        where = stacks(logs / f"stacks-{rank}.log")
        print(where or tail(logs / f"rank-{rank}.log") or "(it had left no stacks)")


def report_failures(progress: Progress, logs: Path, *, but: str | None) -> None:
    """What rank 0's own output has not shown: the other ranks' failures, and its own when it did not get to its end."""
    records = progress.records[0]
    shown: set[tuple[str, str]] = set()
    if any(record["event"] == "finished" for record in records):
        shown |= {(record["test"], record["text"]) for record in records if record["event"] == "failing"}
    for rank, records in enumerate(progress.records):
        for record in records:
            if record["event"] == "failing" and (record["test"], record["text"]) not in shown and record["test"] != but:
                shown.add((record["test"], record["text"]))
                print(f"----- rank {rank}: {record['test']} (all its output: {logs / f'rank-{rank}.log'})")
                print(record["text"])


def left_by(logs: Path, ranks: int) -> tuple[int, dict[str, str]]:
    """The number of starts that a run has left in ``logs``, and the outcomes of the tests that need not run again."""
    starts = sorted(logs.glob("start-*"))
    outcomes: dict[str, str] = {}
    for start in starts:
        progress = Progress(start, ranks)
        progress.read()
        outcomes |= {test: outcome for test, outcome in progress.outcomes().items() if outcome != "failed"}
    return len(starts), outcomes


def run(ranks: int, logs: Path, arguments: list[str]) -> dict[str, str]:
    """Run the tests, starting again behind each one that hung. Returns each test's outcome."""
    before, outcomes = left_by(logs, ranks)
    prefix, extra = launcher(ranks)
    # Open MPI gives ranks a terminal whether there is one or not.
    options = [f"--color={'yes' if sys.stdout.isatty() else 'no'}"]
    if ranks > 1:
        options += ["--with-mpi", "-p", "no:cacheprovider"]
    pytest = [sys.executable, "-m", "pytest", *options, *arguments]
    for start in range(before + 1, before + STARTS + 1):
        here = logs / f"start-{start}"
        here.mkdir(parents=True)
        done = here / "done"
        done.write_text("".join(f"{test}\n" for test in outcomes), encoding="utf-8")
        with tempfile.TemporaryDirectory(prefix="bitring-", ignore_cleanup_errors=True) as scratch:
            ours = {"BITRING_TEST_LOGS": str(here), "BITRING_TEST_DONE": str(done), "BITRING_TEST_SCRATCH": scratch}
            command = [*prefix, "sh", "-c", RANK_COMMAND, "sh", *pytest]
            status, progress = run_once(command, {**os.environ, **extra, **ours}, here, ranks)
        outcomes |= progress.outcomes()
        stuck = progress.stuck()
        report_failures(progress, here, but=stuck)
        if stuck is not None:
            outcomes[stuck] = "failed"
            report_stuck(stuck, progress, here)
            collected = {test for record in progress.each("collected") for test in record["tests"]}
            if collected <= outcomes.keys():
                return outcomes
            continue
        nothing_to_do = status == 5  # pytest's own status for "no tests", right on a file of tests for one rank
        if status != 0 and not nothing_to_do and "failed" not in progress.outcomes().values():
            outcomes[f"(outside of the tests: exit status {status})"] = "failed"
            print(f"\nFAILED outside of the tests: exit status {status}")
            for rank in range(1, ranks):
                print(f"----- rank {rank}, last lines of {here / f'rank-{rank}.log'}")
                print(stacks(here / f"stacks-{rank}.log") or tail(here / f"rank-{rank}.log"))
        return outcomes
    print(f"\nFAILED: stopped after {STARTS} starts, each ended by a test that hung")
    return outcomes


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what is printed here keeps its place between the runs' output
    given = sys.argv[1:]
    resume = given[0] == "--resume"
    ranks, logs, arguments = int(given[resume]), Path(given[resume + 1]).resolve(), given[resume + 2 :]
    if not resume:
        shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = list(run(ranks, logs, arguments).values())
    passed, failed, skipped = (outcomes.count(word) for word in ("passed", "failed", "skipped"))
    (logs / "result").write_text(f"{passed} {failed} {skipped}\n", encoding="utf-8")
    print(f"{ranks} ranks: {passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
