"""One rank's copy of the model in training: parameters, optimizer and mode, and the state of these two."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bitring.arrays import is_device
from bitring.compression.factors import dense
from bitring.training.mode import BaseMode, FreeMode, Mode, modes
from bitring.training.optimizer import Optimizer, optimizers
from bitring.training.step.bucket import Bucket
from bitring.training.step.checks import checked_parameters, chosen, is_frozen, text_of
from bitring.training.step.meeting import hash_of
from bitring.training.step.undo import arrays_in
from bitring.training.tree import host_copy, set_leaf


class Replica:
    """The parameters are the caller's arrays, updated in place.

    ``optimizer_state`` and ``mode_state`` are empty until the trainer has them made; so many steps as ``warmup_steps``
    says, the first ones, travel exactly.
    """

    def __init__(self, parameters: Any, optimizer: Optimizer | str, mode: BaseMode | str) -> None:
        """Raises TypeError and ValueError for what is none."""
        self.optimizer: Optimizer = chosen("optimizer", optimizer, optimizers, Optimizer)
        self.mode: BaseMode = chosen("mode", mode, modes, BaseMode)
        _require_match(self.optimizer, self.mode)
        self.parameters: dict[str, Any] = checked_parameters(parameters)
        self.on_device = any(map(is_device, self.parameters.values()))
        self.warmup_steps = 0
        self.optimizer_state: dict[str, dict[str, Any]] = {}
        self.mode_state: dict[str, Any] = {}
        self._hash_settings()

    @property
    def common_mode(self) -> Mode:
        """The mode, where it is one whose steps all ranks make together."""
        mode: Any = self.mode
        return mode  # type: ignore[no-any-return]

    def live(self) -> dict[str, Any]:
        """The state but for residuals: a tree of the arrays and numbers in use, no copies."""
        return {"parameters": self.parameters, "optimizer": self.optimizer_state, "mode": self.mode_state}

    def fill(self, values: Mapping[tuple[str, ...], Any]) -> None:
        """Fill leaves of ``live``, by path."""
        tree = self.live()
        for path, value in values.items():
            set_leaf(tree, path, value)

    def digest(self) -> str:
        """A hash of the parameters, bit for bit."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self.parameters.items():
            digest.update(name.encode(errors="surrogatepass"))
            digest.update(host_copy(array).reshape(-1).view(np.uint8))
        return digest.hexdigest()

    # Settings, which may change while training goes on

    def take_optimizer(self, given: Optimizer | str) -> None:
        """Go on with this optimizer.

        Raises ValueError for one that keeps other slots, or that cannot be used in the present one's place.
        """
        new: Optimizer = chosen("optimizer", given, optimizers, Optimizer)
        if set(new.kept) != set(self.optimizer_state):
            raise ValueError(
                f"DataParallel: optimizer must keep the slots {list(self.optimizer_state)} of the trainer's state, "
                f"got {text_of(new)}, which keeps {list(new.kept)}; make another trainer for it"
            )
        _require_match(new, self.mode)
        shared = isinstance(self.mode, FreeMode) and self.optimizer.native_update() is not None
        if shared and new.native_update() is None:  # what is shared is updated in native code
            raise ValueError(
                f"DataParallel: optimizer must have a native kernel in the mode {text_of(self.mode)}, as "
                f"{text_of(self.optimizer)} has, got {text_of(new)}; make another trainer for it"
            )
        self.optimizer = new
        self._hash_settings()

    def take_mode(self, given: BaseMode | str) -> None:
        """Go on with this mode. Raises ValueError for one of another kind."""
        new: BaseMode = chosen("mode", given, modes, BaseMode)
        if type(new) is not type(self.mode):
            raise ValueError(
                f"DataParallel: mode must stay {type(self.mode).__name__}, whose state the trainer keeps, "
                f"got {text_of(new)}; make another trainer for it"
            )
        new.take_over(self.mode_state)
        self.mode = new
        self._hash_settings()

    def words(self) -> list[str]:
        """The settings that ranks compare in each step."""
        return [f"the optimizer {text_of(self.optimizer)}", f"the mode {text_of(self.mode)}"]

    @property
    def settings_hash(self) -> int:
        """A number that is equal where ``words`` are."""
        if self._settings_may_change:
            self._hash_settings()
        return self._settings_hash

    def _hash_settings(self) -> None:
        self._settings_hash = hash_of(" ".join(self.words()))
        self._settings_may_change = not (is_frozen(self.optimizer) and is_frozen(self.mode))

    # What travels

    @property
    def warms_up(self) -> bool:
        """Whether the first steps travel exactly, whatever the compression."""
        return self.warmup_steps > 0 or self.optimizer.exact_steps > 0

    def exact(self, step: int) -> bool:
        """Whether what is exchanged in this step travels exactly, whatever the compression."""
        most = self.optimizer.exact_steps
        learns = most > 0 and any(made < most for made in self.optimizer_state[self.optimizer.counters[0]].values())
        return step < self.warmup_steps or learns

    def travelling(self, gradients: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
        """What the ranks exchange for the gradients of ``names``."""
        if not self.optimizer.sends_its_own:
            return gradients
        return self.optimizer.travelling(dense({name: gradients[name] for name in names}), self.optimizer_state)

    # Updates

    @property
    def update_may_raise(self) -> bool:
        """Whether an update may end in the middle of it."""
        return self.on_device or self.optimizer.may_raise

    def require_writable(self, names: Sequence[str], where: str) -> None:
        """Raise ValueError for a parameter that was made read-only."""
        for name in names:
            if not self.parameters[name].flags.writeable:
                raise ValueError(f"{where}: the parameter {name!r} must be writable, and was made read-only")

    def update(self, gradients: Mapping[str, Any]) -> None:
        """Let the optimizer change the parameters that ``gradients`` names, in place."""
        self.optimizer.update({name: self.parameters[name] for name in gradients}, gradients, self.optimizer_state)

    def update_quietly(self, gradients: Mapping[str, Any]) -> None:
        """``update``; numbers that overflow are found in the next gradients."""
        parameters = {name: self.parameters[name] for name in gradients}
        if not self.optimizer.update_natively(parameters, gradients, self.optimizer_state):
            with np.errstate(all="ignore"):
                self.optimizer.update(parameters, gradients, self.optimizer_state)

    def arrays_that_change(self, buckets: Sequence[Bucket]) -> list[tuple[Any, list[Any]]]:
        """The arrays of a step's undo, those of one bucket and slot together, each with a key."""
        kinds: dict[tuple[str, ...], dict[str, Any]] = {("parameters",): self.parameters}
        kinds |= {("optimizer", slot): arrays for slot, arrays in self.optimizer_state.items()}
        changes: list[tuple[Any, list[Any]]] = [
            ((kind, i), [arrays[name] for name in bucket.shapes])
            for kind, arrays in kinds.items()
            for i, bucket in enumerate(buckets)
        ]
        return changes + [(path, [array]) for path, array in arrays_in({"mode": self.mode_state})]


def _require_match(optimizer: Optimizer, mode: BaseMode) -> None:
    if optimizer.sends_its_own and not (isinstance(mode, Mode) and mode.wait_free):
        raise ValueError(
            f"DataParallel: mode must be 'sync' with the optimizer {text_of(optimizer)}, which has the ranks exchange "
            f"its own values in every step, got {text_of(mode)}"
        )
