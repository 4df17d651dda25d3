# JAX for the type checkers, which run where it is not installed: anything.
from typing import Any

def __getattr__(name: str) -> Any: ...  # pyright: ignore[reportIncompleteStub]
