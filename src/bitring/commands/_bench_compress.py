"""The measurement of ``bitring bench compress``. Importing this initialises MPI."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.steps import Progress
from bitring.collectives.runtime.context import context_of
from bitring.commands._bench_allreduce import dtype_of
from bitring.commands._pictures import COLORS, figure, plain
from bitring.commands._ranks import ending_together, limit_threads, meet, together
from bitring.commands._tables import show_table
from bitring.commands._wire import wire
from bitring.compression.encoder import Encoder, residual_dtype
from bitring.compression.exchange.exchange import Exchange
from bitring.compression.exchange.once_a_node import once_a_node
from bitring.compression.exchange.owner_schedule import encoders, flat_name
from bitring.compression.reducer import unflatten
from bitring.compression.reducers import powersgd
from bitring.nodes import describe
from bitring.settings import make
from bitring.training.data_parallel import DataParallel
from bitring.training.optimizers.sgd import SGD
from bitring.training.prediction.cluster import Kernel, Machine, write_constants

ADD, IN_PLACE, COPY, PACKBITS, PRODUCT = "np.add", "np.add in place", "copy", "np.packbits encode", "matrix product"
STEP, STEP_ARRAYS = "step without exchange", "step without exchange, many arrays"
POWERSGD, POWERSGD_ARRAYS = "powersgd", "powersgd, many arrays"
"""In place, no line of memory is read only to be overwritten: this comes closest to what the memory can do."""

_YARDSTICKS = {ADD: 12, IN_PLACE: 12, COPY: 8}  # bytes per value
_PRODUCT_SIDE = 768
_ARRAYS = 256  # of one value each
_MATRICES, _MATRIX = 64, (16, 16)
_PACKBITS_BLOCK = 1024  # values that share two levels, as of onebit by default


class _Contender(NamedTuple):
    """``nbytes``: what a value has to move through memory, by the algorithm; 0 where that is not the point."""

    name: str
    dtype: str
    call: Callable[[], object]
    nbytes: float
    encoder: str | None = None
    operation: str | None = None


def run(
    json_path: Path | None, plot: Path | None, names: list[str] | None, dtypes: list[str], n: int, samples: int
) -> None:
    """Measure, print, and keep the results. Collective."""
    world = MPI.COMM_WORLD
    with ending_together(world):
        chosen = together(world, lambda: _checked(world, json_path, plot, names, dtypes, n))
        limit_threads(world)
        machine = describe(world)
        types = [dtype_of(each) for each in dtypes]
        once_a_node(context_of(world), lambda: _compile(chosen.values(), types), "bench compress")
        contenders = together(world, lambda: _contenders(world, chosen, types, n))
        if world.rank == 0:
            click.echo(f"compress, {n:,} values, {world.size} ranks, {machine['processor']}")
        results: list[dict[str, Any]] = []
        for ranks in sorted({1, world.size}):
            taken = _sample(world, contenders, samples, alone=ranks == 1)
            rows = _rows(contenders, taken, n, ranks)
            results += rows
            if world.rank == 0:
                click.echo("\none rank alone" if ranks == 1 else f"\neach of {ranks} ranks at once")
                _show(rows)
        network = wire(world)
        if world.rank == 0:
            found = constants(machine, results, n)
            if network is not None:
                found = dataclasses.replace(found, **network._asdict())
                click.echo(
                    f"\nbetween nodes: {network.latency * 1e6:.3g} µs per message, {network.bandwidth / 1e9:.3g} GB/s "
                    f"each way, which takes {network.wire_work * 1e9:.2g} ns of a processor a byte"
                )
            kept = {
                "benchmark": "compress",
                "machine": machine,
                "values": n,
                "constants": write_constants(found),
                "results": results,
            }
            if json_path is not None:
                json_path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            if plot is not None:
                draw(kept, plot)


def _checked(
    comm: MPI.Intracomm, json_path: Path | None, plot: Path | None, names: list[str] | None, dtypes: list[str], n: int
) -> dict[str, Encoder]:
    """Name -> encoder, of a square weight of ``n`` values where that can be; and of a buffer, where that is another."""
    side = math.isqrt(n)
    chosen: dict[str, Encoder] = {}
    for name in names or encoders.names():
        encoder = make(name, encoders)
        chosen[name] = encoder.for_shape((side, side)) if side * side == n else encoder
        if chosen[name] is not encoder:
            chosen[flat_name(name, encoder)] = encoder
    for name in dtypes:
        residual_dtype(dtype_of(name))
    if comm.rank != 0:
        return chosen
    for path in (json_path, plot):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if plot is not None:
        figure(1, 1)
        if plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot must end in .png, .svg or .pdf; got {plot}")
    return chosen


def _compile(chosen: Iterable[Encoder], dtypes: Iterable[Any]) -> None:
    for dtype in dtypes:
        for encoder in chosen:
            encoder.warm_up(dtype)
    powersgd.warm_up(np.float32)


def _contenders(comm: MPI.Intracomm, chosen: Mapping[str, Encoder], dtypes: Iterable[Any], n: int) -> list[_Contender]:
    """The contenders that are timed, each checked; all arrays but the encoders' settings are shared."""
    random = np.random.default_rng(comm.rank)
    x, y, z = (random.standard_normal(n, np.float32) for _ in range(3))
    zeros = np.zeros_like(x)
    side = random.standard_normal((_PRODUCT_SIDE, _PRODUCT_SIDE), np.float32)
    product = np.empty_like(side)
    found = [
        _Contender(ADD, "float32", partial(np.add, x, y, out=z), _YARDSTICKS[ADD]),
        _Contender(IN_PLACE, "float32", partial(np.add, zeros, x, out=zeros), _YARDSTICKS[IN_PLACE]),
        _Contender(COPY, "float32", partial(np.copyto, z, x), _YARDSTICKS[COPY]),
        _Contender(PACKBITS, "float32", partial(by_packbits, x, np.zeros_like(x)), 12 + 1 / 8 + 8 / _PACKBITS_BLOCK),
        _Contender(PRODUCT, "float32", partial(np.matmul, side, side, out=product), 0),
        _Contender(STEP, "float32", _step([x]), 0),
        _Contender(STEP_ARRAYS, "float32", _step([x[i : i + 1] for i in range(min(_ARRAYS, n))]), 0),
        _Contender(POWERSGD, "float32", _low_rank(random, [(math.isqrt(n), math.isqrt(n))]), 0),
        _Contender(POWERSGD_ARRAYS, "float32", _low_rank(random, [_MATRIX] * _MATRICES), 0),
    ]
    for dtype in dtypes:
        values = x.astype(dtype)
        for name, encoder in chosen.items():
            found += _of_encoder(name, encoder, values)
    return found


