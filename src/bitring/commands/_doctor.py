"""The work of ``bitring doctor``: its checks, and those that ranks make together. Importing this initialises MPI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import click
from mpi4py import MPI

from bitring.collectives.interop.mpi_library import library_version
from bitring.collectives.runtime.context import context_of
from bitring.commands._doctor_cuda import cuda
from bitring.commands._doctor_process import (
    kernel_cache,
    locked_memory,
    native_engine,
    open_files,
    packages,
    shared_memory,
)
from bitring.commands._doctor_self_test import point_to_point, self_test
from bitring.commands._findings import FAIL, NOTE, OK, Finding, ranks_text, show, spans
from bitring.commands._ranks import ending_together
from bitring.commands._units import count
from bitring.exit_codes import ExitCode
from bitring.launcher import alone_by_mistake, launched_rank
from bitring.machine import THREAD_LEVELS, versions
from bitring.nodes import node_map, thread_share


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
            comm,
            [native_engine, shared_memory, open_files, locked_memory, kernel_cache, *packages()],
        )
        findings += [_resident(comm), cuda(comm)]
        findings += self_test(comm)
        if comm.size > 1:
            findings.append(point_to_point(comm))
        if comm.rank == 0:
            show(findings)
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
        each = {f"{spans(cores[rank])}, {count(threads[rank], 'thread')}" for rank in ranks}
        text = f"{ranks_text(ranks, comm.size)}: cores {' | '.join(sorted(each))} per rank"
        if len(ranks) > len(usable):
            yield Finding(
                f"node {number}",
                NOTE,
                f"{text}; {count(len(ranks), 'rank')} on {count(len(usable), 'core')}",
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
            text = finding.text if len(ranks) == 1 else f"{ranks_text(of, comm.size)}: {finding.text}"
            yield finding._replace(text=text)


def _resident(comm: MPI.Intracomm) -> Finding:
    """Whether the ranks of each node share memory. Collective."""
    what = "shared memory"
    context = context_of(comm)
    context.prepare("doctor")
    topology = context.topology
    if topology.shared:
        return Finding(what, OK, "the ranks of each node reduce each other's arrays in place")
    if topology.native and topology.nodes < topology.size:
        return Finding(what, NOTE, "there is none", "the warning above says why; arrays go through MPI")
    return Finding(what, OK, "no node has more than one rank, or there is no native engine")
