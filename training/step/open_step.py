"""A step while its gradients come, one by one: buckets travel as soon as they are complete, first to last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from bitring.errors import NonFiniteError
from bitring.training.step.checks import checked_gradients, not_finite
from bitring.training.step.gradient_exchange import GradientExchange


class OpenStep:
    """What ``DataParallel.begin`` returns. For ``with``: an exception in the block ends the step on all ranks.

    ``weight``: this rank's samples; with 0 its gradients are not looked at, but buckets travel when the others'
    do. ``travels``: whether buckets are exchanged
    as they are complete, which takes the ``total`` of all ranks' weights; else gradients are kept for ``step``.
    """

    def __init__(
        self,
        exchange: GradientExchange,
        weight: float,
        travels: bool,
        abandon: Callable[[OpenStep, BaseException], None],
    ) -> None:
        self._exchange = exchange
        self._abandon = abandon
        self._loaded = 0
        self.weight = weight
        self.travels = travels
        self.total: float | None = None
        self.heard = False
        """Whether the ranks' records have been waited for."""
        self.gradients: dict[str, Any] = {}

    def __enter__(self) -> OpenStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon(self, error)

    def take(self, name: str, gradient: Any, parameters: Mapping[str, Any], where: str, rank: int) -> None:
        """Keep a gradient. Raises TypeError, ValueError or NonFiniteError for what is none."""
        if not isinstance(name, str) or name not in parameters:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{where}: name must be a parameter's: {', '.join(parameters)}; got {name!r}")
        if name in self.gradients:
            raise ValueError(f"{where}: the gradient of {name!r} was handed over already in this step")
        if not self.travels or not self.weight:
            self.gradients[name] = gradient if self.weight else None
            return
        taken = checked_gradients({name: gradient}, {name: parameters[name]}, where, False)
        bad = not_finite(taken)
        if bad is not None:
            raise NonFiniteError(f"{where}: the gradient of {bad} on rank {rank}")
        self.gradients |= self._exchange.as_it_travels(taken)

    def complete(self, parameters: Mapping[str, Any], where: str, zeros: bool) -> None:
        """Put zeros in the place of gradients that did not come. Raises ValueError where ``zeros`` says they must."""
        self.gradients = (
            checked_gradients(self.gradients, parameters, where, zeros) if self.weight else dict.fromkeys(parameters)
        )

    def advance(self, total: Callable[[], float]) -> None:
        """Load the buckets that are complete; those of a large model begin to travel. ``total`` waits for the ranks."""
        buckets = self._exchange.buckets
        while self._loaded < len(buckets) and buckets[self._loaded].shapes.keys() <= self.gradients.keys():
            everyone = total()
            if not everyone:
                return
            scale = self.weight / everyone
            self._exchange.load(self._loaded, self.gradients, scale, None, self._exchange.overlaps)
            self._loaded += 1