def _step(gradients: list[Any]) -> Callable[[], None]:
    """A step of a trainer that is alone."""
    trainer = DataParallel([np.zeros_like(g) for g in gradients], SGD(lr=1e-6, momentum=0.9), comm=MPI.COMM_SELF)
    return partial(trainer.step, gradients)


def _low_rank(random: np.random.Generator, shapes: Sequence[tuple[int, int]]) -> Callable[[], object]:
    """The computation of PowerSGD in a run, without its exchanges."""
    flat = random.standard_normal(sum(map(math.prod, shapes)), np.float32)
    exchange = Exchange(context_of(MPI.COMM_SELF), "auto")
    reduction = powersgd.PowerSGD().bind(flat, unflatten(flat, shapes), exchange)
    return lambda: list(reduction.steps(Progress()))


def by_packbits(values: Any, residual: Any) -> tuple[Any, Any]:
    """Levels and bits of the whole blocks of float32 ``values``, one bit each, as one writes it in NumPy.

    ``residual`` is updated in place.
    """
    whole = values.size // _PACKBITS_BLOCK * _PACKBITS_BLOCK
    left = residual[:whole].reshape(-1, _PACKBITS_BLOCK)
    v = values[:whole].reshape(left.shape) + left
    is_high = v >= 0
    highs = np.count_nonzero(is_high, axis=1)
    high_sum = np.where(is_high, v, np.float32(0)).sum(axis=1)
    low = (v.sum(axis=1) - high_sum) / np.maximum(_PACKBITS_BLOCK - highs, 1)
    levels = np.stack([low, high_sum / np.maximum(highs, 1)], axis=1).astype(np.float32)
    np.subtract(v, np.where(is_high, levels[:, 1:], levels[:, :1]), out=left)
    return levels, np.packbits(is_high, axis=1, bitorder="little")


