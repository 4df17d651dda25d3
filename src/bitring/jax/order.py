"""The order of bitring's works in JAX's computations: an effect, whose token JAX hands from one to the next.

After a computation that failed, JAX has every later one fail, since the token is that one's. What failed is told to
whoever waits for the results; here the order then begins anew, so that all ranks can go on.
"""

from __future__ import annotations

from typing import Any

import jax
from jax._src import dispatch, effects
from jax._src.interpreters import pxla

from bitring.jax.handler import forget


class _InOrder(effects.Effect):
    def __repr__(self) -> str:
        return "the order of bitring's works"


in_order = _InOrder()
for _allowed in (
    effects.lowerable_effects,
    effects.ordered_effects,
    effects.control_flow_allowed_effects,
    effects.custom_derivatives_allowed_effects,
    effects.remat_allowed_effects,
):
    _allowed.add_type(_InOrder)


def settle() -> None:
    """Wait for what is under way, whether it fails or not."""
    try:
        jax.effects_barrier()
    except Exception:  # told to whoever waits for the results
        dispatch.runtime_tokens.clear()
    forget()


_token_input = dispatch.RuntimeTokenSet.get_token_input


def _token_input_after_failures(tokens: Any, effect: Any, devices: Any) -> Any:
    if effect == in_order and effect in tokens.current_tokens:
        try:
            tokens.current_tokens[effect].block_until_ready()  # which JAX does, too
        except Exception:  # told to whoever waits for the results
            tokens.clear()
    return _token_input(tokens, effect, devices)


dispatch.RuntimeTokenSet.get_token_input = _token_input_after_failures


_create_cpp_call = pxla.MeshExecutable.create_cpp_call


def _create_cpp_call_without_order(executable: Any, params: Any) -> Any:
    if in_order in getattr(executable.unsafe_call, "ordered_effects", ()):
        return None  # what lower().compile() returns would be called without its tokens from the second time on
    return _create_cpp_call(executable, params)


pxla.MeshExecutable.create_cpp_call = _create_cpp_call_without_order
