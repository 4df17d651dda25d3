"""The base of optimizers: settings in a frozen dataclass, state in plain dicts, the update in place.

A class ``class Name(Elementwise):`` in ``training/optimizers/NAME.py`` is registered as ``NAME``. It says which arrays
it keeps for a parameter (``slots``), whether it counts updates (``counters``), and what happens to a run of values
(``apply``); the walk over parameters is here. One whose values depend on each other, by a norm or by rows, is a
``class Name(Optimizer):`` with ``update_parameter``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bitring.arrays import xp_of
from bitring.native import extension, native, type_of
from bitring.registry import Registry
from bitring.settings import Settings

State = dict[str, dict[str, Any]]
"""Slot -> parameter's name -> array of the parameter's shape and dtype; counter -> parameter's name -> NumPy int64."""

# Values that are updated at once. On the host a piece and its scratch stay in the cache; on a device a piece is large,
# since each costs a few kernel launches.
_HOST_PIECE = 1 << 15
_DEVICE_PIECE = 1 << 22

_SMALL = 1 << 12
"""Arrays of up to so many values are copied together: what an operation costs at any size is most of it."""


class NativeUpdate(NamedTuple):
    """The native engine's kernel that makes an optimizer's update, with the same bits: its name and its numbers."""

    rule: str
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    eps: float = 0.0


