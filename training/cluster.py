"""What a prediction needs to know: the ranks and the network between them, and how fast one machine computes.

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
    """``ranks`` spread evenly over ``nodes``. ``bandwidth``: bytes a second out of a node, and as many into it;
    ``latency``: seconds a message between nodes. On one node, neither counts.

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
        """How many ranks share a node's memory and its network interface."""
        return self.ranks // self.nodes


class Kernel(NamedTuple):
    """Seconds a float32 value: to encode it, and to decode and add it."""

    encode: float
    decode: float


@dataclass(frozen=True)
class Machine:
    """How fast one machine is. Where ranks compute at once they share its memory, so there are two figures.

    ``flops``: float32 operations a second of one rank, in a matrix product. ``add``: bytes a second reduced by one rank
    (γ is its inverse). ``copy``: bytes a second read and written by a copy, of one rank alone; ``copy_together``: of
    all ranks at once, together. ``step``, ``step_together``: seconds a value of what a step of ``DataParallel`` does
    beside exchanging: it looks for NaN, packs, and updates by SGD with momentum; ``step_array``: seconds that each
    parameter adds, whatever its size. ``cores``: of a node. ``kernels``, ``kernels_together``: by encoder, of a rank
    alone and of each of all at once. ``wire``: the part of a network's bandwidth that payloads get.
    ``local_latency``: seconds to meet the ranks of the same node. ``latency``, ``bandwidth``: seconds a message between
    nodes, and bytes a second of payload that each node sends to the next while all do; None where they were not
    measured. ``emulated``: nodes share this machine's cores, so all ranks compute at once whatever their nodes.
    """

    title: str
    flops: float
    add: float
    copy: float
    copy_together: float
    step: float
    step_together: float
    step_array: float
    cores: int
    kernels: Mapping[str, Kernel] = field(default_factory=dict[str, Kernel])
    kernels_together: Mapping[str, Kernel] = field(default_factory=dict[str, Kernel])
    wire: float = 0.95
    local_latency: float = 2e-6
    latency: float | None = None
    bandwidth: float | None = None
    emulated: bool = False

    def kernel(self, encoder: str, payload: float, together: bool) -> tuple[Kernel, bool]:
        """The speed of an encoder, and whether it was measured.

        What was not is taken to be as fast as a copy of its bytes: 12 and 8 a value, and ``payload`` of each.
        """
        measured = self.kernels_together if together and self.kernels_together else self.kernels
        if encoder in measured:
            return measured[encoder], True
        return Kernel((12 + payload) / self.copy, (8 + payload) / self.copy), False


BUILT_IN = Machine(
    title="AMD EPYC, 2 cores, where bitring is developed",
    flops=7.3e10,
    add=1.06e10,
    copy=1.9e10,
    copy_together=2.79e10,
    step=2e-09,
    step_together=2.46e-09,
    step_array=2e-05,
    cores=2,
    kernels={
        "bfloat16": Kernel(5.67e-10, 3.1e-10),
        "fixed": Kernel(2.02e-09, 5.19e-10),
        "float16": Kernel(8.89e-10, 3.87e-10),
        "linear": Kernel(1.14e-09, 5.64e-10),
        "onebit": Kernel(4.6e-10, 2.66e-10),
        "sign": Kernel(5.05e-10, 3.02e-10),
        "threshold": Kernel(1.65e-09, 3.1e-10),
        "topk": Kernel(2.54e-09, 2.81e-10),
    },
    kernels_together={
        "bfloat16": Kernel(8.03e-10, 4.74e-10),
        "fixed": Kernel(2.4e-09, 6.89e-10),
        "float16": Kernel(1.02e-09, 5.02e-10),
        "linear": Kernel(1.36e-09, 7.48e-10),
        "onebit": Kernel(6.1e-10, 3.85e-10),
        "sign": Kernel(7.13e-10, 4.19e-10),
        "threshold": Kernel(2.14e-09, 4.88e-10),
        "topk": Kernel(2.96e-09, 4.58e-10),
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
        speeds += [each for each in (machine.latency, machine.bandwidth) if each is not None]
        speeds += [s for part in (machine.kernels, machine.kernels_together) for k in part.values() for s in k]
        if not all(math.isfinite(speed) and speed > 0 for speed in speeds):
            raise ValueError("its speeds must be positive numbers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: it is not what bitring bench compress --json wrote: {error}") from error
    return machine


def write_constants(machine: Machine) -> dict[str, Any]:
    """What ``read_machine`` reads under ``constants``."""
    plain = dataclasses.asdict(machine)
    for name in ("kernels", "kernels_together"):
        plain[name] = {encoder: kernel._asdict() for encoder, kernel in getattr(machine, name).items()}
    return plain
