"""Checkpoints: resumed bit for bit, on other numbers of ranks, and refused when they are not whole."""

import itertools
import json
import os
import resource
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bitring
from bitring.errors import PeerError
from bitring.training.checkpoints.header import CheckpointError
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import save_checkpoint
from bitring.training.data_parallel import DataParallel
from bitring.training.modes.block_momentum import BlockMomentum
from bitring.training.modes.local import Local
from bitring.training.optimizers.sgd import SGD
from bitring.training.step.checks import difference, resumable, text_of

SHAPES = {"a": (40, 51), "b/c": (7,), "c": (1100,), "d": (1500,), "none": (0, 2), "e": ()}
DTYPES = {"a": np.float32, "b/c": np.float32, "c": np.float32, "d": np.float64, "none": np.float32, "e": np.float32}

SETTINGS = {
    "sync": SGD(lr=0.1, momentum=0.9),
    Local(tau=4): SGD(lr=0.1, momentum=0.9, nesterov=True),
    BlockMomentum(tau=4): SGD(lr=0.1, momentum=0.5),
}


@pytest.fixture
def path(mpi_tmp_path):
    return mpi_tmp_path / "run.npz"


def new_trainer(comm, mode: Any = "sync", optimizer=None, compression=None, **more):
    parameters = {name: np.full(shape, comm.rank + 1, DTYPES[name]) for name, shape in SHAPES.items()}
    optimizer = optimizer or SETTINGS.get(mode) or SGD(momentum=0.9)
    return DataParallel(parameters, optimizer, comm=comm, mode=mode, compression=compression, **more)


def train(trainer, steps):
    """Steps that depend on the rank, the step and the parameters."""
    for _ in range(steps):
        rng = np.random.default_rng((trainer.rank, trainer.steps))
        gradients = {name: (w - rng.standard_normal(w.shape)).astype(w.dtype) for name, w in trainer.parameters.items()}
        trainer.step(gradients, weight=(trainer.rank + trainer.steps) % 3 + 1)


