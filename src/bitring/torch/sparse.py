"""Sparse gradients, gathered: the rows that any rank has, each times its part of the weight."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from bitring.collectives.runtime.objects import allgather


def gathered(comm: MPI.Intracomm, parameter: Any, gradient: Any, scale: float) -> Any:
    """The sum over ranks of scale·gradient as a coalesced sparse tensor; None where all have None. Collective.

    ``gradient``: of ``parameter``, sparse or dense, or None.
    """
    mine: Any = None
    if gradient is not None:
        rows = gradient if gradient.layout == torch.sparse_coo else gradient.to_sparse(1)
        rows = rows.coalesce()
        mine = rows.indices().cpu().numpy(), (rows.values().to(parameter.dtype) * scale).cpu()
        mine = mine[0], mine[1].view(torch.uint8).numpy(), tuple(mine[1].shape)
    everyone = [each for each in allgather(comm, mine, "GradientAverager") if each is not None]
    if not everyone:
        return None
    indices = torch.cat([torch.from_numpy(indices) for indices, _, _ in everyone], dim=1)
    values = torch.cat([torch.from_numpy(raw).view(parameter.dtype).reshape(shape) for _, raw, shape in everyone])
    whole = torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)
    return whole.coalesce().to(parameter.device)


def full_row(parameter: Any, value: float) -> Any:
    """A sparse tensor like ``parameter``, with ``value`` in all of its first row."""
    values = torch.full((1, *parameter.shape[1:]), value, dtype=parameter.dtype, device=parameter.device)
    where = torch.zeros((1, 1), dtype=torch.int64, device=parameter.device)
    return torch.sparse_coo_tensor(where, values, parameter.shape, check_invariants=False).coalesce()
