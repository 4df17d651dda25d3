"""Parameters that travel otherwise than the rest: by name, or by pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_transaction import everything, gradients_of, raised

import bitring
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import save_checkpoint
from bitring.training.step.compression_for import checked_choices, compressor_of_each

SHAPES = {"a": (40, 60), "b": (7,), "c": (3001,), "d": (2000,)}
CHOICES = {"*": None, "a": "powersgd:matrix_rank=1", "c": "topk:density=0.1"}


def new_trainer(comm: Any, **settings: Any) -> bitring.DataParallel:
    parameters = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    return bitring.DataParallel(parameters, bitring.SGD(lr=0.1, momentum=0.9), comm=comm, **settings)


def test_names_go_before_patterns_and_the_first_pattern_before_others():
    names = ["conv1.weight", "conv1.bias", "conv2.weight", "dense.weight"]
    choices = checked_choices({"conv*": "linear", "*.weight": "topk", "conv2.weight": None}, names)
    each = compressor_of_each(dict.fromkeys(names, bitring.OneBit()), choices)
    assert list(each.values()) == [bitring.Linear(), bitring.Linear(), None, bitring.TopK()]


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"e": None}, ValueError, "'e' fits no parameter: a, b, c, d"),
        ({"x*": "topk"}, ValueError, "'x*' fits no parameter"),
        ({"a": "topc"}, ValueError, "unknown compressor 'topc'"),
        ({"a": 3}, TypeError, "compression_for['a'] must be a name"),
        ({3: None}, TypeError, "must be a string, got 3"),
        (["a"], TypeError, "must be a dict"),
    ],
)
def test_what_cannot_be(comm, agree, given, kind, said):
    error = raised(new_trainer, comm, compression_for=given)
    agree(comm, type(error) is kind and said in str(error), repr(error))


def test_ranks_must_choose_alike(comm, agree):
    error = raised(new_trainer, comm, compression_for={"a": "onebit" if comm.rank == 0 else "sign"})
    agree(comm, comm.size == 1 or (type(error) is bitring.MismatchError and "compression" in str(error)), repr(error))


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_each_parameter_has_the_bits_of_its_own_compressor(comm, agree, compression):
    """As trainers have that use it for all; a bucket of one parameter knows nothing of the others."""
    mixed = new_trainer(comm, compression=compression, compression_for=CHOICES, bucket_bytes=1)
    alone = {name: new_trainer(comm, compression=CHOICES.get(name, CHOICES["*"]), bucket_bytes=1) for name in SHAPES}
    for step in range(4):
        mixed.step(gradients_of(comm, step))
        for trainer in alone.values():
            trainer.step(gradients_of(comm, step))
    for name, trainer in alone.items():
        agree(comm, np.array_equal(mixed.parameters[name], trainer.parameters[name]), name)
        trainer.free()
    mixed.free()


def test_checkpoints_keep_the_choice(comm, agree, mpi_tmp_path):
    trainer, resumed = (new_trainer(comm, compression="onebit", compression_for=CHOICES) for _ in range(2))
    other = new_trainer(comm, compression="onebit")
    for step in range(3):
        trainer.step(gradients_of(comm, step))
    save_checkpoint(mpi_tmp_path / "file", trainer)
    load_checkpoint(mpi_tmp_path / "file", resumed)
    for each in (trainer, resumed):
        each.step(gradients_of(comm, 3))
    agree(comm, everything(trainer) == everything(resumed))
    error = raised(load_checkpoint, mpi_tmp_path / "file", other)
    agree(comm, isinstance(error, ValueError) and "compression is" in str(error), repr(error))
    for each in (trainer, resumed, other):
        each.free()
