"""What a trainer knows, as plain arrays and numbers: taken out, and put into another one of the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.errors import MismatchError
from bitring.training.step.checks import checked_leaves, difference, require_state, resumable, text_of
from bitring.training.step.compression_for import compression_in_words
from bitring.training.tree import copied, host_copy

if TYPE_CHECKING:
    from bitring.training.data_parallel import DataParallel


def description_of(trainer: DataParallel) -> dict[str, Any]:
    """The trainer's settings."""
    return {
        "parameters": {name: [w.dtype.name, list(w.shape)] for name, w in trainer.parameters.items()},
        "optimizer": text_of(trainer.optimizer),
        "mode": text_of(trainer.mode),
        "compression": compression_in_words(trainer.compression, trainer.compression_for),
        "algorithm": trainer.algorithm,
        "warmup_steps": trainer.warmup_steps,
        "check_every": trainer.check_every,
        "bucket_bytes": trainer.bucket_bytes,
        "device": trainer.on_device,
        "ranks": trainer.size,
    }


def require_alike(comm: MPI.Intracomm, mine: Mapping[str, Any], number: int) -> int:
    """Rank 0's ``number``; raises MismatchError where a rank's description is not rank 0's. Collective."""
    theirs, common = broadcast(comm, (mine, number), "DataParallel")
    for rank, text in enumerate(allgather(comm, difference(mine, theirs), "DataParallel")):
        if text is not None:
            raise MismatchError(f"DataParallel: rank {rank} differs from rank 0: {text}")
    result: int = common
    return result


def state_of(trainer: DataParallel) -> dict[str, Any]:
    """See ``DataParallel.state_dict``."""
    return {
        **copied(trainer.live()),
        "residuals": [{key: host_copy(x) for key, x in plan.state_dict().items()} for plan in trainer.plans],
        "steps": trainer.steps,
        "algorithms": trainer.algorithms,
        "settings": trainer.describe(),
    }


def load_state(trainer: DataParallel, state: Mapping[str, Any]) -> None:
    """See ``DataParallel.load_state_dict``."""
    where = "DataParallel.load_state_dict"
    settings = trainer.describe()
    require_state(state, {**trainer.live(), "residuals": [], "steps": trainer.steps, "settings": settings}, where)
    theirs = state["settings"]
    text = difference(resumable(settings), resumable(theirs))
    if text is None and theirs["bucket_bytes"] != trainer.bucket_bytes:
        text = f"bucket_bytes is {trainer.bucket_bytes}, not {theirs['bucket_bytes']}"
    if text is None and theirs["ranks"] != trainer.size:
        text = f"there are {trainer.size} ranks, not {theirs['ranks']}; load_checkpoint can change that"
    if text is not None:
        raise ValueError(f"{where}: the state is of another trainer: {text}")
    trainer.restore(checked_leaves(state, trainer.live(), trainer.plans, where), state["steps"])
    for plan, residuals in zip(trainer.plans, state["residuals"], strict=True):
        plan.load_state_dict(residuals)
