"""bitring for PyTorch: the gradients of a module averaged over all ranks, for any loop and any optimizer.

``import bitring`` does not load this, nor PyTorch.
"""

from bitring.torch.averager import GradientAverager
from bitring.torch.averages import average_gradients
from bitring.torch.broadcast import broadcast_optimizer_state, broadcast_parameters
from bitring.torch.optimizer import DistributedOptimizer

__all__ = [
    "DistributedOptimizer",
    "GradientAverager",
    "average_gradients",
    "broadcast_optimizer_state",
    "broadcast_parameters",
]
