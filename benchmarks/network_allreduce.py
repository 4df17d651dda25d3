"""AllReduce between emulated hosts: bitring, the MPI library's own, and a plain TCP stream of as many bytes.

    python benchmarks/network_allreduce.py --hosts 4 --rate 1gbit --json FILE --plot FILE

Starts the hosts (hosts.py; needs root) and runs itself on them. float32 sums by plans, in place, by
``Communicator.Allreduce``, in place, by ``bitring.allreduce(out=)``, and by gloo where PyTorch is installed; each is
checked before it is timed, the contenders take turns, and a time is the median of its samples, each the slowest rank's.
Processor seconds are those of all ranks together. The stream carries 2(N-1)/N·n bytes, what an AllReduce of n bytes
between N hosts has to send from each, from the first host to the second. What leaves a host is counted by its
interface; a contender that sent less than it has to, or was faster than the wire, ends the benchmark with an error: it
did not use the network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hosts
import numpy as np

LIBRARY = ("library", "library out of place")
STREAM = "TCP stream"

CALLS = ("Communicator.Allreduce", "bitring.allreduce")
GLOO = "gloo"

_SAMPLE_SECONDS = 20e-3
"""A sample repeats a short call for so long: the token bucket lets the first bytes through at once."""

_LABELS = {LIBRARY[0]: "the library's, in place", LIBRARY[1]: "the library's, out of place"}


class Contender(NamedTuple):
    """``call`` reduces ``source`` to ``result``, which may be the same array; a stream has neither."""

    name: str
    call: Callable[[], None]
    source: Any = None
    result: Any = None


class Sample(NamedTuple):
    """Of one call: seconds on the slowest rank, processor seconds of all ranks, and what left each rank's host."""

    seconds: float
    processor: float
    counted: list[float]  # bytes with headers
    payload: list[float]  # and without


