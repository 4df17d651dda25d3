"""The gradients of parameters as they were before a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Before:
    """The gradients that ``parameters`` have now, to be given back."""

    def __init__(self, parameters: Sequence[Any], copied: Sequence[Any] | None) -> None:
        """``copied``: the tensors whose values may change until then; None: all that there are."""
        self._parameters = parameters
        self._gradients = [p.grad for p in parameters]
        self._values: list[tuple[Any, Any]] = []
        there = [gradient for gradient in self._gradients if gradient is not None]
        if there:
            chosen = None if copied is None else set(map(id, copied))
            self._values = [(g, g.detach().clone()) for g in there if chosen is None or id(g) in chosen]

    @torch.no_grad()
    def give_back(self) -> None:
        """Give the parameters the tensors back that they had, with the values that these had."""
        sparse: dict[int, Any] = {}
        for tensor, values in self._values:
            if tensor.layout == torch.strided:
                tensor.copy_(values)
            else:
                sparse[id(tensor)] = values
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = sparse.get(id(gradient), gradient)