@lru_cache(maxsize=64)
def _updater(update: NativeUpdate, dtype: np.dtype[Any]) -> Any:
    """The kernel with its settings, for values of ``dtype``; None where there is none."""
    kind = type_of(dtype)
    if native() is None or kind is None or dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        return None
    return extension.Updater(extension.Rule[update.rule], kind, *update[1:])


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

    def native_update(self) -> NativeUpdate | None:
        """The kernel that does the same in memory shared by ranks (``collectives/native/update_kernels.h``), if any."""
        return None

    counters: tuple[str, ...] = ()
    """Names of the numbers kept for each parameter that count its updates, the one being made included."""

    exact_steps: int = 0
    """So many updates, by the first of ``counters``, are of gradients that travel exactly, whatever the compression."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The parts of the state: slots and counters."""
        return (*self.slots, *self.counters)

    def init(self, parameters: Mapping[str, Any]) -> State:
        """New state for ``parameters``: zeros, of each parameter's shape, dtype and device; counters on the host."""
        slots = {slot: {name: xp_of(w).zeros_like(w) for name, w in parameters.items()} for slot in self.slots}
        return slots | {counter: {name: np.zeros((), np.int64) for name in parameters} for counter in self.counters}

    def travelling(self, gradients: Mapping[str, Any], state: State) -> Mapping[str, Any]:
        """What the ranks exchange for these gradients, name -> array like them; ``update`` gets its mean."""
        return gradients

    @property
    def sends_its_own(self) -> bool:
        """Whether something else than gradients travels, so that it is only for a mode whose steps exchange it."""
        return type(self).travelling is not Optimizer.travelling

    def update(self, parameters: Mapping[str, Any], gradients: Mapping[str, Any], state: State) -> None:
        """One step, in place on ``parameters`` and ``state``; ``gradients`` are only read.

        ``parameters`` are floating-point arrays, NumPy or CuPy; they may be some of those that ``state`` was made for.
        ``gradients`` has an array of the same shape and dtype for each.
        """
        for name, w in parameters.items():
            slots = {slot: state[slot][name] for slot in self.slots}
            self.update_parameter(w, gradients[name], slots | self._counted(name, state))

    def update_natively(self, parameters: Mapping[str, Any], gradients: Mapping[str, Any], state: State) -> bool:
        """As ``update``, with the same bits, where the native engine can; whether it could, else nothing was done."""
        return False

    def _counted(self, name: str, state: State) -> dict[str, int]:
        """Count an update of a parameter."""
        counts: dict[str, int] = {}
        for counter in self.counters:
            kept = state[counter][name]
            kept += 1
            counts[counter] = int(kept)
        return counts

    @abstractmethod
    def update_parameter(self, w: Any, g: Any, slots: Mapping[str, Any]) -> None:
        """Update the parameter ``w`` and its ``slots`` in place from the gradient ``g``, which is only read.

        All have the parameter's shape and dtype: its norm and its rows can be seen here. Counters are in ``slots`` as
        int.
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

    def updates_as(self, base: type[Elementwise]) -> bool:
        """Whether the update is that of ``base``; a class derived from it may have another."""
        own = type(self)
        return own.update is Elementwise.update and own.apply is base.apply

    @abstractmethod
    def apply(self, w: Any, g: Any, slots: Mapping[str, Any], t: Any, u: Any) -> None:
        """Update the values ``w`` and their ``slots`` in place from the gradient ``g``, which is only read.

        All are 1-D, of one size and dtype; ``t`` and ``u`` are scratch. Counters are in ``slots`` as int.
        """

    def update_parameter(self, w: Any, g: Any, slots: Mapping[str, Any]) -> None:
        """See Optimizer."""
        self._update_alone(w, g, slots, {})

    def update(self, parameters: Mapping[str, Any], gradients: Mapping[str, Any], state: State) -> None:
        """See Optimizer. Small arrays that were updated equally often are updated together, in copies.

        Allocates scratch of a few pieces, and copies of parameters that are not C-contiguous. Contiguous float32 or
        float64 arrays of the host are updated by the ``native_update``, in one call, and nothing is allocated.
        """
        if self.update_natively(parameters, gradients, state):
            return
        together: dict[Any, list[str]] = {}
        held: dict[Any, int] = {}
        scratch: dict[Any, tuple[Any, Any]] = {}
        for name, w in parameters.items():
            counts = self._counted(name, state)
            size, alike = w.size, (w.dtype, *counts.values())
            if size > _SMALL:
                slots = {slot: state[slot][name] for slot in self.slots}
                self._update_alone(w, gradients[name], slots | counts, scratch)
                continue
            names = together.setdefault(alike, [])
            names.append(name)
            held[alike] = held.get(alike, 0) + size
            if held[alike] > _HOST_PIECE - _SMALL:
                self._update_together(together.pop(alike), counts, parameters, gradients, state)
                held[alike] = 0
        for (_, *counted), names in together.items():
            counts = dict(zip(self.counters, counted, strict=True))
            self._update_together(names, counts, parameters, gradients, state)

    def update_natively(self, parameters: Mapping[str, Any], gradients: Mapping[str, Any], state: State) -> bool:
        """See Optimizer. Of contiguous arrays of float32 or float64."""
        kernel, arrays = self.native_update(), list(parameters.values())
        if kernel is None or self.may_raise or not arrays or type(arrays[0]) is not np.ndarray:
            return False
        updater = _updater(kernel, arrays[0].dtype)
        if updater is None:
            return False
        slots = [state[slot][name] for slot in self.slots for name in parameters]
        updated: bool = updater.run(arrays, slots, [gradients[name] for name in parameters])
        return updated

    def _update_alone(
        self, parameter: Any, gradient: Any, given: Mapping[str, Any], scratch: dict[Any, tuple[Any, Any]]
    ) -> None:
        xp = xp_of(parameter)
        n = parameter.size
        piece = max(1, min(_HOST_PIECE if xp is np else _DEVICE_PIECE, n))
        w, g = parameter.reshape(-1), gradient.reshape(-1)
        counts = {counter: given[counter] for counter in self.counters}
        slots = {slot: given[slot].reshape(-1) for slot in self.slots}
        t, u = scratch.get(w.dtype, (w[:0], w[:0]))
        if t.size < piece:
            t, u = scratch[w.dtype] = xp.empty(piece, w.dtype), xp.empty(piece, w.dtype)
        for start in range(0, n, piece):
            part = slice(start, min(start + piece, n))
            size = part.stop - start
            run = {slot: s[part] for slot, s in slots.items()}
            self.apply(w[part], g[part], run | counts, t[:size], u[:size])
        if not parameter.flags.c_contiguous:
            parameter[...] = w.reshape(parameter.shape)
            for slot, s in slots.items():
                given[slot][...] = s.reshape(parameter.shape)

    def _update_together(
        self,
        names: list[str],
        counts: Mapping[str, int],
        parameters: Mapping[str, Any],
        gradients: Mapping[str, Any],
        state: State,
    ) -> None:
        if len(names) == 1:  # nothing is saved by copies
            name = names[0]
            slots = {slot: state[slot][name] for slot in self.slots}
            self._update_alone(parameters[name], gradients[name], {**slots, **counts}, {})
            return
        ws = [parameters[name] for name in names]
        xp = xp_of(ws[0])
        w = xp.concatenate(ws, axis=None)
        g = xp.concatenate([gradients[name] for name in names], axis=None)
        changed = [[state[slot][name] for name in names] for slot in self.slots]
        slots = {slot: xp.concatenate(arrays, axis=None) for slot, arrays in zip(self.slots, changed, strict=True)}
        self.apply(w, g, {**slots, **counts}, xp.empty_like(w), xp.empty_like(w))
        for arrays, values in ((ws, w), *zip(changed, slots.values(), strict=True)):
            start = 0
            for array in arrays:
                stop = start + array.size
                array[...] = values[start:stop] if array.ndim == 1 else values[start:stop].reshape(array.shape)
                start = stop


def require_gradients(optimizer: Optimizer, where: str) -> None:
    """Raise ValueError for an optimizer that is not content with gradients; ``where`` names function and argument."""
    if optimizer.sends_its_own:
        raise ValueError(
            f"{where} must be an optimizer of gradients; got {optimizer!r}, which has the ranks exchange values of its "
            "own in every step: it is for DataParallel in mode 'sync'"
        )


optimizers: Registry[Optimizer] = Registry("optimizer", Optimizer, "training/optimizers", group="bitring.optimizers")
