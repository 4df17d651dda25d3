"""The checkpoints of a run in its output folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitring.commands._settings import Settings, difference
from bitring.commands._units import count
from bitring.training.checkpoints.file import previous


def checkpoint_path(settings: Settings) -> Path:
    """The name of the run's newest checkpoint."""
    return settings.output / "checkpoint.npz"


def last_checkpoint(settings: Settings) -> Path | None:
    """The last checkpoint that is there; the one before it where a run has ended while it put the last in its place."""
    path = checkpoint_path(settings)
    return next((each for each in (path, previous(path)) if each.exists()), None)


def require_said(settings: Settings) -> None:
    """Raise ValueError where a checkpoint is there, and neither ``--resume`` nor ``--fresh`` says what is meant."""
    if not (settings.resume or settings.fresh) and (path := last_checkpoint(settings)) is not None:
        raise ValueError(f"{path} is there, of another run: --resume goes on from it, --fresh deletes it")


def history_of(
    path: Path, settings: Settings, extra: Mapping[str, Any], steps: int, each: int
) -> tuple[list[dict[str, Any]], int]:
    """The records of the epochs that were completed, and the steps made since; of a checkpoint with this ``extra``.

    ``steps``: made in all; ``each``: in an epoch now. Raises ValueError when it is of another run.
    """
    history, made_with = extra.get("history"), extra.get("settings")
    if not isinstance(history, list) or not isinstance(made_with, dict):
        raise ValueError(f"--resume: {path} was not made by bitring train")
    differs = difference(made_with, settings.of_the_result())
    if differs is not None:
        option, *values = differs
        made, given = ("its default" if x is None else x for x in values)
        raise ValueError(f"--resume: the checkpoint was made with --{option.replace('_', '-')} {made}; got {given}")
    done = steps - each * len(history)
    if not 0 <= done <= each:
        raise ValueError(
            f"--resume: the checkpoint is of {count(len(history), 'epoch')} and {steps} steps; "
            f"the data given now make {each} steps per epoch"
        )
    return history, done