def main() -> int:
    parser = argparse.ArgumentParser(description="AllReduce between emulated hosts.")
    hosts.add_options(parser, hosts=4, rate="1gbit")
    parser.add_argument("--sizes", type=sizes, default=",".join(str(4**k) for k in range(1, 14)), help="%(default)s")
    parser.add_argument("--algorithms", type=lambda text: text.split(","), default="auto", help="%(default)s")
    parser.add_argument("--samples", type=int, default=7, help="times each is timed at each size (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    parser.add_argument("--plot", type=Path, help="draw them to this .png, .svg or .pdf")
    asked = parser.parse_args()
    if asked.hosts < 2:
        parser.error("--hosts: a network has at least 2")
    for path in (asked.json, asked.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.parent}")
    lab = hosts.lab()
    if lab is None:
        if asked.plot:
            from bitring.commands._pictures import figure

            try:
                figure(1, 1)
            except ImportError as error:  # no matplotlib: better known before the measurement
                parser.error(str(error))
        return hosts.rerun(asked)
    work(asked, lab)
    return 0


def sizes(text: str) -> list[int]:
    units = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    found = [re.fullmatch(r"(\d+) ?((?:[KMG]i)?B|)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected sizes in bytes, such as 64KiB,1MiB; got {text!r}")
    return [int(match[1]) * units[match[2]] for match in found if match]


def work(asked: argparse.Namespace, lab: hosts.Lab) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI

    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    with ending_together(comm):
        limit_threads(comm)
        machine = describe(comm)
        if machine["nodes"] != lab.hosts:
            raise RuntimeError(f"{lab.hosts} emulated hosts, but the MPI library sees {machine['nodes']}")
        results: list[dict[str, Any]] = []
        network = {"emulated": True, **lab._asdict()}
        kept: dict[str, Any] = {"benchmark": "network_allreduce", "dtype": "float32", "network": network}
        kept |= {"machine": machine, "results": results}
        if comm.rank == 0:
            print(title(kept))
            print(
                f"{'bytes':>8}  {'contender':<24}{'median':>10}{'processors':>11}{'busbw':>12}{'library':>9}"
                f"{'stream':>8}  bytes that leave a host"
            )
        stream, gloo = make_stream(comm, lab), make_gloo(comm)
        for nbytes in asked.sizes:
            rows = measure(comm, lab, nbytes, asked.algorithms, asked.samples, stream, gloo)
            results += rows
            if comm.rank == 0:
                for row in rows:
                    print(line(row), flush=True)
        if comm.rank == 0:
            if asked.json:
                asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            if asked.plot:
                draw(kept, asked.plot)


def make_stream(comm: Any, lab: hosts.Lab) -> hosts.Stream | None:
    """The yardstick's connection on the first ranks of the first two hosts; None on the others."""
    ends = [comm.allgather(hosts.host()).index(number) for number in (1, 2)]
    return hosts.Stream(1, 2) if comm.rank in ends else None


def make_gloo(comm: Any) -> Callable[[Any], None] | None:
    """gloo's sum of an array in place; None where some rank has no PyTorch. Collective."""
    torch: Any = None
    with contextlib.suppress(ImportError):
        torch = importlib.import_module("torch")
    if not all(comm.allgather(torch is not None)):
        return None
    os.environ["GLOO_SOCKET_IFNAME"] = hosts.INTERFACE
    store = comm.bcast(str(Path(tempfile.mkdtemp(), "store")) if comm.rank == 0 else None)
    group = torch.distributed
    group.init_process_group("gloo", init_method=f"file://{store}", rank=comm.rank, world_size=comm.size)
    return lambda x: group.all_reduce(torch.from_numpy(x))


def measure(
    comm: Any,
    lab: hosts.Lab,
    nbytes: int,
    names: Sequence[str],
    samples: int,
    stream: hosts.Stream | None,
    gloo: Callable[[Any], None] | None,
) -> list[dict[str, Any]]:
    """A row for each contender. Collective, and the same on all ranks."""
    from mpi4py import MPI

    import bitring

    x, y = np.empty(nbytes // 4, np.float32), np.empty(nbytes // 4, np.float32)
    least = 2 * (lab.hosts - 1) * x.nbytes // lab.hosts  # what a host has to send
    plans = {name: bitring.plan_allreduce(x, comm=comm, algorithm=name) for name in names}
    contenders = [Contender(name, plan, x, x) for name, plan in plans.items()]
    own = bitring.Communicator(comm.Dup())
    contenders += [
        Contender(CALLS[0], partial(own.Allreduce, MPI.IN_PLACE, x), x, x),
        Contender(CALLS[1], partial(bitring.allreduce, x, out=y, comm=own), x, y),
        Contender(LIBRARY[0], partial(comm.Allreduce, MPI.IN_PLACE, x), x, x),
        Contender(LIBRARY[1], partial(comm.Allreduce, x, y), x, y),
    ]
    if gloo is not None:
        contenders.append(Contender(GLOO, partial(gloo, x), x, x))
    for contender in contenders:
        check_sum(comm, contender)
    contenders.append(Contender(STREAM, partial(carry, stream, memoryview(bytearray(least if stream else 0)))))
    x.fill(0)  # sums of zeros stay zeros, however often they are summed in place
    calls = [
        max(1, math.ceil(_SAMPLE_SECONDS / take(comm, contender, 1, lab, least).seconds)) for contender in contenders
    ]
    taken: list[list[Sample]] = [[] for _ in contenders]
    for turn in range(samples):
        for i in range(len(contenders)):
            i = (i + turn) % len(contenders)
            taken[i].append(take(comm, contenders[i], calls[i], lab, least))
    for plan in plans.values():
        plan.free()
    own.Free()
    medians = {
        contender.name: statistics.median(sample.seconds for sample in found)
        for contender, found in zip(contenders, taken, strict=True)
    }
    rows = [
        {
            "nbytes": x.nbytes,
            "contender": contender.name,
            **({"algorithm": plans[contender.name].algorithm} if contender.name in plans else {}),
            "seconds": medians[contender.name],
            "processor_seconds": statistics.median(sample.processor for sample in found),
            "samples": [float(f"{sample.seconds:.4g}") for sample in found],
            "factor": 2 * (comm.size - 1) / comm.size,
            "times_the_library": min(medians[name] for name in LIBRARY) / medians[contender.name],
            "part_of_the_stream": medians[STREAM] / medians[contender.name],
            "left_a_host": most(found, "payload"),
            "left_a_host_with_headers": most(found, "counted"),
            "has_to_leave": least,
        }
        for contender, found in zip(contenders, taken, strict=True)
    ]
    # The stream is no sum, and has nothing to compare with.
    for name in ("times_the_library", "factor"):
        del rows[-1][name]
    return rows


def most(samples: Sequence[Sample], field: str) -> float:
    """Bytes a call that left the host that sent the most, the mean of the samples."""
    return round(float(np.max(np.mean([getattr(sample, field) for sample in samples], axis=0))), 1)


def check_sum(comm: Any, contender: Contender) -> None:
    # Small whole numbers: every order of summation gives the same float32.
    pattern = np.arange(contender.source.size, dtype=np.float32) % 17
    np.add(pattern, comm.rank, out=contender.source)
    contender.call()
    right = pattern * comm.size + comm.size * (comm.size - 1) // 2
    verdicts = comm.allgather(bool(np.array_equal(contender.result, right)))
    if not all(verdicts):
        raise RuntimeError(f"{contender.name}: a wrong sum of {pattern.size} values on rank {verdicts.index(False)}")


def carry(stream: hosts.Stream | None, data: memoryview) -> None:
    """The yardstick: ``data`` through ``stream``, until the receiver has it."""
    if stream is None:
        return
    if hosts.host() == 1:
        stream.send(data)
    else:
        stream.receive(data)


def take(comm: Any, contender: Contender, calls: int, lab: hosts.Lab, least: int) -> Sample:
    """One sample of ``calls`` calls. Collective. Raises RuntimeError on all ranks when it did not use the wire."""
    before = hosts.sent()
    comm.Barrier()
    used, begin = time.process_time(), time.perf_counter()
    for _ in range(calls):
        contender.call()
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    done = comm.Ibarrier()
    while not done.Test():  # a blocking barrier would spin on the cores that the stream needs
        time.sleep(2e-4)
    after = hosts.sent()
    mine = (seconds, used, (after.nbytes - before.nbytes) / calls, (after.payload - before.payload) / calls)
    all_seconds, all_used, counted, payload = zip(*comm.allgather(mine), strict=True)
    sample = Sample(max(all_seconds) / calls, sum(all_used) / calls, list(counted), list(payload))
    if sample.seconds * calls * 1.01 < lab.least_seconds(calls * least):
        raise RuntimeError(
            f"{contender.name}: {least} bytes from each host in {sample.seconds:.4f} s, faster than the wire; "
            "emulated hosts share a machine, and it went another way"
        )
    everything = sum(payload) / lab.ranks_per_host
    if contender.source is not None and everything < 0.99 * lab.hosts * least:
        raise RuntimeError(
            f"{contender.name}: {everything:.0f} bytes left the hosts, at least {lab.hosts * least} must; "
            "emulated hosts share a machine, and the rest went another way"
        )
    return sample


def title(kept: Mapping[str, Any]) -> str:
    network, machine = kept["network"], kept["machine"]
    ranks, rate = network["ranks_per_host"], network["rate"]
    wire = f"{rate * 8 / 1e9:.3g} Gbit/s" if rate else "unshaped"
    return (
        f"AllReduce of float32 between {network['hosts']} emulated hosts of {ranks} rank{'s' * (ranks > 1)}, {wire}; "
        f"{machine['versions']['mpi']}, {machine['processor']}, {machine['cores_of_node']} cores"
    )


def line(row: Mapping[str, Any]) -> str:
    algbw, least = row["nbytes"] / row["seconds"], row["has_to_leave"]
    name = row["contender"] + (f" ({row['algorithm']})" if row["contender"] == "auto" else "")
    if row["contender"] == STREAM:
        speeds = f"{speed(least / row['seconds']):>12}{'':>9}"
    else:
        speeds = f"{speed(algbw * row['factor']):>12}{row['times_the_library']:>8.2f}x"
    return (
        f"{size(row['nbytes']):>8}  {name:<24}{duration(row['seconds']):>10}{duration(row['processor_seconds']):>11}"
        f"{speeds}{row['part_of_the_stream']:>8.1%}"
        f"  {row['left_a_host']:.0f} = {row['left_a_host'] / least:.3f} of {least}, "
        f"{row['left_a_host_with_headers'] / least:.3f} with headers"
    )


def size(nbytes: int) -> str:
    unit, name = (1 << 20, "MiB") if nbytes >= 1 << 20 else (1 << 10, "KiB") if nbytes >= 1 << 10 else (1, "B")
    return f"{nbytes / unit:.4g} {name}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.4g} ms"


def speed(nbytes_a_second: float) -> str:
    return f"{nbytes_a_second / 1e6:.4g} MB/s"


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Times, and parts of the stream's speed, by size."""
    from bitring.commands._pictures import COLORS, figure, plain

    picture = figure(10.5, 4.4)
    left, right = picture.subplots(1, 2)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in kept["results"]:
        by_name.setdefault(row["contender"], []).append(row)
    colors = iter(COLORS)
    for name, rows in by_name.items():
        other = name in LIBRARY or name == STREAM
        style = {
            "color": "0.25" if other else next(colors),
            "linestyle": {LIBRARY[1]: "--", STREAM: ":"}.get(name, "-"),
            "linewidth": 1.6,
            "marker": None if other else "o",
            "markersize": 3.5,
        }
        nbytes = [row["nbytes"] for row in rows]
        left.plot(nbytes, [row["seconds"] * 1e3 for row in rows], label=_LABELS.get(name, name), **style)
        right.plot(nbytes, [100 * row["part_of_the_stream"] for row in rows], **style)
    ticks = sorted({row["nbytes"] for row in kept["results"]})
    for axes in (left, right):
        plain(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [size(tick) for tick in ticks], rotation=40, ha="right", fontsize=8)
        axes.minorticks_off()
    left.set_yscale("log")
    left.set_ylabel("time of a call, median, ms")
    right.set_ylim(bottom=0)
    right.set_ylabel("speed, % of a TCP stream of the same bytes")
    picture.legend(loc="outside right center", frameon=False, fontsize=8.5)
    picture.suptitle(title(kept), fontsize=9)
    picture.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