def raised(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return error
    return None


def residual_sum(trainer):
    """All that the ranks of a trainer still owe, by parameter; collective."""
    left = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        if bucket.compressed:
            state = plan.state_dict()
            owed = np.array(state["residual"], np.float64)
            owed[slice(*plan.owned)] += state["owner_residual"]
            for name, part in bucket.unflatten(owed):
                left[name] += part
    return {name: trainer.comm.allreduce(part) for name, part in left.items()}


@pytest.mark.parametrize(
    ("mode", "compression", "steps"),
    [*itertools.product(SETTINGS, [None, "onebit"], [8, 7]), ("sync", "fixed", 7), ("sync", "randomk", 7)],
    ids=str,
)
def test_a_resumed_run_continues_bit_for_bit(comm, agree, path, mode, compression, steps):
    through = new_trainer(comm, mode, compression=compression, warmup_steps=2)
    train(through, steps)
    save_checkpoint(path, through, epoch=3, order=[2, 0, 1], nested={"seed": 2**70})
    train(through, steps)
    resumed = new_trainer(comm, mode, compression=compression, warmup_steps=2)
    train(resumed, 3)
    extra = load_checkpoint(path, resumed)
    agree(comm, extra == {"epoch": 3, "order": [2, 0, 1], "nested": {"seed": 2**70}}, str(extra))
    agree(comm, resumed.steps == steps)
    train(resumed, steps)
    agree(comm, resumed.digest() == through.digest())
    for mine, theirs in zip(resumed.plans, through.plans, strict=True):
        for key, residual in mine.state_dict().items():
            agree(comm, np.array_equal(residual, theirs.state_dict()[key]), key)
    through.free()
    resumed.free()


@pytest.mark.parametrize("mode", list(SETTINGS), ids=str)
def test_on_other_numbers_of_ranks(comm, agree, path, mode):
    """Fewer and more; what is owed keeps its sum, and replicas stay equal."""
    some = comm.size // 2 + 1
    for old, new in sorted({(1, comm.size), (comm.size, 1), (comm.size, some), (some, comm.size)}):
        writers = comm.Split(0 if comm.rank < old else 1, comm.rank)
        owed, steps, digest = None, 0, ""
        if comm.rank < old:
            trainer = new_trainer(writers, mode, compression="onebit")
            train(trainer, 9)
            save_checkpoint(path, trainer)
            owed, steps, digest = residual_sum(trainer), trainer.steps, trainer.digest()
            trainer.free()
        owed, steps, digest = comm.bcast((owed, steps, digest) if comm.rank == 0 else None)
        readers = comm.Split(0 if comm.rank < new else 1, comm.rank)
        ok, found = True, ""
        if comm.rank < new:
            trainer = new_trainer(readers, mode, compression="onebit")
            load_checkpoint(path, trainer)
            ok = trainer.steps == steps and trainer.digest() == digest
            for name, x in residual_sum(trainer).items():
                close = np.allclose(x, owed[name], rtol=1e-5, atol=1e-5)
                ok, found = ok and close, found or ("" if close else name)
            if new > old:
                zero = all(not plan.state_dict()["residual"].any() for plan in trainer.plans if plan.state_dict())
                ok = ok and zero == (comm.rank >= old or old == 1)
            train(trainer, 4)
            trainer.synchronize()
            ok = ok and len(set(readers.allgather(trainer.digest()))) == 1
            trainer.free()
        agree(comm, ok, f"{old} -> {new}: {found}")
        readers.Free()
        writers.Free()


def test_other_buckets_and_settings(comm, agree, path):
    """Residuals are kept by parameter, so that buckets may be cut anew; the learning rate may change."""
    trainer = new_trainer(comm, compression="onebit")
    train(trainer, 5)
    save_checkpoint(path, trainer)
    other = new_trainer(comm, compression="onebit", bucket_bytes=100, optimizer=SGD(lr=0.5, momentum=0.8))
    load_checkpoint(path, other)
    agree(comm, other.digest() == trainer.digest() and len(other.buckets) > len(trainer.buckets))
    owed, found = residual_sum(trainer), residual_sum(other)
    agree(comm, all(np.allclose(found[name], owed[name], rtol=1e-5, atol=1e-5) for name in SHAPES))
    trainer.free()
    other.free()


@pytest.mark.parametrize("levels", [("block", "rank_one"), ("rank_one", "row"), ("auto", "block")], ids=str)
def test_levels_may_change(comm, agree, path, levels):
    """Residuals are of values; the owners' are cut where panels or blocks of the new levels are."""
    trainer, other = (new_trainer(comm, compression=bitring.OneBit(levels=each)) for each in levels)
    train(trainer, 5)
    save_checkpoint(path, trainer)
    load_checkpoint(path, other)
    owed, found = residual_sum(trainer), residual_sum(other)
    agree(comm, other.digest() == trainer.digest() and any(x.any() for x in owed.values()) == (comm.size > 1))
    agree(comm, all(np.allclose(found[name], owed[name], rtol=1e-5, atol=1e-5) for name in SHAPES))
    train(other, 3)
    agree(comm, len(set(comm.allgather(other.digest()))) == 1)
    if levels[0] != "auto":  # a rank's own state is of its own levels
        error = raised(other.load_state_dict, trainer.state_dict())
        agree(comm, isinstance(error, ValueError) and "compression is OneBit(" in str(error), repr(error))
    trainer.free()
    other.free()


@pytest.mark.single
def test_blocks_of_before_there_were_levels_are_resumed() -> None:
    description = {"parameters": {}, "optimizer": "SGD()", "mode": "Sync()"}
    before = {**description, "compression": "OneBit(block=1024)"}
    now = {**description, "compression": text_of(bitring.OneBit())}
    assert difference(resumable(now, True), resumable(before, True)) is None
    other = {**description, "compression": text_of(bitring.OneBit(block=512))}
    assert difference(resumable(other, True), resumable(before, True)) is not None


def test_chosen_algorithms_are_used_again(comm, agree, path):
    trainer = new_trainer(comm, algorithm="binomial_tree")
    save_checkpoint(path, trainer)
    auto, ring = new_trainer(comm), new_trainer(comm, algorithm="ring")
    load_checkpoint(path, auto)
    load_checkpoint(path, ring)
    agree(comm, set(auto.algorithms) == {"binomial_tree"} and set(ring.algorithms) == {"ring"}, str(auto.algorithms))
    for trained in (trainer, auto):
        train(trained, 3)
    agree(comm, auto.digest() == trainer.digest())
    for each in (trainer, auto, ring):
        each.free()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_parameters(comm, agree, path, dtype):
    trainers = [DataParallel([np.full(9, k, dtype)], SGD(momentum=0.5), comm=comm) for k in (1.5, 2.5)]
    save_checkpoint(path, trainers[0])
    load_checkpoint(path, trainers[1])
    agree(comm, trainers[0].digest() == trainers[1].digest())
    for trainer in trainers:
        trainer.free()


def test_equal_arrays_are_stored_once(comm, agree, path):
    """Replicas, and what no rank has changed, do not fill the file; numpy.load opens it."""
    trainer = new_trainer(comm, Local(tau=2), compression="onebit")
    train(trainer, 4)
    save_checkpoint(path, trainer)
    with np.load(path) as file:
        names = sorted(file.files)
        ranks = {name.partition("/")[0] for name in names if name.startswith("rank")}
        ok = np.array_equal(file["parameters/a"], trainer.parameters["a"]) and "parameters/b%2Fc" in names
    agree(comm, ok and ranks == {f"rank{r}" for r in range(1, comm.size)}, str(names))
    agree(comm, not any("parameters" in name or "start" in name for name in names if name.startswith("rank")))
    trainer.free()


def test_the_file_before_is_kept(comm, agree, path):
    trainer = new_trainer(comm)
    for epoch in range(3):
        train(trainer, 1)
        save_checkpoint(path, trainer, epoch=epoch)
    found = sorted(file.name for file in path.parent.iterdir())
    agree(comm, found == ["run.npz", "run.npz.previous"], str(found))
    agree(comm, load_checkpoint(f"{path}.previous", trainer) == {"epoch": 1} and trainer.steps == 2)
    agree(comm, load_checkpoint(path, trainer) == {"epoch": 2} and trainer.steps == 3)
    trainer.free()


def damaged_files(path):
    """Ways in which a file can be wrong: name, bytes, text of the error."""
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    yield "truncated", whole[: len(whole) * 2 // 3], "is no checkpoint, or is truncated or damaged"
    yield "short by one", whole[:-1], "is no checkpoint, or is truncated or damaged"
    yield "empty", b"", "is no checkpoint, or is truncated or damaged"
    yield "foreign", b"PNG" * 1000, "is no checkpoint, or is truncated or damaged"
    yield "one bit", bytes(middle), "is damaged at"


def test_damaged_files_are_refused(comm, agree, path):
    """On all ranks, with the trainer as it was; the file before is named when it is there."""
    trainer = new_trainer(comm, compression="onebit")
    train(trainer, 3)
    save_checkpoint(path, trainer)
    train(trainer, 1)
    before, steps = trainer.digest(), trainer.steps
    previous = Path(f"{path}.previous")
    damaged = [*damaged_files(path), ("other npz", None, "is no checkpoint")]
    for i, (name, content, text) in enumerate(damaged):
        comm.Barrier()
        if comm.rank == 0:
            if content is None:
                with path.open("wb") as file:
                    np.savez(file, w=np.ones(3))
            else:
                path.write_bytes(content)
            if i % 2:
                previous.write_bytes(b"")
            else:
                previous.unlink(missing_ok=True)
        error = raised(load_checkpoint, path, trainer)
        hint = f"; the checkpoint before it is {previous}"
        found = type(error) is CheckpointError and text in str(error) and str(path) in str(error)
        agree(comm, found and (hint in str(error)) == bool(i % 2), f"{name}: {error!r}")
        agree(comm, trainer.digest() == before and trainer.steps == steps, name)
    trainer.free()


@pytest.mark.single
def test_no_damaged_byte_goes_unnoticed(comm, tmp_path):
    """A file with one bit changed is refused, or (where the change does not matter) read as it was."""
    trainer = DataParallel([np.arange(3.0)], "sgd", comm=comm)
    path = tmp_path / "run.npz"
    save_checkpoint(path, trainer, epoch=1)
    whole = path.read_bytes()
    expected = trainer.digest()
    refused = 0
    for at in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        trainer.parameters["0"][:] = 7
        error = raised(load_checkpoint, path, trainer)
        if error is None:
            assert trainer.digest() == expected, at
        else:
            assert type(error) is CheckpointError, (at, error)
            assert (trainer.parameters["0"] == 7).all()
            refused += 1
    assert refused > len(whole) // 7 // 2
    trainer.free()


def test_what_a_local_step_found_does_not_keep_a_checkpoint_from_being_loaded(comm, agree, path):
    trainer = new_trainer(comm, "local")
    save_checkpoint(path, trainer)
    before = trainer.digest()
    trainer.step({name: np.full(shape, np.nan) for name, shape in SHAPES.items()})  # the ranks do not meet here
    load_checkpoint(path, trainer)
    agree(comm, trainer.digest() == before)
    train(trainer, 2)
    trainer.free()


def test_one_bucket_that_has_stopped_compressing_leaves_the_others_their_count(comm, agree, path):
    trainer = new_trainer(comm, "sync", compression="fixed", bucket_bytes=1)
    train(trainer, 5)
    counts = [plan.state_dict()["runs"] for plan in trainer.plans if "runs" in plan.state_dict()]
    if len(counts) < 2:
        raise AssertionError(f"{len(counts)} compressed buckets")
    counts[-1][:] = 2
    save_checkpoint(path, trainer)
    load_checkpoint(path, trainer)
    agree(comm, [int(count[0]) for count in counts] == [5 if comm.size > 1 else 2] * len(counts), f"{counts}")
    trainer.free()


def test_missing_file(comm, agree, path):
    trainer = new_trainer(comm)
    error = raised(load_checkpoint, path, trainer)
    agree(
        comm, type(error) is FileNotFoundError and f"load_checkpoint: {path} cannot be read" in str(error), repr(error)
    )
    trainer.free()


def test_a_later_format_is_refused(comm, agree, path):
    trainer = new_trainer(comm)
    if comm.rank == 0:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("header.json", json.dumps({"format": "bitring checkpoint 2"}))
    error = raised(load_checkpoint, path, trainer)
    text = "is of the format 'bitring checkpoint 2', not 'bitring checkpoint 1'"
    agree(comm, type(error) is CheckpointError and text in str(error), repr(error))
    trainer.free()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"parameters": [np.zeros(5)]}, "here, parameter '0' is float64 of shape (5,), not float64 of shape (4,)"),
        (
            {"parameters": [np.zeros(4, "f4")]},
            "here, parameter '0' is float32 of shape (4,), not float64 of shape (4,)",
        ),
        ({"parameters": {"w": np.zeros(4)}}, "here, the parameters are ['w'], not ['0']"),
        ({"compression": "onebit"}, "here, compression is OneBit("),
        ({"mode": "local"}, "here, mode is Local, not Sync"),
        ({"optimizer": "adagrad"}, "here, optimizer is AdaGrad, not SGD"),
        ({"optimizer": SGD(momentum=0.5)}, "here, optimizer/velocity/0 is kept on one side only"),
    ],
)
def test_other_training_is_refused(comm, agree, path, arguments, text):
    good: dict[str, Any] = {"parameters": [np.zeros(4)], "optimizer": "sgd", "comm": comm}
    trainer, other = DataParallel(**good), DataParallel(**{**good, **arguments})
    save_checkpoint(path, trainer)
    error = raised(load_checkpoint, path, other)
    agree(comm, type(error) is CheckpointError, repr(error))
    agree(comm, f"{path} belongs to other training: {text}" in str(error), repr(error))
    trainer.free()
    other.free()


