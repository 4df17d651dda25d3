"""Compressors on the command line: how they are written, and lists of them."""

from __future__ import annotations

import re

HOW = "NAME or NAME:KEY=VALUE,..., such as topk:density=0.001"


def split(text: str) -> list[str]:
    """The parts of a list separated by commas; one that begins with KEY= is a setting, and belongs to those before."""
    return [part.strip() for part in re.split(r",(?!\s*\w+\s*=)", text)]
