"""bitring: exchanging gradients over MPI, exactly or at one bit per value.

This module is the whole public API. Importing it neither initialises MPI nor loads a GPU, plotting or dataset
library: every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitring.collectives.schedule import Algorithm as Algorithm

__version__ = "0.1.0"

_WHERE = {
    "Algorithm": "bitring.collectives.schedule",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'bitring' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
