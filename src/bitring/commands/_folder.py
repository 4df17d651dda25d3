"""The folder that a command writes to: whether it can, and errors that name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path


def make_writable(folder: Path, what: str | None = None) -> None:
    """Raise OSError unless files can be written to ``folder``, which is made if need be.

    ``what``: cannot be written, then; by default ``--output`` and the folder.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(f"{what or f'--output {folder}'} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def named(path: Path) -> Generator[None]:
    """Around writing ``path``: an OSError says which file it was; a full disk's does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file, all or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    with named(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
