"""bitring for PyTorch: the gradients of a module averaged over all ranks, for any loop and any optimizer.

``import bitring`` does not load this, nor PyTorch.
"""

from bitring.torch.averager import GradientAverager
from bitring.torch.averages import average_gradients
from bitring.torch.broadcast import broadcast_optimizer_state, broadcast_parameters
from bitring.torch.checkpoint import load_checkpoint, save_checkpoint
from bitring.torch.comm_hook import CommHook, comm_hook
from bitring.torch.local_updates import LocalUpdates
from bitring.torch.onebit_adam import OneBitAdam
from bitring.torch.optimizer import DistributedOptimizer
from bitring.torch.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "CommHook",
    "DistributedOptimizer",
    "GradientAverager",
    "LocalUpdates",
    "OneBitAdam",
    "SyncBatchNorm",
    "average_gradients",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "comm_hook",
    "convert_sync_batchnorm",
    "load_checkpoint",
    "save_checkpoint",
]
