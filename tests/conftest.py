"""What every test shares: fixtures, and ranks that stay together.

For tests
    ``comm``   MPI.COMM_WORLD. The same test runs on 1 rank and under mpirun; use whatever size there is.
    ``agree``  ``agree(comm, ok, message)`` asserts on all ranks of ``comm`` that ``ok`` held on each; the error names
               the ranks where it did not. Collective: a rank with nothing to complain about calls it too.
    ``two_nodes`` is a Communicator of the same ranks, which take themselves for two nodes; ``apart`` is one whose ranks
               take themselves for a node each.
    ``mpi_tmp_path`` (from pytest-mpi) is one folder for all ranks, ``tmp_path`` one folder for each.
    ``clean_environment(NAME="value")`` is the environment for a process that a test starts itself.
    ``on_ranks(2, "-m", "bitring", ...)`` runs Python on as many ranks, under this environment's mpirun.

Marks: ``single`` runs on one rank only and is left out under mpirun; ``gpu`` is skipped without a CUDA device; ``slow``
is skipped without ``--all``. Property tests draw the same examples on every rank.

After each test the ranks compare its outcome over a communicator of their own. A test that failed on one rank fails on
all, and none walks into the next test alone. tests/run.py names a folder in BITRING_TEST_LOGS; each rank then records
its progress there, and its stacks at a test's time limit, which the runner enforces in pytest-timeout's place.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest

if TYPE_CHECKING:
    from mpi4py import MPI

# Ranks that draw different examples, or stop at different ones because one was slow, would wait for each other.
for name, examples in (("ranks-alike", 40), ("ranks-alike, all", 200)):
    hypothesis.settings.register_profile(
        name,
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )
hypothesis.settings.load_profile("ranks-alike")


class Agree(Protocol):
    def __call__(self, comm: MPI.Comm, ok: bool, message: str = "") -> None: ...


@pytest.fixture
def comm() -> MPI.Intracomm:
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def agree() -> Agree:
    def agree(comm: MPI.Comm, ok: bool, message: str = "") -> None:
        __tracebackhide__ = True
        verdicts: list[tuple[bool, str]] = comm.allgather((bool(ok), str(message)))
        wrong = [f"rank {rank}: {text or 'not so'}" for rank, (good, text) in enumerate(verdicts) if not good]
        if wrong:
            pytest.fail("\n".join(wrong))

    return agree


@contextlib.contextmanager
def _on_nodes(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, node: Callable[[int, int], int], algorithm: str
) -> Generator[Any]:
    """A duplicate of ``comm`` whose ranks are told to be on the node that ``node`` says, of a rank and the size."""
    from mpi4py import MPI

    from bitring.collectives.communicator import Communicator
    from bitring.collectives.runtime import context as state

    def node_of(whole: MPI.Intracomm) -> MPI.Intracomm:
        return MPI.Intracomm(whole.Split(node(whole.rank, whole.size), whole.rank))

    monkeypatch.setattr(state, "node_of", node_of)
    duplicate = Communicator(comm.Dup(), algorithm=algorithm)
    yield duplicate
    duplicate.Free()


@pytest.fixture
def on_nodes(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes such a duplicate of ``comm``: ``with on_nodes(node, algorithm) as duplicate``."""
    from bitring.native import native

    if native() is None or comm.size < 2:
        pytest.skip("needs the native engine, and ranks for two nodes")
    return functools.partial(_on_nodes, comm, monkeypatch)


@pytest.fixture
def two_nodes(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A duplicate of ``comm`` whose ranks are told to be on two nodes: 1 + 2 ranks, 2 + 2, or 2 + 3."""
    from bitring.native import native

    if native() is None or comm.size < 3:
        pytest.skip("needs the native engine, and ranks for two nodes of which one has two")
    with _on_nodes(comm, monkeypatch, lambda rank, size: int(rank >= size // 2), "multilane") as duplicate:
        yield duplicate


@pytest.fixture
def apart(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A duplicate of ``comm`` each of whose ranks is told to be on a node of its own."""
    from bitring.native import native

    if native() is None or comm.size < 2:
        pytest.skip("needs the native engine, and ranks for two nodes")
    with _on_nodes(comm, monkeypatch, lambda rank, size: rank, "auto") as duplicate:
        yield duplicate


@pytest.fixture(scope="session")
def clean_environment() -> Callable[..., dict[str, str]]:
    """Drops what an enclosing launcher or runner left behind; Open MPI writes its part behind os.environ's back."""
    ours = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "HYDRA_", "PRTE_", "BITRING_TEST_", "PYTEST_")

    def environment(**extra: str) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | extra

    return environment