def _of_encoder(name: str, encoder: Encoder, values: Any) -> list[_Contender]:
    """Encode, and decode-and-add. Raises RuntimeError unless decoded + residual is what was encoded."""
    n, wide = values.size, residual_dtype(values.dtype)
    residual, out = np.zeros(n, wide), np.zeros(n, wide)
    payload = np.empty(encoder.nbytes(n), np.uint8)
    used = encoder.encode(values, residual, payload)
    encoder.decode(payload[:used], out)
    touched = np.count_nonzero(out) / n
    error = float(np.abs(out + residual - values.astype(wide)).max())
    if not error < 1e-5 * max(1.0, float(np.abs(out).max())):
        raise RuntimeError(f"bench compress: {name} of {values.dtype.name} leaves out {error} that is no residual")
    dtype, width, of_payload = values.dtype.name, wide.itemsize, used / n
    added = values.copy()
    # What an encoding leaves out changes from call to call, and with it how much a sparse one has to send.
    return [
        _Contender(
            f"{name} encode",
            dtype,
            partial(encoder.encode, values, residual, payload),
            values.itemsize + 2 * width + of_payload,
            name,
            "encode",
        ),
        _Contender(
            f"{name} decode-and-add",
            dtype,
            partial(encoder.decode, payload[:used].copy(), added, accumulate=True),
            2 * values.itemsize * touched + of_payload,
            name,
            "decode",
        ),
    ]


def _sample(comm: MPI.Intracomm, contenders: Sequence[_Contender], samples: int, alone: bool) -> list[list[float]]:
    """Seconds of each contender, the slowest rank's, in turns; with ``alone``, of rank 0 while others sleep."""
    taken: list[list[float]] = [[] for _ in contenders]
    active = comm.rank == 0 or not alone
    for turn in range(-1, samples):  # the first turn warms up
        for i in range(len(contenders)):
            i = (i + turn) % len(contenders)
            meet(comm)
            begin = time.perf_counter()
            if active:
                contenders[i].call()
            if turn >= 0:
                taken[i].append(time.perf_counter() - begin if active else 0.0)
    meet(comm)
    slowest = np.array(taken)
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    return [list(map(float, each)) for each in slowest]


def _rows(
    contenders: Sequence[_Contender], taken: Sequence[Sequence[float]], n: int, ranks: int
) -> list[dict[str, Any]]:
    medians = [statistics.median(each) for each in taken]
    by_name = dict(zip((each.name for each in contenders), medians, strict=False))
    roofline = max(nbytes * n / by_name[name] for name, nbytes in _YARDSTICKS.items())
    rows: list[dict[str, Any]] = []
    for contender, seconds, samples in zip(contenders, medians, taken, strict=True):
        row = {
            "kernel": contender.name,
            "encoder": contender.encoder,
            "operation": contender.operation,
            "dtype": contender.dtype,
            "ranks": ranks,
            "seconds": seconds,
            "samples": [float(f"{each:.4g}") for each in samples],
        }
        if contender.nbytes:
            row |= {
                "values_a_second": n / seconds,
                "times_add": by_name[ADD] / seconds,
                "bytes_a_value": contender.nbytes,
                "bandwidth": contender.nbytes * n / seconds,
                "of_the_roofline": contender.nbytes * n / seconds / roofline,
            }
        elif contender.name == PRODUCT:
            row["flops"] = 2 * _PRODUCT_SIDE**3 / seconds
        rows.append(row)
    return rows


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    show_table(
        ("kernel", "type", "median", "10⁹ values/s", "of np.add", "bytes per value", "GB/s", "of the roofline"),
        [
            (
                row["kernel"],
                row["dtype"],
                f"{row['seconds'] * 1e3:.2f} ms",
                f"{row['values_a_second'] / 1e9:.2f}",
                f"{row['times_add']:.2f}x",
                f"{row['bytes_a_value']:.2f}",
                f"{row['bandwidth'] / 1e9:.1f}",
                f"{row['of_the_roofline']:.0%}",
            )
            for row in rows
            if "bandwidth" in row
        ],
    )


