"""Settings on the command line: how they are written, and lists of compressors."""

from __future__ import annotations

import re


def how(example: str) -> str:
    """The way that a thing and its settings are written, for help."""
    return f"NAME or NAME:KEY=VALUE,..., such as {example}"


def split(text: str) -> list[str]:
    """The parts of a list separated by commas; one that begins with KEY= is a setting, and belongs to those before."""
    return [part.strip() for part in re.split(r",(?!\s*\w+\s*=)", text)]
