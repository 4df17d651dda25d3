"""The checks of ``bitring doctor``. Importing this initialises MPI."""

from __future__ import annotations

import functools
import importlib.util
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.cuda_aware import cuda_aware
from bitring.collectives.interop.mpi_library import library_version
from bitring.collectives.runtime.context import state_of
from bitring.collectives.schedules.schedule import algorithms
from bitring.commands._ranks import ending_together
from bitring.commands._terminal import terminal_width
from bitring.compression.plans.plan import plan_allreduce
from bitring.exit_codes import ExitCode
from bitring.launcher import alone_by_mistake, launched_rank
from bitring.machine import THREAD_LEVELS, package_version, processor, versions
from bitring.native import native
from bitring.nodes import node_map, thread_share

OK, NOTE, FAIL = "ok", "note", "FAIL"

_MIB = 1 << 20
_SHM_NBYTES = 256 * _MIB
"""Below this a container's default of 64 MiB is likely."""

_OPEN_FILES = 1024
_PROBE_SECONDS = 60

# Variables by which a launcher tells a process which rank it is; a child that inherits them takes itself for that rank.
_LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "HYDRA_", "PRTE_", "SLURM_")

_PROBE = """
import cupy
from mpi4py import MPI

sent = cupy.arange(1 << 20, dtype=cupy.float32)
received = cupy.zeros_like(sent)
cupy.cuda.get_current_stream().synchronize()
MPI.COMM_SELF.Sendrecv(sent, 0, 0, received, 0, 0)
raise SystemExit(0 if bool((sent == received).all()) else 1)
"""


class Finding(NamedTuple):
    """One line of the report. ``advice`` says what to do when the status is not "ok"."""

    what: str
    status: str
    text: str
    advice: str = ""


def run() -> None:
    """Check, and end with status 1 when a check failed. Collective."""
    comm = MPI.COMM_WORLD
    with ending_together(comm):
        alone = _world_is_whole()
        if alone.status == FAIL and launched_rank() != 0:
            raise click.exceptions.Exit(ExitCode.FAILED)
        findings = [Finding("bitring", OK, _versions()), _library(), alone, _thread_level(comm)]
        findings += _nodes(comm)
        findings += _by_rank(
            comm, [_native_engine, _shared_memory, _open_files, _locked_memory, _kernel_cache, *_packages()]
        )
        findings += [_resident(comm), _cuda(comm)]
        findings += _self_test(comm)
        if comm.size > 1:
            findings.append(_point_to_point(comm))
        if comm.rank == 0:
            _show(findings)
        if any(finding.status == FAIL for finding in findings):
            raise click.exceptions.Exit(ExitCode.FAILED)


def _versions() -> str:
    found = versions()
    found.pop("mpi")
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _library() -> Finding:
    return Finding("MPI library", OK, f"{library_version()}, MPI {'.'.join(map(str, MPI.Get_version()))}")


def _world_is_whole() -> Finding:
    size = MPI.COMM_WORLD.Get_size()
    mistake = alone_by_mistake(size, library_version())
    if mistake is not None:
        text, _, advice = mistake.partition("; ")
        return Finding("ranks", FAIL, text, advice)
    return Finding("ranks", OK, f"{size}" + " (run under mpirun or srun to check more)" * (size == 1))


def _thread_level(comm: MPI.Intracomm) -> Finding:
    level = MPI.Query_thread()
    if level == MPI.THREAD_MULTIPLE:
        return Finding("thread level", OK, THREAD_LEVELS[level])
    return Finding(
        "thread level",
        NOTE,
        f"{THREAD_LEVELS[level]}: a started plan or request moves only while it is waited for",
        "unset MPI4PY_RC_THREAD_LEVEL and mpi4py.rc.thread_level to get multiple",
    )


