"""The parameters and buffers that a module has, and whether it still has just these."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch


class Watched:
    """The parameters of ``module`` by name, each once, and how they were when this was made."""

    def __init__(self, module: Any) -> None:
        self.parameters: dict[str, Any] = dict(module.named_parameters())
        self.trained: dict[str, Any] = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._all = list(self.parameters.values())
        self._kinds = self._kinds_now()
        parts = list(module.modules())
        self._tables = [(table, list(table.values())) for part in parts for table in (part._parameters, part._modules)]
        self._buffers = [(part._buffers, _kinds(part._buffers)) for part in parts]

    def _kinds_now(self) -> tuple[list[Any], ...]:
        there = self._all
        return (
            [p.requires_grad for p in there],
            [p.dtype for p in there],
            [p.is_cuda for p in there],
            [p.shape for p in there],
        )

    @property
    def unchanged(self) -> bool:
        """Whether the module has these parameters and buffers, of the same kind, and trains the same."""
        for table, things in self._tables:
            if len(table) != len(things) or (things and not all(map(is_, table.values(), things))):
                return False
        for table, kinds in self._buffers:
            if (table or kinds) and _kinds(table) != kinds:
                return False
        return self._kinds_now() == self._kinds


def sparse_names(module: Any) -> set[str]:
    """Names of the parameters whose gradients are sparse: embeddings' that ask for it."""
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    sparse = {id(part.weight) for part in module.modules() if isinstance(part, kinds) and part.sparse}
    return {name for name, p in module.named_parameters() if id(p) in sparse}


def _kinds(buffers: Mapping[str, Any]) -> list[Any]:
    """What is known of the buffers of one module: code may put another tensor into a buffer's place at any time."""
    return [(name, None if b is None else (b.shape, b.dtype, b.is_cuda)) for name, b in buffers.items()]


def kept_buffers(module: Any) -> dict[str, Any]:
    """The buffers that are numbers and part of the module's state, such as batch normalisation's running statistics."""
    return {name: b for name, b in _state_buffers(module).items() if b.numel() and b.dtype in _NUMBERS}


def state_tensors(module: Any) -> dict[str, Any]:
    """Parameters, and the buffers that are part of the module's state, of any dtype."""
    return {name: p.detach() for name, p in module.named_parameters()} | _state_buffers(module)


def _state_buffers(module: Any) -> dict[str, Any]:
    inside = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in inside}


_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