@pytest.fixture
def on_ranks(clean_environment: Callable[..., dict[str, str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns the finished process; ``env`` adds to its environment, ``cwd`` is its folder."""
    spec = importlib.util.spec_from_file_location("bitring_tests_run", Path(__file__).with_name("run.py"))
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)

    def on_ranks(
        ranks: int,
        *arguments: str | Path,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 150,
    ) -> subprocess.CompletedProcess[str]:
        prefix, extra = runner.launcher(ranks)
        return subprocess.run(
            [*prefix, sys.executable, *map(str, arguments)],
            env=clean_environment(**{**extra, **(env or {})}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return on_ranks


@pytest.fixture(scope="session")
def on_survivors(clean_environment: Callable[..., dict[str, str]]) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a script on 3 ranks that the launcher leaves alone when one dies; returns the finished process."""
    mpirun = Path(sys.executable).with_name("mpirun")
    told = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout
    if "HYDRA" not in told.upper():
        pytest.skip("needs MPICH's launcher, which can be told to leave the other ranks alone")

    def on_survivors(script: str) -> subprocess.CompletedProcess[str]:
        command = 'trap "" USR1; "$0" -c "$1" || exit 3'  # the launcher ends all when its own child is killed
        return subprocess.run(
            [mpirun, "-disable-auto-cleanup", "-n", "3", "sh", "-c", command, sys.executable, script],
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    return on_survivors


def _world() -> tuple[int, int]:
    """This process's rank and the world size, as the launcher told them: asking MPI would initialise it."""
    for rank, size in (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


RANK, SIZE = _world()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So a shell starts what runs in its background, and cron everything; tests interrupt themselves and others.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--all"):
        hypothesis.settings.load_profile("ranks-alike, all")
    logs = os.environ.get("BITRING_TEST_LOGS")
    if logs or SIZE > 1:
        config.pluginmanager.register(Lockstep(Path(logs) if logs else None))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The adapters' tests load much and are a stage of their own, which names them."""
    named = any(collection_path.name in argument for argument in config.invocation_params.args)
    return True if collection_path.name.startswith("test_torch_") and not named else None


def _has_device() -> bool:
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        return int(cupy.cuda.runtime.getDeviceCount()) > 0
    except Exception:  # CuPy's own error types cannot be named where it is not installed
        return False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done: set[str] = set()
    if listed := os.environ.get("BITRING_TEST_DONE"):
        done.update(Path(listed).read_text(encoding="utf-8").splitlines())
    left_out = [item for item in items if (SIZE > 1 and "single" in item.keywords) or item.nodeid in done]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    on_device = [item for item in items if "gpu" in item.keywords]
    if on_device and not _has_device():
        for item in on_device:
            item.add_marker(pytest.mark.skip(reason="no CUDA device, or no CuPy"))
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; --all runs it"))


class Lockstep:
    """Keeps the ranks at the same test, and leaves behind what tests/run.py shows when they got stuck."""

    # Before the first test, and between two and at the end, a rank may take this long before its stacks are recorded.
    START_SECONDS, BETWEEN_SECONDS = 400.0, 180.0

    def __init__(self, logs: Path | None) -> None:
        self._progress = (logs / f"progress-{RANK}.jsonl").open("a", encoding="utf-8") if logs else None
        self._stacks = (logs / f"stacks-{RANK}.log").open("a", encoding="utf-8") if logs else None
        self._comm: MPI.Intracomm | None = None
        self._outcome = "passed"
        self._began = 0.0
        self._deadline = 0.0
        self._record(event="began", pid=os.getpid())
        self._watch(self.START_SECONDS)

    def _watch(self, seconds: float) -> None:
        if self._stacks:
            self._stacks.truncate(0)
            faulthandler.dump_traceback_later(seconds, file=self._stacks)

    def _record(self, **entry: Any) -> None:
        if self._progress:
            self._progress.write(json.dumps(entry) + "\n")
            self._progress.flush()

    def _gather(self, value: str) -> list[str]:
        if SIZE == 1:
            return [value]
        if self._comm is None:
            from mpi4py import MPI

            self._comm = MPI.COMM_WORLD.Dup()
        return self._comm.allgather(value)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = [item.nodeid for item in session.items]
        lists = self._gather("\n".join(names))
        if len(set(lists)) > 1:
            other = next(names for names in lists if names != lists[0])
            odd = sorted(set(lists[0].split("\n")) ^ set(other.split("\n")))
            raise pytest.UsageError(f"the ranks collected different tests, or in a different order: {odd[:5]}")
        self._record(event="collected", tests=names)
        self._watch(self.BETWEEN_SECONDS)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._began = "passed", time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        limit = float(settings.timeout)
        self._deadline = time.monotonic() + limit
        self._record(event="start", test=item.nodeid, limit=limit)
        self._watch(limit)
        # True: the timer is set. pytest-timeout would end this rank, and with it the others before they could write.
        return True if self._stacks else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.outcome != "passed" and self._outcome != "failed":
            self._outcome = report.outcome
        if report.failed:
            self._record(event="failing", test=item.nodeid, text=report.longreprtext)
        if call.when == "teardown":
            self._compare(item, report)
        return report

    def _compare(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Collective. Turns ``report`` into a failure when the ranks disagree, and records the common outcome."""
        self._watch(max(0.1, self._deadline - time.monotonic()))  # pytest disarms it when a test fails
        outcomes = self._gather(self._outcome)
        if len(set(outcomes)) > 1 and self._outcome != "failed":
            report.outcome = "failed"
            report.longrepr = f"{self._outcome} here, but: " + ", ".join(
                f"rank {rank} {outcome}" for rank, outcome in enumerate(outcomes) if outcome != self._outcome
            )
        common = outcomes[0] if len(set(outcomes)) == 1 else "failed"
        seconds = round(time.monotonic() - self._began, 2)
        self._record(event="end", test=item.nodeid, outcome=common, seconds=seconds)
        self._watch(self.BETWEEN_SECONDS)

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self) -> Generator[None, Any, Any]:
        result = yield
        self._record(event="finished")
        return result