def constants(machine: Mapping[str, Any], results: Sequence[Mapping[str, Any]], values: int) -> Machine:
    """The constants that ``bitring predict --machine`` needs."""
    ranks = int(machine["ranks"])
    emulated = bool(os.environ.get("BITRING_HOSTS"))
    sharing = ranks if emulated else ranks // int(machine["nodes"])  # a machine's cores and memory

    def of(ranks: int, **wanted: str) -> Any:
        return next(row for row in results if row["ranks"] == ranks and all(row[key] == wanted[key] for key in wanted))

    def kernels(ranks: int) -> dict[str, Kernel]:
        names = {row["encoder"]: None for row in results if row["encoder"] and row["dtype"] == "float32"}
        return {
            name: Kernel(
                *(
                    1 / of(ranks, encoder=name, operation=operation, dtype="float32")["values_a_second"]
                    for operation in ("encode", "decode")
                )
            )
            for name in names
        }

    return Machine(
        title=f"{machine['processor']}, measured with {ranks} rank{'s' * (ranks != 1)}",
        flops=of(ranks, kernel=PRODUCT)["flops"],
        add=4 * of(ranks if emulated else 1, kernel=IN_PLACE)["values_a_second"],
        copy=of(1, kernel=COPY)["bandwidth"],
        copy_together=sharing * of(ranks, kernel=COPY)["bandwidth"],
        step=of(1, kernel=STEP)["seconds"] / values,
        step_together=of(ranks, kernel=STEP)["seconds"] / values,
        cores=int(machine["cores_of_node"]),
        together=sharing,
        step_array=of(ranks if emulated else 1, kernel=STEP_ARRAYS)["seconds"] / min(_ARRAYS, values),
        powersgd=of(1, kernel=POWERSGD)["seconds"] / math.isqrt(values) ** 2,
        powersgd_together=of(ranks, kernel=POWERSGD)["seconds"] / math.isqrt(values) ** 2,
        powersgd_array=of(ranks if emulated else 1, kernel=POWERSGD_ARRAYS)["seconds"] / _MATRICES,
        kernels=kernels(1),
        kernels_together=kernels(ranks),
        emulated=emulated,
    )


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Draw the speeds against the roofline. Raises ImportError without matplotlib, OSError."""
    shown = [row for row in kept["results"] if "bandwidth" in row]
    kernels = list(dict.fromkeys((row["kernel"], row["dtype"]) for row in shown))
    settings = sorted({row["ranks"] for row in shown})
    picture = figure(9.5, 1.3 + 0.34 * len(kernels) * max(1, 0.6 * len(settings)))
    left, right = picture.subplots(1, 2, sharey=True)
    for k, ranks in enumerate(settings):
        by_kernel = {(row["kernel"], row["dtype"]): row for row in shown if row["ranks"] == ranks}
        places = [i + (k - (len(settings) - 1) / 2) * 0.38 for i in range(len(kernels))]
        label = "one rank alone" if ranks == 1 else f"each of {ranks} ranks at once"
        for axes, field, scale in ((left, "values_a_second", 1e9), (right, "of_the_roofline", 0.01)):
            lengths = [by_kernel[kernel][field] / scale for kernel in kernels]
            axes.barh(places, lengths, height=0.34, color=COLORS[k], label=label)
    for axes, label in ((left, "10⁹ values per second"), (right, "bandwidth, % of the memory's as measured")):
        plain(axes)
        axes.set_xlabel(label)
    right.axvline(100, color="0.2", linestyle=":", linewidth=1.2)
    several = len({dtype for _, dtype in kernels}) > 1
    left.set_yticks(range(len(kernels)), [f"{name}, {dtype}" if several else name for name, dtype in kernels])
    left.invert_yaxis()
    if len(settings) > 1:
        picture.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    picture.suptitle(f"{kept['values']:,} values, {kept['machine']['processor']}", fontsize=10)
    picture.savefig(path)
