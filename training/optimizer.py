"""The base of optimizers: settings in a frozen dataclass, state in plain dicts, the update in place.

A class ``class Name(Elementwise):`` in ``training/optimizers/NAME.py`` is registered as ``NAME``. It says which arrays
it keeps for a parameter (``slots``) and what happens to a run of values (``apply``); the walk over parameters is here.
One whose values depend on each other, by a norm or by rows, is a ``class Name(Optimizer):`` with ``update_parameter``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from bitring.arrays import xp_of
from bitring.registry import Registry
from bitring.settings import Settings

State = dict[str, dict[str, Any]]  # slot -> parameter's name -> array of the parameter's shape and dtype

# Values that are updated at once. On the host a piece and its scratch stay in the cache; on a device a piece is large,
# since each costs a few kernel launches.
_HOST_PIECE = 1 << 15
_DEVICE_PIECE = 1 << 22

_SMALL = 1 << 12
"""Arrays of up to so many values are copied together: what an operation costs at any size is most of it."""


_Apply = TypeVar("_Apply", bound=Callable[..., None])


def cannot_raise(apply: _Apply) -> _Apply:
    """A decorator for an ``apply`` that is arithmetic on its arguments and nothing else, and so comes to its end.

    A trainer's step need not copy what such an optimizer changes on the host. Any other ``apply`` may raise.
    """
    apply.cannot_raise = True  # type: ignore[attr-defined]  # of this very function: one that overrides it has its own
    return apply


class Optimizer(Settings, ABC):
    """Base of every optimizer; instances are settings and hold no state. Updates look at whole parameters."""

    @property
    def may_raise(self) -> bool:
        """Whether an update of host arrays, which match and are writable, may end in the middle of it."""
        return True

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays kept for each parameter; they start as zeros."""

    def init(self, parameters: Mapping[str, Any]) -> State:
        """New state for ``parameters``: zeros, of each parameter's shape, dtype and device."""
        return {slot: {name: xp_of(w).zeros_like(w) for name, w in parameters.items()} for slot in self.slots}

    def update(self, parameters: Mapping[str, Any], gradients: Mapping[str, Any], state: State) -> None:
        """One step, in place on ``parameters`` and ``state``; ``gradients`` are only read.

        ``parameters`` are floating-point arrays, NumPy or CuPy; they may be some of those that ``state`` was made for.
        ``gradients`` has an array of the same shape and dtype for each.
        """
        for name, w in parameters.items():
            self.update_parameter(w, gradients[name], {slot: arrays[name] for slot, arrays in state.items()})

    @abstractmethod
    def update_parameter(self, w: Any, g: Any, slots: Mapping[str, Any]) -> None:
        """Update the parameter ``w`` and its ``slots`` in place from the gradient ``g``, which is only read.

        All have the parameter's shape and dtype: its norm and its rows can be seen here.
        """

    def restart(self, state: State) -> None:
        """Forget the directions of past steps (momentum), in place; what scales the steps stays."""


class Elementwise(Optimizer):
    """Base of those whose values do not see each other: they are updated in runs that stay in the cache."""

    @property
    def may_raise(self) -> bool:
        """See Optimizer."""
        own = type(self)
        return own.update is not Elementwise.update or not getattr(own.apply, "cannot_raise", False)

    @abstractmethod
    def apply(self, w: Any, g: Any, slots: Mapping[str, Any], t: Any, u: Any) -> None:
        """Update the values ``w`` and their ``slots`` in place from the gradient ``g``, which is only read.

        All are 1-D, of one size and dtype; ``t`` and ``u`` are scratch.
        """

    def update_parameter(self, w: Any, g: Any, slots: Mapping[str, Any]) -> None:
        """See Optimizer."""
        self._update_alone(w, g, dict(slots), {})

    def update(self, parameters: Mapping[str, Any], gradients: Mapping[str, Any], state: State) -> None:
        """See Optimizer. Small arrays are updated together, in copies.

        Allocates scratch of a few pieces, and copies of parameters that are not C-contiguous.
        """
        together: dict[Any, list[str]] = {}
        held: dict[Any, int] = {}
        scratch: dict[Any, tuple[Any, Any]] = {}
        for name, w in parameters.items():
            size, dtype = w.size, w.dtype
            if size > _SMALL:
                self._update_alone(w, gradients[name], {slot: each[name] for slot, each in state.items()}, scratch)
                continue
            names = together.setdefault(dtype, [])
            names.append(name)
            held[dtype] = held.get(dtype, 0) + size
            if held[dtype] > _HOST_PIECE - _SMALL:
                self._update_together(together.pop(dtype), parameters, gradients, state)
                held[dtype] = 0
        for names in together.values():
            self._update_together(names, parameters, gradients, state)

    def _update_alone(
        self, parameter: Any, gradient: Any, arrays: dict[str, Any], scratch: dict[Any, tuple[Any, Any]]
    ) -> None:
        xp = xp_of(parameter)
        n = parameter.size
        piece = min(_HOST_PIECE if xp is np else _DEVICE_PIECE, n)
        w, g = parameter.reshape(-1), gradient.reshape(-1)
        slots = {slot: array.reshape(-1) for slot, array in arrays.items()}
        t, u = scratch.get(w.dtype, (w[:0], w[:0]))
        if t.size < piece:
            t, u = scratch[w.dtype] = xp.empty(piece, w.dtype), xp.empty(piece, w.dtype)
        for start in range(0, n, piece):
            part = slice(start, min(start + piece, n))
            size = part.stop - start
            self.apply(w[part], g[part], {slot: s[part] for slot, s in slots.items()}, t[:size], u[:size])
        if not parameter.flags.c_contiguous:
            parameter[...] = w.reshape(parameter.shape)
            for slot, s in slots.items():
                arrays[slot][...] = s.reshape(parameter.shape)

    def _update_together(
        self, names: list[str], parameters: Mapping[str, Any], gradients: Mapping[str, Any], state: State
    ) -> None:
        ws = [parameters[name] for name in names]
        xp = xp_of(ws[0])
        w = xp.concatenate(ws, axis=None)
        g = xp.concatenate([gradients[name] for name in names], axis=None)
        changed = [[arrays[name] for name in names] for arrays in state.values()]
        slots = {slot: xp.concatenate(arrays, axis=None) for slot, arrays in zip(state, changed, strict=True)}
        self.apply(w, g, slots, xp.empty_like(w), xp.empty_like(w))
        for arrays, values in ((ws, w), *zip(changed, slots.values(), strict=True)):
            start = 0
            for array in arrays:
                stop = start + array.size
                array[...] = values[start:stop] if array.ndim == 1 else values[start:stop].reshape(array.shape)
                start = stop


optimizers: Registry[Optimizer] = Registry("optimizer", Optimizer, "training/optimizers", group="bitring.optimizers")
