"""Memory that the MPI library may still write to: of messages that nobody waits for any more."""

from __future__ import annotations

import ctypes


def never_free(thing: object) -> None:
    """Never free it. Where a module held it the interpreter's end would free it, before the MPI library's own."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
