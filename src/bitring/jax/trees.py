"""Trees of arrays, as JAX takes them apart, with names for their leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaves_of(tree: Any, function: str, what: str) -> tuple[list[str], list[Any], Any]:
    """Names such as "layer/w", arrays (JAX's, or tracers) and structure of a tree; ``what`` names a bare array.

    Raises TypeError for a leaf that is no array.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names: list[str] = []
    arrays: list[Any] = []
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or what
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            raise TypeError(f"{function}: {what}: {name!r} must be an array or a number; got {type(leaf).__name__}")
        array = jnp.asarray(leaf)
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{function}: {what}: {name!r} is of {array.dtype}, which has no values to exchange; "
                "give jax.random.key_data of it"
            )
        names.append(name)
        arrays.append(array)
    return names, arrays, structure


def require_concrete(names: list[str], arrays: list[Any], function: str) -> None:
    """Raise TypeError for a tracer."""
    for name, array in zip(names, arrays, strict=True):
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                f"{function}: {name!r} is a tracer: inside jit, grad or vmap there are no values yet; "
                f"call {function} outside"
            )
