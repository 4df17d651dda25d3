"""Paths as users give them."""

from __future__ import annotations

import os
from pathlib import Path


def as_path(given: str | os.PathLike[str], function: str, argument: str = "path") -> Path:
    """``given`` as a Path. Raises TypeError and ValueError, naming both, for what is none or what no file can have."""
    try:
        path = Path(given)
    except TypeError:
        raise TypeError(f"{function}: {argument} must be a str or a Path; got {type(given).__name__}") from None
    try:
        unfit = b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        unfit = True
    if unfit:
        raise ValueError(
            f"{function}: {argument} must be a name that a file can have, without null bytes and lone surrogates; got "
            f"{str(given)!r}"
        )
    return path