def test_unwritable_places(comm, agree, path):
    """All ranks raise, and nothing is left behind."""
    trainer = new_trainer(comm)
    if comm.rank == 0:
        path.write_bytes(b"")
    comm.Barrier()
    for place, kind in (
        (path / "below a file", NotADirectoryError),
        (path.parent / "no folder" / "run.npz", FileNotFoundError),
        (path.parent, IsADirectoryError),
    ):
        error = raised(save_checkpoint, place, trainer)
        agree(comm, type(error) is kind and f"save_checkpoint: {place} cannot be written" in str(error), repr(error))
    agree(comm, [file.name for file in path.parent.iterdir()] == [path.name])
    trainer.free()


@pytest.mark.parametrize("room", [0, 3000, 100_000])
def test_a_full_disk(comm, agree, path, room):
    """Files may not grow beyond ``room``: all ranks raise, the old checkpoint is still good, and none is half there."""
    trainer = new_trainer(comm, compression="onebit")
    train(trainer, 2)
    save_checkpoint(path, trainer, epoch=1)
    digest = trainer.digest()
    train(trainer, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"fill": "x" * 200_000}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        error = raised(save_checkpoint, path, trainer, **big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    agree(comm, isinstance(error, OSError) and f"{path} cannot be written" in str(error), repr(error))
    agree(comm, [file.name for file in path.parent.iterdir()] == [path.name])
    agree(comm, load_checkpoint(path, trainer) == {"epoch": 1} and trainer.digest() == digest)
    trainer.free()


def test_without_hard_links(comm, agree, path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    trainer = new_trainer(comm)
    for epoch in range(2):
        save_checkpoint(path, trainer, epoch=epoch)
    agree(comm, load_checkpoint(f"{path}.previous", trainer) == {"epoch": 0})
    agree(comm, load_checkpoint(path, trainer) == {"epoch": 1})
    trainer.free()


class CannotBeListed(dict[str, int]):
    def items(self):
        raise KeyError("items")


@pytest.mark.parametrize("extra", [np.arange(3), CannotBeListed(a=1)], ids=["array", "raises"])
def test_extra_must_be_json(comm, agree, path, extra):
    trainer = new_trainer(comm)
    last = comm.size - 1
    error = raised(save_checkpoint, path, trainer, order=extra if comm.rank == last else 1)
    kind = TypeError if comm.rank == last else PeerError
    agree(comm, type(error) is kind and "save_checkpoint: extra must be what JSON holds" in str(error), repr(error))
    agree(comm, not path.exists())
    trainer.free()
