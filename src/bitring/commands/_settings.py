"""What ``bitring train`` was asked for, and the objects that stand for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bitring.collectives.selection.selection import check_name
from bitring.commands._units import Interval
from bitring.compression.compressor import Compressor, compressors, make, name_of, spelled
from bitring.registry import Registry
from bitring.training.mode import Mode, modes
from bitring.training.optimizer import Optimizer, optimizers

T = TypeVar("T")

# Good for the networks and data sets that come with bitring.
_DEFAULTS: dict[str, dict[str, float]] = {"sgd": {"lr": 0.02, "momentum": 0.9}}


@dataclass(frozen=True)
class Settings:
    """The options of ``bitring train``, unchecked; None where a default depends on another option."""

    model: str
    data: str
    data_directory: Path | None
    mode: str
    tau: int | None
    compression: str
    warmup_steps: int | None
    algorithm: str
    optimizer: str
    lr: float | None
    momentum: float | None
    batch: int
    epochs: int
    seed: int
    output: Path
    checkpoint_every: Interval
    keep: int
    resume: bool
    fresh: bool

    def check(self) -> None:
        """Raise ValueError, naming the option, for what is out of range, excludes another, or is no algorithm."""
        for name, least in (("batch", 1), ("epochs", 1), ("keep", 1), ("warmup_steps", 0), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
        if self.resume and self.fresh:
            raise ValueError("--resume and --fresh exclude each other: the one goes on, the other begins anew")
        check_name(self.algorithm)

    def make_mode(self) -> Mode:
        """The mode. Raises ValueError for an unknown one, or an option that is not for it."""
        return _make(modes, self.mode, tau=self.tau)

    def make_optimizer(self) -> Optimizer:
        """The optimizer. Raises ValueError as ``make_mode`` does."""
        given = {"lr": self.lr, "momentum": self.momentum}
        defaults = _DEFAULTS.get(self.optimizer, {})
        return _make(
            optimizers,
            self.optimizer,
            **{name: defaults.get(name) if value is None else value for name, value in given.items()},
        )

    def make_compression(self) -> Compressor | None:
        """The compressor, None for an exact exchange. Raises ValueError as ``make`` does."""
        if self.compression == "none":
            return None
        name = name_of(self.compression)
        if name == "none":
            raise ValueError(f"--compression {self.compression}: none has no settings")
        if name not in compressors.names():
            raise ValueError(f"unknown compressor {name!r}; known: none, {', '.join(compressors.names())}")
        return make(self.compression, compressors)

    def of_the_result(self) -> dict[str, Any]:
        """What must be the same for a run to go on as it began; not how long it is to go on.

        The values in force, but for the default of ``warmup_steps``, None, which depends on how long the run is.
        """
        left_out = ("data_directory", "epochs", "output", "checkpoint_every", "keep", "resume", "fresh")
        mode, optimizer, compressor = self.make_mode(), self.make_optimizer(), self.make_compression()
        in_force = {
            **dataclasses.asdict(self),
            "tau": getattr(mode, "tau", None),
            "compression": "none" if compressor is None else spelled(name_of(self.compression), compressor),
            "lr": getattr(optimizer, "lr", None),
            "momentum": getattr(optimizer, "momentum", None),
        }
        return {name: value for name, value in in_force.items() if name not in left_out}


def _make(registry: Registry[T], name: str, **options: Any) -> T:
    """The thing registered as ``name``, with those ``options`` that are given."""
    cls: Any = registry.get(name)
    given = {option: value for option, value in options.items() if value is not None}
    known = {field.name for field in dataclasses.fields(cls)}
    for option in given:
        if option not in known:
            raise ValueError(f"--{option} is not for the {registry.kind} {name}")
    made: T = cls(**given)
    return made
