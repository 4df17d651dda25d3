"""Presence of the node's ranks: a rank that died, or left the job, is told apart from one that is slow."""

from __future__ import annotations

import functools
import os
import secrets
from typing import Any

from bitring.native import extension

Descriptor = tuple[int, int, bytes]
"""A process's number, the number of its open file, and the file's first bytes."""


@functools.cache
def _own() -> tuple[Any, bytes]:
    token = secrets.token_bytes(16)
    presence = extension.Presence.make("")
    presence.memory.write(token)
    return presence, token


def own_descriptor() -> Descriptor:
    """The descriptor by which others watch this process."""
    presence, token = _own()
    return os.getpid(), presence.memory.descriptor, token


def leave() -> None:
    """Tell the others that this process will not take part in anything any more."""
    if _own.cache_info().currsize:
        _own()[0].leave()


@functools.cache
def presence_of(descriptor: Descriptor) -> Any:
    """Another process's: ``left`` and ``dead`` say whether it is. None where this process may not look."""
    pid, number, token = descriptor
    try:
        presence = extension.Presence.open(pid, number, "")
    except OSError:
        return None
    return presence if presence.memory.read(len(token)) == token else None
