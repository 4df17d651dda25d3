"""bitring: exchanging gradients over MPI, exactly or at one bit per value.

This module is the whole public API. Importing it neither initialises MPI nor loads a GPU, plotting or dataset library:
every name is loaded when it is first used. Importing it installs a hook: a rank that raises an exception that nobody
catches ends the others, which would wait for it; see ``bitring.collectives.runtime.abort``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitring.collectives.runtime.abort import abort_on_exception as _abort_on_exception

if TYPE_CHECKING:
    from bitring.collectives.allreduce import allreduce as allreduce
    from bitring.collectives.base_plan import Plan as Plan
    from bitring.collectives.communicator import Communicator as Communicator
    from bitring.collectives.fusion import start as start
    from bitring.collectives.schedules.schedule import Algorithm as Algorithm
    from bitring.compression.compressor import Compressor as Compressor
    from bitring.compression.encoder import Encoder as Encoder
    from bitring.compression.encoders.onebit import OneBit as OneBit
    from bitring.compression.factors import Factors as Factors
    from bitring.compression.plans.plan import plan_allreduce as plan_allreduce
    from bitring.compression.reducer import Reducer as Reducer
    from bitring.compression.reducers.powersgd import PowerSGD as PowerSGD
    from bitring.compression.reducers.randomk import RandomK as RandomK
    from bitring.compression.reducers.sufficient_factors import SufficientFactors as SufficientFactors
    from bitring.errors import DeadRankError as DeadRankError
    from bitring.errors import MismatchError as MismatchError
    from bitring.errors import NonFiniteError as NonFiniteError
    from bitring.errors import PeerError as PeerError
    from bitring.models.dataset import load as load
    from bitring.models.descriptions import LSTM as LSTM
    from bitring.models.descriptions import Add as Add
    from bitring.models.descriptions import Concatenate as Concatenate
    from bitring.models.descriptions import Convolution as Convolution
    from bitring.models.descriptions import Dense as Dense
    from bitring.models.descriptions import Dropout as Dropout
    from bitring.models.descriptions import Flatten as Flatten
    from bitring.models.descriptions import MaxPool as MaxPool
    from bitring.models.descriptions import ReLU as ReLU
    from bitring.models.descriptions import Select as Select
    from bitring.models.layers import Draw as Draw
    from bitring.models.model import Model as Model
    from bitring.models.networks.cnn import CNN as CNN
    from bitring.models.networks.mlp import MLP as MLP
    from bitring.models.networks.softmax import Softmax as Softmax
    from bitring.models.sequence import Graph as Graph
    from bitring.models.sequence import Sequence as Sequence
    from bitring.training.batches import Batches as Batches
    from bitring.training.batches import shard as shard
    from bitring.training.checkpoints.header import CheckpointError as CheckpointError
    from bitring.training.checkpoints.loading import load_checkpoint as load_checkpoint
    from bitring.training.checkpoints.saving import save_checkpoint as save_checkpoint
    from bitring.training.claimed import claimed as claimed
    from bitring.training.data_parallel import DataParallel as DataParallel
    from bitring.training.explain import explain as explain
    from bitring.training.lasso import Lasso as Lasso
    from bitring.training.lbfgs import LBFGS as LBFGS
    from bitring.training.logistic_regression import LogisticRegression as LogisticRegression
    from bitring.training.mode import Mode as Mode
    from bitring.training.model_parallel import ModelParallel as ModelParallel
    from bitring.training.modes.block_momentum import BlockMomentum as BlockMomentum
    from bitring.training.modes.hogwild import Hogwild as Hogwild
    from bitring.training.modes.local import Local as Local
    from bitring.training.modes.peers import Peers as Peers
    from bitring.training.modes.sync import Sync as Sync
    from bitring.training.optimizer import Optimizer as Optimizer
    from bitring.training.optimizers.adagrad import AdaGrad as AdaGrad
    from bitring.training.optimizers.adam import Adam as Adam
    from bitring.training.optimizers.onebit_adam import OneBitAdam as OneBitAdam
    from bitring.training.optimizers.sgd import SGD as SGD
    from bitring.training.placement.placement import Placement as Placement
    from bitring.training.preemption import Preemption as Preemption
    from bitring.training.prefetch import prefetch as prefetch
    from bitring.training.sandblaster import Sandblaster as Sandblaster
    from bitring.training.sparse import Sparse as Sparse
    from bitring.training.store.parameter_store import ParameterStore as ParameterStore
    from bitring.training.strads import Strads as Strads

_abort_on_exception()

__version__ = "0.1.0"

_WHERE = {
    "Add": "models.descriptions",
    "Algorithm": "collectives.schedules.schedule",
    "Batches": "training.batches",
    "CheckpointError": "training.checkpoints.header",
    "Communicator": "collectives.communicator",
    "Compressor": "compression.compressor",
    "Concatenate": "models.descriptions",
    "Convolution": "models.descriptions",
    "DataParallel": "training.data_parallel",
    "DeadRankError": "errors",
    "Dense": "models.descriptions",
    "Encoder": "compression.encoder",
    "Factors": "compression.factors",
    "Flatten": "models.descriptions",
    "Graph": "models.sequence",
    "LBFGS": "training.lbfgs",
    "LSTM": "models.descriptions",
    "Dropout": "models.descriptions",
    "Draw": "models.layers",
    "MaxPool": "models.descriptions",
    "Lasso": "training.lasso",
    "LogisticRegression": "training.logistic_regression",
    "MismatchError": "errors",
    "ModelParallel": "training.model_parallel",
    "Placement": "training.placement.placement",
    "Mode": "training.mode",
    "Model": "models.model",
    "NonFiniteError": "errors",
    "Optimizer": "training.optimizer",
    "ParameterStore": "training.store.parameter_store",
    "PeerError": "errors",
    "Plan": "collectives.plan",
    "Preemption": "training.preemption",
    "ReLU": "models.descriptions",
    "Reducer": "compression.reducer",
    "Sandblaster": "training.sandblaster",
    "Select": "models.descriptions",
    "Sequence": "models.sequence",
    "Sparse": "training.sparse",
    "Strads": "training.strads",
    "allreduce": "collectives.allreduce",
    "claimed": "training.claimed",
    "explain": "training.explain",
    "load": "models.dataset",
    "load_checkpoint": "training.checkpoints.loading",
    "plan_allreduce": "compression.plans.plan",
    "prefetch": "training.prefetch",
    "save_checkpoint": "training.checkpoints.saving",
    "shard": "training.batches",
    "start": "collectives.fusion",
}

_REGISTRIES = {
    "algorithms": "collectives.schedules.schedule",
    "choices": "training.choice",
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
        found = getattr(importlib.import_module(f"bitring.{_WHERE[name]}"), name)
        globals()[name] = found  # to look for it again would take longer than a small call
        return found
    if name[:1].isupper():  # a registered class: its file alone makes it public
        for kind in _REGISTRIES:
            registered = _registry(kind).named(name)
            if registered is not None:
                return registered
    raise AttributeError(f"module 'bitring' has no attribute {name!r}")


def __dir__() -> list[str]:
    registries = [_registry(kind) for kind in _REGISTRIES]
    classes = [registry.get(name).__name__ for registry in registries for name in registry.names()]
    return sorted({*globals(), *_WHERE, *classes})
