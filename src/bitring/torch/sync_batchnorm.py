"""Synchronised batch normalisation: the statistics are of the samples of all ranks, as one process would have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch.autograd.function import once_differentiable

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.context import context_of, given_comm
from bitring.torch.tensors import array_over


class Statistics:
    """Sums over the ranks of ``comm`` for the layers of models: one for each communicator, freed with it.

    A rank whose step has failed does not come to the layers that were left; so that the others do not wait there, the
    ranks meet here at the end of a step, too.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._heard = False  # whether all ranks know already that something has failed

    def __deepcopy__(self, memo: Any) -> Statistics:
        return self  # a copy of a model is of this process, too

    def __reduce__(self) -> Any:
        return _no_statistics, ()

    def summed(self, *tensors: Any) -> list[Any]:
        """The sums over ranks of tensors, in one dimension and as float64 on the host. Collective."""
        packed = torch.cat([t.detach().to("cpu", torch.float64).reshape(-1) for t in tensors])
        try:
            self.comm.Allreduce(MPI.IN_PLACE, array_over(packed))
        except Exception:
            self._heard = True
            raise
        return list(packed.split([t.numel() for t in tensors]))

    def end_step(self, failure: BaseException | None) -> None:
        """A step ends, on this rank by ``failure`` or well. Collective; raises where it has failed elsewhere."""
        heard, self._heard = self._heard, False
        if heard or self.comm == MPI.COMM_NULL:
            return
        if failure is None:
            self.comm.Allreduce(MPI.IN_PLACE, np.zeros(1))
            return
        context, function = context_of(self.comm), "Allreduce"
        error = failure if isinstance(failure, Exception) else RuntimeError(f"{type(failure).__name__}: {failure}")
        with context.turn(function):
            context.refuse(function, error)


def _no_statistics() -> None:
    """What a model has after it was in a file."""


def statistics_of(module: Any) -> list[Statistics]:
    """Those that layers of ``module`` use, each once, in the layers' order."""
    found = [part.statistics for part in module.modules() if isinstance(part, SyncBatchNorm)]
    return list(dict.fromkeys(each for each in found if each is not None))


class _Normalize(torch.autograd.Function):
    """(x − mean)/√(var + eps), with mean and var over all dimensions but the second and all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Any, statistics: Statistics, eps: float) -> Any:
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.double() if x.dtype == torch.float64 else x.float()
        count = torch.tensor([float(x.numel() // max(x.shape[1], 1))])
        sums, total = statistics.summed(wide.sum(dims, dtype=torch.float64), count)
        n = max(float(total), 1.0)
        mean = sums / n
        centred = wide - mean.to(wide).view(shape)
        (squares,) = statistics.summed(centred.square().sum(dims, dtype=torch.float64))
        var = squares / n
        inverse = (var + eps).rsqrt().to(wide)
        normal = centred * inverse.view(shape)
        ctx.save_for_backward(normal, inverse)
        ctx.statistics, ctx.n, ctx.dims, ctx.shape, ctx.samples = statistics, n, dims, shape, x.shape[0]
        mean, var = mean.to(wide), var.to(wide)
        ctx.mark_non_differentiable(mean, var)
        return normal.to(x.dtype), mean, var, n

    @staticmethod
    @once_differentiable  # what the sums do is not known to autograd
    def backward(ctx: Any, g: Any, *_: Any) -> Any:
        normal, inverse = ctx.saved_tensors
        # Each rank's loss is the mean over its samples, and counts by their number: so do the ranks' parts of the sums.
        samples, wide = ctx.samples, g.to(normal.dtype)
        mine = [each.sum(ctx.dims, dtype=torch.float64) * samples for each in (wide, wide * normal)]
        ones, products = ctx.statistics.summed(*(mine if samples else map(torch.zeros_like, mine)))
        scale = 1 / (ctx.n * max(samples, 1))
        ones, products = ((each * scale).to(normal).view(ctx.shape) for each in (ones, products))
        return ((wide - ones - normal * products) * inverse.view(ctx.shape)).to(g.dtype), None, None


class SyncBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all ranks' samples, of which a rank may have none; see ``convert_sync_batchnorm``."""

    statistics: Statistics | None = None

    def _check_input_dim(self, input: Any) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: the input must have at least 2 dimensions; got {input.dim()}")

    def forward(self, input: Any) -> Any:
        """As torch.nn.BatchNorm's; collective in training, and in backward()."""
        self._check_input_dim(input)
        statistics = self.statistics
        if not (self.training or self.running_mean is None) or (statistics and statistics.comm.Get_size() == 1):
            return super().forward(input)
        if statistics is None:
            raise RuntimeError(
                "SyncBatchNorm: a model that comes from a file, or from another process, has no communicator; "
                "call convert_sync_batchnorm(model, comm) again"
            )
        normal, mean, var, n = _Normalize.apply(input, statistics, self.eps)
        if self.training and self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), factor)
                unbiased = var * (n / max(n - 1, 1))
                self.running_var.lerp_(unbiased.to(self.running_var), factor)
        if self.weight is None:
            return normal
        shape = [1, -1] + [1] * (input.dim() - 2)
        return (normal * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)


def convert_sync_batchnorm(module: Any, comm: MPI.Intracomm | None = None) -> Any:
    """``module`` with its batch normalisation over the samples of all ranks: BatchNorm1d, 2d and 3d. Collective.

    The loss is to be the mean over the rank's samples, and their number its ``weight`` in the averaging; with equal
    batches that makes no difference. Parameters and buffers stay the same tensors. Returns the module, which is another
    one only where it is itself a BatchNorm. All ranks must go through such layers in the same order, those with an
    empty batch too.
    """
    base = given_comm(comm, "convert_sync_batchnorm")
    kept = context_of(base).kept
    if "SyncBatchNorm" not in kept:
        kept["communicator of SyncBatchNorm"] = Communicator(base).Dup()
        kept["SyncBatchNorm"] = Statistics(kept["communicator of SyncBatchNorm"])
    return _converted(module, kept["SyncBatchNorm"], {})


def _converted(module: Any, statistics: Statistics, made_of: dict[Any, Any]) -> Any:
    """``made_of``: modules that were seen already: one may be at several places."""
    if module in made_of:
        return made_of[module]
    made = module
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    if isinstance(module, kinds):
        made = SyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        made.train(module.training)
        made._parameters.update(module._parameters)
        made._buffers.update(module._buffers)
    if isinstance(made, SyncBatchNorm):
        made.statistics = statistics
    made_of[module] = made
    for name, child in list(module._modules.items()):
        if child is not None:
            made.add_module(name, _converted(child, statistics, made_of))
    return made
