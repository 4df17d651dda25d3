"""bitring: exchanging gradients over MPI, exactly or at one bit per value.

This module is the whole public API. Importing it neither initialises MPI nor loads a GPU, plotting or dataset
library: every name is loaded when it is first used. What it does is to see that a rank that raises does not leave the
others waiting; see ``bitring.collectives.abort``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitring.collectives.abort import abort_on_exception as _abort_on_exception

if TYPE_CHECKING:
    from bitring.collectives.allreduce import allreduce as allreduce
    from bitring.collectives.communicator import Communicator as Communicator
    from bitring.collectives.errors import DeadRankError as DeadRankError
    from bitring.collectives.errors import MismatchError as MismatchError
    from bitring.collectives.errors import NonFiniteError as NonFiniteError
    from bitring.collectives.errors import PeerError as PeerError
    from bitring.collectives.fusion import start as start
    from bitring.collectives.plan import Plan as Plan
    from bitring.collectives.plan import explain as explain
    from bitring.collectives.schedule import Algorithm as Algorithm
    from bitring.compression.compressor import Compressor as Compressor
    from bitring.compression.encoder import Encoder as Encoder
    from bitring.compression.factors import Factors as Factors
    from bitring.compression.onebit import OneBit as OneBit
    from bitring.compression.plan import plan_allreduce as plan_allreduce
    from bitring.compression.powersgd import PowerSGD as PowerSGD
    from bitring.compression.randomk import RandomK as RandomK
    from bitring.compression.reducer import Reducer as Reducer
    from bitring.compression.sufficient_factors import SufficientFactors as SufficientFactors
    from bitring.models.cnn import CNN as CNN
    from bitring.models.dataset import load as load
    from bitring.models.mlp import MLP as MLP
    from bitring.models.model import Model as Model
    from bitring.models.softmax import Softmax as Softmax
    from bitring.training.adagrad import AdaGrad as AdaGrad
    from bitring.training.batches import Batches as Batches
    from bitring.training.batches import shard as shard
    from bitring.training.block_momentum import BlockMomentum as BlockMomentum
    from bitring.training.checkpoint import load_checkpoint as load_checkpoint
    from bitring.training.checkpoint import save_checkpoint as save_checkpoint
    from bitring.training.checkpoint_header import CheckpointError as CheckpointError
    from bitring.training.data_parallel import DataParallel as DataParallel
    from bitring.training.local import Local as Local
    from bitring.training.mode import Mode as Mode
    from bitring.training.optimizer import Optimizer as Optimizer
    from bitring.training.preemption import Preemption as Preemption
    from bitring.training.sgd import SGD as SGD
    from bitring.training.sync import Sync as Sync

_abort_on_exception()

__version__ = "0.1.0"

_WHERE = {
    "Algorithm": "collectives.schedule",
    "Batches": "training.batches",
    "CheckpointError": "training.checkpoint_header",
    "Communicator": "collectives.communicator",
    "Compressor": "compression.compressor",
    "DataParallel": "training.data_parallel",
    "DeadRankError": "collectives.errors",
    "Encoder": "compression.encoder",
    "Factors": "compression.factors",
    "MismatchError": "collectives.errors",
    "Mode": "training.mode",
    "Model": "models.model",
    "NonFiniteError": "collectives.errors",
    "Optimizer": "training.optimizer",
    "PeerError": "collectives.errors",
    "Plan": "collectives.plan",
    "Preemption": "training.preemption",
    "Reducer": "compression.reducer",
    "allreduce": "collectives.allreduce",
    "explain": "collectives.plan",
    "load": "models.dataset",
    "load_checkpoint": "training.checkpoint",
    "plan_allreduce": "compression.plan",
    "save_checkpoint": "training.checkpoint",
    "shard": "training.batches",
    "start": "collectives.fusion",
}

_REGISTRIES = {
    "algorithms": "collectives.schedule",
    "compressors": "compression.compressor",
    "datasets": "models.dataset",
    "models": "models.model",
    "modes": "training.mode",
    "optimizers": "training.optimizer",
}


def _registry(kind: str) -> Any:
    return getattr(importlib.import_module(f"bitring.{_REGISTRIES[kind]}"), kind)


def algorithms() -> list[str]:
    """Names of the registered collective algorithms."""
    names: list[str] = _registry("algorithms").names()
    return names


def compressors() -> list[str]:
    """Names of the registered compressors."""
    names: list[str] = _registry("compressors").names()
    return names


def modes() -> list[str]:
    """Names of the registered training modes."""
    names: list[str] = _registry("modes").names()
    return names


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"bitring.{_WHERE[name]}"), name)
    if name[:1].isupper():  # a registered class: its file alone makes it public
        for kind in _REGISTRIES:
            registry = _registry(kind)
            registered = registry.class_names().get(name)
            if registered is not None:
                return registry.get(registered)
    raise AttributeError(f"module 'bitring' has no attribute {name!r}")


def __dir__() -> list[str]:
    classes = [name for kind in _REGISTRIES for name in _registry(kind).class_names()]
    return sorted({*globals(), *_WHERE, *classes})
