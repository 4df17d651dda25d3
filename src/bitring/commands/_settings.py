"""The options of ``bitring train``, and the objects that stand for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from bitring.collectives.schedules.schedule import algorithms
from bitring.commands._units import Interval
from bitring.compression.compressor import Compressor, compressors
from bitring.registry import Registry
from bitring.settings import make, name_of, read, spelled
from bitring.training.choice import Choice, choices
from bitring.training.mode import BaseMode, modes
from bitring.training.optimizer import Optimizer, optimizers

T = TypeVar("T")

# Good for the networks and data sets that come with bitring.
_DEFAULTS: dict[str, dict[str, float]] = {"sgd": {"lr": 0.02, "momentum": 0.9}}

_OWN_OPTIONS = {"mode": ("tau",), "optimizer": ("lr", "momentum")}
"""Settings that have options of their own beside that of the thing."""


@dataclass(frozen=True)
class Settings:
    """The options of ``bitring train``, unchecked; None where a default depends on another option."""

    model: str
    device: str
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
    timeline: Path | None
    fresh: bool
    placement: str | None = None
    replicas: int = 1

    def check(self) -> None:
        """Raise ValueError, naming the option, for what is out of range, excludes another, or is no algorithm."""
        for name, least in (("batch", 1), ("epochs", 1), ("keep", 1), ("warmup_steps", 0), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
        if self.resume and self.fresh:
            raise ValueError("--resume and --fresh exclude each other: the one goes on, the other begins anew")
        if self.replicas != 1 and self.placement is None:
            raise ValueError("--replicas is for --placement: without one every rank has the whole model")
        if self.timeline is not None and self.timeline.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--timeline must end in .png, .svg or .pdf; got {self.timeline}")
        if self.algorithm != "auto":
            algorithms.get(self.algorithm)

    def is_sandblaster(self) -> bool:
        """Whether the batch method is asked for. Raises click.UsageError for its optimizer in another mode."""
        batch_mode = name_of(self.mode) == "sandblaster"
        if name_of(self.optimizer) == "lbfgs" and not batch_mode:
            raise click.UsageError(
                f"--optimizer lbfgs is for whole batches, and needs --mode sandblaster; got --mode {self.mode}"
            )
        return batch_mode

    def make_mode(self) -> BaseMode:
        """The mode. Raises ValueError for an unknown one, and options that are not for it or say something else."""
        return _made(modes, dataclasses.asdict(self))

    def make_optimizer(self) -> Optimizer:
        """The optimizer. Raises ValueError as ``make_mode`` does."""
        return _made(optimizers, dataclasses.asdict(self))

    def make_compression(self) -> Compressor | Choice | None:
        """The compressor or choice, None for an exact exchange. Raises ValueError as ``make`` does."""
        if self.compression == "none":
            return None
        name = name_of(self.compression)
        if name == "none":
            raise ValueError(f"--compression {self.compression}: none has no settings")
        if name in choices.names():
            return make(self.compression, choices)
        if name not in compressors.names():
            raise ValueError(f"unknown compressor {name!r}; known: none, {', '.join(compressors.names())}")
        return make(self.compression, compressors)

    def of_the_result(self) -> dict[str, Any]:
        """The options that must be the same for a run to go on as it began; not how long it is to go on.

        The values in force, but for the default of ``warmup_steps``, None, which depends on how long the run is.
        """
        of_this_run = ("device", "data_directory", "epochs", "output", "timeline")
        left_out = (*of_this_run, "checkpoint_every", "keep", "resume", "fresh")
        compressor = self.make_compression()
        compression = "none" if compressor is None else spelled(name_of(self.compression), compressor)
        options = {**dataclasses.asdict(self), "compression": compression}
        split = ("placement", "replicas")  # a checkpoint goes on under any
        return {name: value for name, value in _in_force(options).items() if name not in (*left_out, *split)}


def refuse_unused(settings: Settings, kind: str) -> None:
    """Raise ValueError for options that runs of this ``kind`` have no use for."""
    if settings.device != "host":
        raise ValueError(f"--device {settings.device} is not for {kind}, which computes on the host")
    if settings.checkpoint_every.unit != "epochs":
        raise ValueError(f"--checkpoint-every must be in epochs with {kind}")


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option that differs between two runs' ``of_the_result``, with both values; None when nothing does.

    ``was`` may be of an older version, which did not spell modes and optimizers, or of anything.
    """
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # else compared as it stands there
        was = _in_force(was)
    for option, value in now.items():
        before = was.get(option)
        if before == value:
            continue
        own = [each for each in _OWN_OPTIONS.get(option, ()) if was.get(each) != now[each]]
        if own and name_of(str(before)) == name_of(value):
            option, before, value = own[0], was.get(own[0]), now[own[0]]
        return option, before, value
    return None


def _in_force(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with mode and optimizer spelled, and what has options of its own as it is there."""
    found = dict(options)
    registries: list[Registry[Any]] = [modes, optimizers]
    for registry in registries:
        kind = registry.kind
        made = _made(registry, options)
        found[kind] = spelled(name_of(options[kind]), made)
        found |= {option: getattr(made, option, None) for option in _OWN_OPTIONS[kind]}
    return found


def _made(registry: Registry[T], options: Mapping[str, Any]) -> T:
    """The mode or the optimizer that the option of that name, and the settings' own options, ask for."""
    text: str = options[registry.kind]
    cls, given = read(text, registry)
    name = name_of(text)
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for option in _OWN_OPTIONS[registry.kind]:
        value = options[option]
        if value is None:
            continue
        if option not in known:
            raise ValueError(f"--{option} is not for the {registry.kind} {name}")
        if repr(given.setdefault(option, value)) != repr(value):  # NaN is refused where ranges are
            raise ValueError(f"--{registry.kind} {text} and --{option} {value} differ in {option}; give it once")
    return cls(**{**_DEFAULTS.get(name, {}), **given})