def _nodes(comm: MPI.Intracomm) -> Iterator[Finding]:
    """The node map, and each node's cores. Collective."""
    nodes = node_map(comm)
    cores = comm.allgather(sorted(os.sched_getaffinity(0)))
    threads = comm.allgather(thread_share(comm))
    for number, ranks in enumerate(nodes):
        usable = {core for rank in ranks for core in cores[rank]}
        each = {f"{_spans(cores[rank])}, {_count(threads[rank], 'thread')}" for rank in ranks}
        text = f"{_ranks(ranks, comm.size)}: cores {' | '.join(sorted(each))} a rank"
        if len(ranks) > len(usable):
            yield Finding(
                f"node {number}",
                NOTE,
                f"{text}; {_count(len(ranks), 'rank')} on {_count(len(usable), 'core')}",
                "ranks that share a core wait for each other: start fewer, or bind them elsewhere",
            )
        else:
            yield Finding(f"node {number}", OK, text)


def _by_rank(comm: MPI.Intracomm, checks: list[Callable[[], Finding]]) -> Iterator[Finding]:
    """Each check on every rank; equal findings are one line. Collective."""
    everyone = comm.allgather([check() for check in checks])
    for findings in zip(*everyone, strict=True):
        ranks: dict[Finding, list[int]] = {}
        for rank, finding in enumerate(findings):
            ranks.setdefault(finding, []).append(rank)
        for finding, of in ranks.items():
            text = finding.text if len(ranks) == 1 else f"{_ranks(of, comm.size)}: {finding.text}"
            yield finding._replace(text=text)


def _shared_memory() -> Finding:
    what = "/dev/shm"
    try:
        found = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding(what, NOTE, str(error), "MPI libraries exchange through it inside a node: mount a tmpfs there")
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    if size < _SHM_NBYTES:
        return Finding(
            what,
            NOTE,
            f"{_nbytes(size)}, too small for large buffers",
            "in a container: docker run --shm-size=1g or --ipc=host",
        )
    if free < _SHM_NBYTES:
        return Finding(
            what,
            FAIL,
            f"less than {_nbytes(_SHM_NBYTES)} of {_nbytes(size)} are free",
            "remove what jobs that were killed have left there, such as mpich_shm_*",
        )
    return Finding(what, OK, f"{_nbytes(size)}, at least {_nbytes(_floor(free))} free")


def _native_engine() -> Finding:
    what = "native engine"
    module = native()
    if module is not None:
        return Finding(what, OK, f"reduces with {module.instruction_set()} instructions")
    if os.environ.get("BITRING_NATIVE") == "0":
        return Finding(what, NOTE, "left out, as BITRING_NATIVE=0 says", "unset it: Python moves every message now")
    return Finding(what, NOTE, "not built", "install bitring with a C++ compiler: Python moves every message now")


def _resident(comm: MPI.Intracomm) -> Finding:
    """Whether the ranks of each node share memory. Collective."""
    what = "shared memory"
    state = state_of(comm)
    state.prepare("doctor")
    topology = state.topology
    if topology.shared:
        return Finding(what, OK, "the ranks of each node reduce each other's arrays in place")
    if topology.native and topology.nodes < topology.size:
        return Finding(what, NOTE, "there is none", "the warning above says why; arrays go through MPI")
    return Finding(what, OK, "no node has more than one rank, or there is no native engine")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = _limit(soft, "")
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        return Finding("open files", NOTE, text, f"each connection takes one or more: ulimit -n {_limit(hard, '')}")
    return Finding("open files", OK, text)


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = _limit(soft, _nbytes(soft))
    if soft != resource.RLIM_INFINITY and any(Path("/sys/class/infiniband").glob("*")):
        return Finding(
            "locked memory", NOTE, text, "InfiniBand wants it unlimited: memlock in limits.conf, or the batch system"
        )
    return Finding("locked memory", OK, text)


