"""The gradients of parameters, as they were before a step and as they are after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


class Before:
    """The gradients that ``parameters`` have now, to be given back."""

    def __init__(self, parameters: Iterable[Any], copied: Sequence[Any] | None) -> None:
        """``copied``: the tensors whose values may change until then; None: all that there are."""
        self._kept = [(p, p.grad) for p in parameters]
        chosen = None if copied is None else {id(tensor) for tensor in copied}
        self._values = [
            (g, g.detach().clone()) for _, g in self._kept if g is not None and (chosen is None or id(g) in chosen)
        ]

    @torch.no_grad()
    def give_back(self) -> None:
        """Give the parameters the tensors back that they had, with the values that these had."""
        for tensor, values in self._values:
            if tensor.layout == torch.strided:
                tensor.copy_(values)
        sparse = {id(tensor): values for tensor, values in self._values if tensor.layout != torch.strided}
        for p, gradient in self._kept:
            p.grad = sparse.get(id(gradient), gradient)
