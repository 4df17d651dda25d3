"""The JAX primitive that does a ``Work``: at once on concrete arrays, in compiled code through ``handler``.

Works of a program happen in its order, on every rank the same: they share an ordered effect, which JAX keeps in one
computation and between those that are under way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src.callback import emit_python_callback
from jax._src.core import abstract_token
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bitring.jax.handler import TARGET, number_of, registered
from bitring.jax.order import in_order, settle
from bitring.jax.work import Work

_ALIGNMENT = 64


_primitive = Primitive("bitring")
_primitive.multiple_results = True


def do(work: Work, arguments: Sequence[Any]) -> list[Any]:
    """The results of ``work``, of JAX's arrays or tracers. Collective, now or when the computation runs."""
    results: list[Any] = _primitive.bind(*arguments, work=work)
    return results


def _now(*arguments: Any, work: Work) -> list[Any]:
    settle()  # what is under way comes first
    results = [_aligned(each.shape, each.dtype) for each in work.shapes(arguments)]
    work.run([np.asarray(each) for each in arguments], results)
    return [jax.device_put(each, may_alias=True) for each in results]


def _aligned(shape: tuple[int, ...], dtype: Any) -> Any:
    """A new array at an address that XLA takes without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


_primitive.def_impl(_now)


def _abstract(*arguments: Any, work: Work) -> Any:
    return [jax.core.ShapedArray(each.shape, each.dtype) for each in work.shapes(arguments)], {in_order}


_primitive.def_effectful_abstract_eval(_abstract)


def _compiled(ctx: Any, *arguments: Any, work: Work) -> Any:
    """A call of the FFI target; its token comes first."""
    if not registered():
        return _called_back(ctx, *arguments, work=work)
    ctx.module_context.add_keepalive(work)
    token = ctx.tokens_in.get(in_order)
    with_token = ctx.replace(avals_in=[abstract_token, *ctx.avals_in], avals_out=[abstract_token, *ctx.avals_out])
    target = jax.ffi.build_ffi_lowering_function(TARGET, has_side_effect=True)
    call = target(with_token, token, *arguments, number=np.int64(number_of(work)))
    token, *results = call.results
    ctx.set_tokens_out(ctx.tokens_in.update_tokens(mlir.TokenSet({in_order: token})))
    return results


def _called_back(ctx: Any, *arguments: Any, work: Work) -> Any:
    """A callback of JAX's, which copies: on devices, and where there is no FFI target."""

    def callback(*values: Any) -> tuple[Any, ...]:
        results = [np.empty(each.shape, each.dtype) for each in work.shapes(values)]
        work.run([np.asarray(value) for value in values], results)
        return tuple(results)

    results, token, _ = emit_python_callback(
        ctx,
        callback,
        ctx.tokens_in.get(in_order),
        list(arguments),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=True,
        returns_token=True,
    )
    ctx.set_tokens_out(ctx.tokens_in.update_tokens(mlir.TokenSet({in_order: token})))
    return results


mlir.register_lowering(_primitive, _called_back, cacheable=False)
mlir.register_lowering(_primitive, _compiled, platform="cpu", cacheable=False)


def _require_linear(work: Work, what: str) -> None:
    if not work.linear:
        raise NotImplementedError(f"{work.describe()} has no {what}; a sum and a mean have")


def _moved(given: Sequence[Any], work: Work) -> list[Any]:
    """The work on tangents or cotangents; zeros, which are so on all ranks, stay zeros."""
    there = [i for i, each in enumerate(given) if type(each) is not ad.Zero]
    results = list(given)
    for i, result in zip(there, do(work, [given[i] for i in there]) if there else [], strict=True):
        results[i] = result
    return results


def _derivative(primals: Sequence[Any], tangents: Sequence[Any], work: Work) -> Any:
    _require_linear(work, "derivative")
    return do(work, primals), _moved(tangents, work)


def _transposed(cotangents: Sequence[Any], *arguments: Any, work: Work) -> Any:
    _require_linear(work, "transpose")
    return _moved(cotangents, work)


ad.primitive_jvps[_primitive] = _derivative
ad.primitive_transposes[_primitive] = _transposed


def _batched(arguments: Sequence[Any], dims: Sequence[Any], work: Work) -> Any:
    """Reductions are value by value: the whole batch at once."""
    if not work.by_value:
        raise NotImplementedError(f"{work.describe()} cannot be mapped by vmap: it is one exchange of whole arrays")
    return do(work, arguments), dims


batching.primitive_batchers[_primitive] = _batched