def _kernel_cache() -> Finding:
    from bitring.compression.kernels import onebit_numba
    from bitring.kernel_cache import KernelCache, open_to

    what = "kernel cache"
    advice = "every process compiles for itself, some seconds: point NUMBA_CACHE_DIR to a folder that can be written"
    try:
        folder = Path(KernelCache(onebit_numba.encode).cache_path)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"doctor.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (RuntimeError, OSError) as error:
        return Finding(what, NOTE, f"cannot be written: {error}", advice)
    others = open_to(folder)
    if others is not None:
        return Finding(
            what,
            NOTE,
            f"{folder}: open to {others}",
            "its files are executed: point NUMBA_CACHE_DIR to a folder of your own, made by mkdir -m 700",
        )
    return Finding(what, OK, f"{folder}")


def _packages() -> list[Callable[[], Finding]]:
    packages = {
        "cupy": ("cupy", "gpu", "device buffers"),
        "scikit-learn": ("sklearn", "demo", "the data set digits"),
        "matplotlib": ("matplotlib", "demo", "pictures"),
        "rich": ("rich", "demo", "the progress bar"),
    }
    return [functools.partial(_package, name, *rest) for name, rest in packages.items()]


def _package(name: str, module: str, extra: str, use: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(name, OK, f"not installed; {use} would want it: pip install 'bitring[{extra}]'")
    return Finding(name, OK, package_version(name) or "installed")


def _cuda(comm: MPI.Intracomm) -> Finding:
    """What the library says of device pointers, and what happens when it gets some. Collective."""
    asked = cuda_aware()
    finding = _probed(asked) if comm.rank == 0 else None
    found: Finding = comm.bcast(finding)
    return found


def _probed(asked: bool) -> Finding:
    what = "CUDA-aware MPI"
    says = f"{'yes' if asked else 'no'}, {'as BITRING_CUDA_AWARE says' if _overridden() else 'the library says'}"
    devices = _devices()
    if isinstance(devices, str):
        return Finding(what, OK, f"{says}; not tried: {devices}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=_PROBE_SECONDS, check=False
        )
        works = done.returncode == 0
    except subprocess.TimeoutExpired:
        works = False
    if works and asked:
        return Finding(what, OK, f"{says}; a message between device buffers arrived; {_count(devices, 'device')}")
    if asked:
        return Finding(
            what,
            FAIL,
            f"{says}; but a message between device buffers failed",
            "set BITRING_CUDA_AWARE=0: buffers are then staged through pinned host memory",
        )
    if works:
        return Finding(
            what,
            NOTE,
            f"{says}; but a message of a process to itself between device buffers arrived",
            "if it does between two ranks as well, BITRING_CUDA_AWARE=1 saves the staging",
        )
    return Finding(what, OK, f"{says}; device buffers are staged through pinned memory; {_count(devices, 'device')}")


def _overridden() -> bool:
    return os.environ.get("BITRING_CUDA_AWARE", "") != ""


def _devices() -> int | str:
    """The number of CUDA devices, or why there are none."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        number = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # CuPy's own error types cannot be named where it is not installed
        return f"CuPy finds no device ({str(error).partition(':')[0]})"
    return number or "there is no device"


def _self_test(comm: MPI.Intracomm) -> Iterator[Finding]:
    """AllReduce by every algorithm, and at one bit per value, against NumPy. Collective."""
    for name in algorithms.names():
        yield _tested(comm, f"allreduce {name}", functools.partial(_exact_error, comm, name))
    yield _tested(comm, "allreduce onebit", functools.partial(_onebit_error, comm))


def _tested(comm: MPI.Intracomm, what: str, error: Callable[[], str | None]) -> Finding:
    begin = time.perf_counter()
    problems = comm.allgather(error())
    for rank, problem in enumerate(problems):
        if problem is not None:
            return Finding(what, FAIL, f"rank {rank}: {problem}", "a wrong sum: please report it, with this table")
    return Finding(what, OK, f"right on all ranks, {time.perf_counter() - begin:.2f} s")


def _values(rank: int, n: int) -> Any:
    return np.random.default_rng([rank, n]).standard_normal(n, np.float32)


def _exact_error(comm: MPI.Intracomm, algorithm: str) -> str | None:
    problem = None
    for n in (1, 1000, 300_007):
        x = _values(comm.rank, n)
        plan = plan_allreduce(x, comm=comm, algorithm=algorithm)
        plan()
        plan.free()
        right = np.sum([_values(rank, n) for rank in range(comm.size)], axis=0, dtype=np.float64)
        worst = float(np.abs(x - right).max())
        if not worst < 1e-5 * comm.size:
            problem = problem or f"the sum of {n} values is off by {worst:.3g}"
    return problem


def _onebit_error(comm: MPI.Intracomm) -> str | None:
    """What was applied and what is still owed add up to what was given."""
    n = 100_003
    x = _values(comm.rank, n)
    plan: Any = plan_allreduce(x, comm=comm, compression="onebit")
    plan()
    state = plan.state_dict()
    owed = np.array(state["residual"], np.float64)
    owed[slice(*plan.owned)] += state["owner_residual"]
    comm.Allreduce(MPI.IN_PLACE, owed)
    plan.free()
    right = np.sum([_values(rank, n) for rank in range(comm.size)], axis=0, dtype=np.float64)
    worst = float(np.abs(x + owed - right).max())
    same = len(set(comm.allgather(x.tobytes()))) == 1
    if not same:
        return "ranks got different values"
    return None if worst < 1e-4 * comm.size else f"the sum and its residuals are off by {worst:.3g}"


def _point_to_point(comm: MPI.Intracomm) -> Finding:
    """Latency and bandwidth between ranks 0 and 1. Collective."""
    text = ""
    if comm.rank < 2:
        seconds = [_one_way(comm, nbytes, repeats) for nbytes, repeats in ((8, 200), (4 * _MIB, 10))]
        text = f"{seconds[0] * 1e6:.1f} µs for 8 bytes, {4 * _MIB / seconds[1] / 1e9:.2f} GB/s for 4 MiB"
    comm.Barrier()
    return Finding("rank 0 to 1", OK, comm.bcast(text))


def _one_way(comm: MPI.Intracomm, nbytes: int, repeats: int) -> float:
    """Half the median time of a message there and back."""
    buffer = np.zeros(nbytes, np.uint8)
    times: list[float] = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        if comm.rank == 0:
            comm.Send(buffer, 1)
            comm.Recv(buffer, 1)
        else:
            comm.Recv(buffer, 0)
            comm.Send(buffer, 0)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[3:])) / 2


def _show(findings: list[Finding]) -> None:
    bad = sum(finding.status == FAIL for finding in findings)
    width = terminal_width()
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        _show_plainly(findings)
    else:
        console = Console(force_terminal=width is not None, width=width or 140, highlight=False)
        table = Table(title=f"bitring doctor: {processor()}", title_justify="left", show_lines=False)
        for heading in ("check", "", "found"):
            table.add_column(heading)
        colors = {OK: "green", NOTE: "yellow", FAIL: "bold red"}
        for finding in findings:
            text = finding.text + (f"\n→ {finding.advice}" if finding.advice else "")
            table.add_row(finding.what, f"[{colors[finding.status]}]{finding.status}[/]", escape(text))
        console.print(table)
    click.echo("all checks passed" if not bad else f"{_count(bad, 'check')} failed")


def _show_plainly(findings: list[Finding]) -> None:
    for finding in findings:
        click.echo(f"{finding.what:<28} {finding.status:<5} {finding.text}")
        if finding.advice:
            click.echo(f"{'':<34} → {finding.advice}")


def _nbytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.4g} {unit}"
        number /= 1024
    raise AssertionError


def _floor(nbytes: int) -> int:
    """Down to a power of two: ranks of a node see it change while they look."""
    return 1 << (max(nbytes, 1).bit_length() - 1)


def _limit(value: int, text: str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else text or str(value)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _ranks(ranks: list[int], size: int) -> str:
    if size == 1:
        return "rank 0"
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_spans(ranks)}"


def _spans(numbers: list[int]) -> str:
    """Such as "0-3, 8"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
