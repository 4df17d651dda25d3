"""Whatever goes wrong with a checkpoint on one rank, all ranks hear of it, and nothing has changed."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitring.collectives.runtime import pieces
from bitring.errors import PeerError
from bitring.training.checkpoints import loading, saving
from bitring.training.checkpoints.file import CheckpointFile, CheckpointWriter
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import save_checkpoint, write_checkpoint
from bitring.training.data_parallel import DataParallel
from bitring.training.modes.local import Local
from bitring.training.optimizers.sgd import SGD


@pytest.fixture
def path(mpi_tmp_path):
    return mpi_tmp_path / "run.npz"


def new_trainer(comm, **more: Any) -> DataParallel:
    """Each rank has arrays of its own."""
    trainer = DataParallel(
        [np.zeros(1500), np.zeros((3, 700))], SGD(momentum=0.5), comm=comm, mode=Local(tau=2), **more
    )
    for _ in range(2):
        trainer.step([np.full_like(w, trainer.rank + 1) for w in trainer.parameters.values()])
    return trainer


def raised(call, *arguments, **named) -> BaseException | None:
    try:
        call(*arguments, **named)
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("name", ["long" * 20_000, "lone \ud800 surrogate", "a/b\\c\0d %2F\n", "." * 300], ids=ascii)
def test_any_name_of_a_parameter(comm, agree, path, name):
    parameters = {name: np.arange(3.0), f"{name}2": np.arange(4.0)}
    trainer = DataParallel(parameters, SGD(momentum=0.5), comm=comm)
    save_checkpoint(path, trainer, text="\ud800")
    parameters[name][:] = 7
    agree(comm, load_checkpoint(path, trainer) == {"text": "\ud800"})
    agree(comm, parameters[name].tolist() == [0, 1, 2])
    trainer.free()


@pytest.mark.parametrize(
    ("owner", "part"),
    [
        (CheckpointWriter, "__init__"),
        (CheckpointWriter, "begin"),
        (CheckpointWriter, "write"),
        (CheckpointWriter, "finish"),
        (CheckpointFile, "__init__"),
        (CheckpointFile, "check"),
        (CheckpointFile, "read"),
        (saving, "kept_by"),
        (saving._Bytes, "of"),
        (loading, "_restore"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_every_place_where_a_rank_can_raise(comm, agree, path, monkeypatch, owner, part):
    """At its first call there, and at its second: as all ranks do with an OSError, else PeerError on the others."""
    trainer = new_trainer(comm, compression="onebit")
    save_checkpoint(path, trainer)
    before, files = trainer.digest(), set(path.parent.iterdir())
    content = path.read_bytes()
    does = getattr(owner, part)
    on_root = owner in (CheckpointWriter, CheckpointFile)
    culprit = 0 if on_root else comm.size - 1
    for kind, after in itertools.product((RuntimeError, OSError, KeyboardInterrupt), (0, 1)):
        calls = itertools.count()

        @functools.wraps(does)
        def fails(*arguments: Any, kind: Any = kind, after: int = after, calls: Any = calls) -> Any:
            if comm.rank == culprit and next(calls) == after:
                raise kind("it is broken")
            return does(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(owner, part, fails)
            call = load_checkpoint if owner is CheckpointFile or part == "_restore" else save_checkpoint
            error = raised(call, path, trainer)
        reached = next(calls) > after
        if comm.bcast(reached, culprit):
            all_alike = kind is OSError and on_root
            expected = kind if comm.rank == culprit or all_alike else PeerError
            text = (
                "it is broken" if expected is not PeerError else f"rank {culprit} raised {kind.__name__}: it is broken"
            )
            agree(comm, type(error) is expected and text in str(error), f"{kind} {after}: {error!r}")
        else:
            agree(comm, error is None, repr(error))
        agree(comm, trainer.digest() == before and set(path.parent.iterdir()) <= files | {Path(f"{path}.previous")})
    path.write_bytes(content)
    load_checkpoint(path, trainer)  # the communicator is as good as new
    agree(comm, trainer.digest() == before)
    trainer.free()


def test_one_rank_s_mistakes(comm, agree, path):
    trainer = new_trainer(comm)
    trainer.step([np.ones_like(w) for w in trainer.parameters.values()])
    error = raised(write_checkpoint, path, trainer, {})
    agree(comm, type(error) is ValueError and "inside a block of steps" in str(error), repr(error))
    trainer.synchronize()
    place: Any = path if comm.rank else 7  # rank 0's path is what counts
    error = raised(save_checkpoint, place, trainer)
    agree(comm, type(error) is (PeerError if comm.rank else TypeError), repr(error))
    save_checkpoint(path if comm.rank == 0 else 7, trainer)  # type: ignore[arg-type]
    agree(comm, load_checkpoint(path, trainer) == {})
    trainer.free()


def test_arrays_of_several_pieces(comm, agree, path, monkeypatch):
    for module in (saving, loading):
        monkeypatch.setattr(module, "split", functools.partial(pieces.split, limit=1000))
    trainer, other = (new_trainer(comm, compression="onebit") for _ in range(2))
    save_checkpoint(path, trainer)
    other.step([np.ones_like(w) for w in trainer.parameters.values()])
    load_checkpoint(path, other)
    agree(comm, other.digest() == trainer.digest())
    for each in (trainer, other):
        for _ in range(3):
            each.step([w + each.rank for w in each.parameters.values()])
    agree(comm, other.digest() == trainer.digest())
    trainer.free()
    other.free()


def test_a_planted_link_is_not_followed(comm, agree, path, monkeypatch):
    trainer, precious, partial = new_trainer(comm), path.parent / "precious", Path(f"{path}.partial")
    for race in (False, True):
        comm.Barrier()
        if comm.rank == 0:
            precious.write_text("mine")
            partial.symlink_to(precious)
        comm.Barrier()
        with monkeypatch.context() as patched:
            if race:  # it is planted after the leftover has been removed
                patched.setattr(Path, "unlink", lambda *_, **__: None)
            error = raised(save_checkpoint, path, trainer)
        kind = FileExistsError if race else type(None)
        agree(comm, type(error) is kind, repr(error))
        agree(comm, precious.read_text() == "mine" and (race or not partial.exists()))
    trainer.free()
