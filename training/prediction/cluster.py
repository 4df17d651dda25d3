"""The facts that a prediction needs: the ranks and the network between them, and how fast one machine computes.

A :class:`Machine` comes from the file that ``bitring bench compress --json`` writes, or is the built-in one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Cluster:
    """``ranks`` spread evenly over ``nodes``. ``bandwidth``: bytes per second out of a node, and as many into it;
    ``latency``: seconds per message between nodes. On one node, neither counts.

    Raises ValueError for numbers that are out of range, and ranks that the nodes cannot share evenly.
    """

    ranks: int
    nodes: int
    bandwidth: float = math.inf
    latency: float = 50e-6

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.nodes < 1 or self.ranks % self.nodes:
            raise ValueError(
                f"Cluster: expected ranks and nodes from 1 on, and as many ranks on each node; got {self.ranks} ranks "
                f"and {self.nodes} nodes"
            )
        if not (self.bandwidth > 0 and 0 <= self.latency < math.inf):
            raise ValueError(
                f"Cluster: expected bandwidth > 0 and latency >= 0; got {self.bandwidth} bytes/s and {self.latency} s"
            )

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks that share a node's memory and its network interface."""
        return self.ranks // self.nodes


class Kernel(NamedTuple):
    """Seconds per float32 value: to encode it, and to decode and add it."""

    encode: float
    decode: float


@dataclass(frozen=True)
class Machine:
    """The speed of one machine. Where ranks compute at once they share its memory, so there are two figures.

    ``flops``: float32 operations per second of one rank, in a matrix product. ``add``: bytes per second reduced by one
    rank (γ is its inverse). ``copy``: bytes per second read and written by a copy, of one rank alone;
    ``copy_together``: of all ranks at once, together. ``step``, ``step_together``: seconds per value of what a step of
    ``DataParallel`` does beside exchanging: NaN check, packing, and the update by SGD with momentum; ``step_array``:
    seconds that each parameter adds, whatever its size. ``powersgd``, ``powersgd_together``, ``powersgd_array``: of
    what PowerSGD computes, likewise. ``cores``: of a node. ``kernels``, ``kernels_together``: by encoder, of a rank
    alone and of each of ``together`` at once; of flat values by ``flat_name``. ``wire``: the part of a network's
    bandwidth that payloads get.
    ``local_latency``: seconds to meet the ranks of the same node. ``latency``, ``bandwidth``: seconds per message
    between nodes, and bytes per second of payload that each node sends to the next while all do; None where they were
    not measured. ``wire_work``: seconds of its processor for a byte that a rank sends and one that it receives.
    ``emulated``: nodes share this machine's cores, so all ranks compute at once whatever their nodes.
    """

    title: str
    flops: float
    add: float
    copy: float
    copy_together: float
    step: float
    step_together: float
    step_array: float
    powersgd: float
    powersgd_together: float
    powersgd_array: float
    cores: int
    together: int = 1
    kernels: Mapping[str, Kernel] = field(default_factory=dict[str, Kernel])
    kernels_together: Mapping[str, Kernel] = field(default_factory=dict[str, Kernel])
    wire: float = 0.95
    local_latency: float = 2e-6
    latency: float | None = None
    bandwidth: float | None = None
    wire_work: float = 0.0
    emulated: bool = False

    def kernel(self, encoder: str, payload: float, ranks: int, beside: bool = False) -> tuple[Kernel, bool]:
        """The speed of an encoder for each of ``ranks`` that share a node, and whether it was measured.

        What was not is taken to be as fast as a copy of its bytes: 12 and 8 per value, and ``payload`` of each. Several
        threads of one rank are as fast as so many ranks: as many as it has cores, and were measured at once; but one
        where it encodes ``beside`` a training loop.
        """
        threads = 1 if beside else max(1, min(self.cores, self.together) // ranks)
        busy = ranks * threads
        measured = self.kernels if busy == 1 or not self.kernels_together else self.kernels_together
        if encoder in measured:
            return Kernel(*(seconds / threads for seconds in measured[encoder])), True
        speed = min(threads * self.copy, self.copy_together / ranks)
        return Kernel((12 + payload) / speed, (8 + payload) / speed), False


BUILT_IN = Machine(
    title="AMD EPYC, 2 cores, where bitring is developed",
    flops=1.19e11,
    add=1.86e10,
    copy=3.16e10,
    copy_together=6.73e10,
    step=1.03e-09,
    step_together=1.05e-09,
    step_array=3.29e-06,
    powersgd=1.65e-09,
    powersgd_together=1.65e-09,
    powersgd_array=7.44e-06,
    cores=2,
    together=2,
    kernels={
        "bfloat16": Kernel(3.18e-10, 1.93e-10),
        "fixed": Kernel(1.22e-09, 2.38e-10),
        "float16": Kernel(4.22e-10, 1.96e-10),
        "linear": Kernel(6.17e-10, 2.65e-10),
        "onebit": Kernel(3.82e-10, 1.52e-10),
        "onebit, flat": Kernel(2.58e-10, 1.51e-10),
        "sign": Kernel(3.72e-10, 1.58e-10),
        "threshold": Kernel(1.24e-09, 2.36e-10),
        "topk": Kernel(2.23e-09, 2.32e-10),
    },
    kernels_together={
        "bfloat16": Kernel(3.29e-10, 1.88e-10),
        "fixed": Kernel(1.22e-09, 2.37e-10),
        "float16": Kernel(4.24e-10, 2.09e-10),
        "linear": Kernel(4.97e-10, 2.57e-10),
        "onebit": Kernel(3.86e-10, 1.71e-10),
        "onebit, flat": Kernel(2.59e-10, 1.56e-10),
        "sign": Kernel(3.7e-10, 1.62e-10),
        "threshold": Kernel(1.27e-09, 2.36e-10),
        "topk": Kernel(2.36e-09, 2.37e-10),
    },
)
"""The ``constants`` of ``benchmarks/results/compress.json``, of 2 ranks."""


def read_machine(path: Path) -> Machine:
    """The machine in a file of ``bitring bench compress --json``. Raises OSError, and ValueError for another file."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = dict(content["constants"])
        for name in ("kernels", "kernels_together"):
            fields[name] = {encoder: Kernel(**each) for encoder, each in fields[name].items()}
        machine = Machine(**fields)
        speeds = [machine.flops, machine.add, machine.copy, machine.copy_together, machine.wire]
        speeds += [machine.step, machine.step_together, machine.step_array]
        speeds += [machine.powersgd, machine.powersgd_together, machine.powersgd_array]
        speeds += [each for each in (machine.latency, machine.bandwidth) if each is not None]
        speeds += [s for part in (machine.kernels, machine.kernels_together) for k in part.values() for s in k]
        if not all(math.isfinite(speed) and speed > 0 for speed in speeds) or not 0 <= machine.wire_work < math.inf:
            raise ValueError("its speeds must be positive numbers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: it is not what bitring bench compress --json wrote: {error}") from error
    return machine


def write_constants(machine: Machine) -> dict[str, Any]:
    """The object that ``read_machine`` reads under ``constants``."""
    plain = dataclasses.asdict(machine)
    for name in ("kernels", "kernels_together"):
        plain[name] = {encoder: kernel._asdict() for encoder, kernel in getattr(machine, name).items()}
    return plain
