"""Wrong kinds of arguments: every public call says which function, which argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.errors import PeerError


class Odd:
    """Nothing that any argument may be."""


WRONG = [
    None, 3, -1, 1.5, float("nan"), "x", "", b"x", [], {}, (), Odd(), Odd, True, len, "\0", "a\ud800", 10**30,
    np.ones(3), np.array(["a"]), np.array([None]), np.float32(2), 3 + 1j, MPI.COMM_NULL, MPI.OP_NULL, [1, 2], {"w": 1},
]  # fmt: skip

NAMES_NO_ARGUMENT = {
    ("shard", "batches"): "expected a tuple of arrays",
    ("Batches", "x"): "arrays must have equal lengths",
    ("Batches", "y"): "arrays must have equal lengths",
    ("load", "name"): "unknown data set",
    ("plan_allreduce", "compression"): "unknown compressor",
    ("DataParallel", "compression"): "unknown compressor",
    ("step", "gradients"): "the gradient of",
    ("load_state_dict", "state"): "load_state_dict",
}
"""What is said where the argument's own name is not."""


def weights() -> dict[str, Any]:
    return {"w": np.zeros(10)}


def calls(folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """By name: public calls, with arguments that are right."""
    comm, x = MPI.COMM_WORLD, np.ones(4)
    trainer = bitring.DataParallel(weights(), bitring.SGD(lr=0.1), comm=comm)
    communicator = bitring.Communicator(comm)
    exact, compressed = (
        bitring.plan_allreduce(np.ones(4000, np.float32), comm=comm, compression=name) for name in (None, "onebit")
    )
    batches = bitring.Batches(np.ones((10, 3)), np.ones(10), 4)
    bitring.save_checkpoint(folder / "there", trainer)
    reduced = {"sendbuf": x, "recvbuf": np.ones(4), "op": MPI.SUM}
    settings = {"optimizer": bitring.SGD(lr=0.1), "mode": "sync", "compression": None, "algorithm": "auto"}
    numbers = {"warmup_steps": 0, "bucket_bytes": 100, "check_every": 0}
    planned = {"x": np.ones(4000, np.float32), "comm": comm, "op": MPI.SUM, "algorithm": "auto"}
    return {
        "shard": (
            lambda **given: list(bitring.shard(**given)),
            {"batches": batches, "comm": comm, "seed": 0, "epoch": 0, "start": 0},
        ),
        "Batches": (bitring.Batches, {"x": np.ones((10, 3)), "y": np.ones(10), "size": 4}),
        "load": (bitring.load, {"name": "digits", "directory": None}),
        "allreduce": (bitring.allreduce, {"x": x, "out": None, "op": MPI.SUM, "comm": comm, "algorithm": "auto"}),
        "plan_allreduce": (bitring.plan_allreduce, {**planned, "compression": None}),
        "plan_allreduce, compressed": (bitring.plan_allreduce, {**planned, "compression": "onebit", "boundaries": ()}),
        "plan_allreduce, reduced": (bitring.plan_allreduce, {**planned, "compression": "powersgd", "boundaries": ()}),
        "start": (bitring.start, {"plans": []}),
        "explain": (bitring.explain, {"plan": exact}),
        "Communicator": (bitring.Communicator, {"comm": comm, "algorithm": "auto"}),
        "DataParallel": (
            bitring.DataParallel,
            {"parameters": weights(), "comm": comm, "unused": "error", **settings, **numbers},
        ),
        "step": (trainer.step, {"gradients": weights(), "weight": 1.0}),
        "broadcast": (trainer.broadcast, {"root": 0}),
        "load_state_dict": (trainer.load_state_dict, {"state": trainer.state_dict()}),
        "load_state_dict, exact plan": (exact.load_state_dict, {"state": {}}),
        "load_state_dict, compressed plan": (compressed.load_state_dict, {"state": compressed.state_dict()}),
        "save_checkpoint": (bitring.save_checkpoint, {"path": folder / "here", "trainer": trainer}),
        "load_checkpoint": (bitring.load_checkpoint, {"path": folder / "there", "trainer": trainer}),
        "Preemption": (bitring.Preemption, {"comm": comm}),
        "empty": (communicator.empty, {"shape": 3, "dtype": np.float32}),
        "Allreduce": (communicator.Allreduce, reduced),
        "Iallreduce": (lambda **given: communicator.Iallreduce(**given).Wait(), reduced),
        "Allreduce_init": (communicator.Allreduce_init, reduced),
        "Reduce": (communicator.Reduce, {**reduced, "root": 0}),
        "Reduce_scatter_block": (communicator.Reduce_scatter_block, reduced),
        "Allgather": (communicator.Allgather, {"sendbuf": x, "recvbuf": np.ones(4)}),
        "Iallgather": (
            lambda **given: communicator.Iallgather(**given).Wait(),
            {"sendbuf": x, "recvbuf": np.ones(4)},
        ),
        "Bcast": (communicator.Bcast, {"buf": x, "root": 0}),
    }


@pytest.mark.single
@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "x" may be a file's name
    complaints: list[str] = []
    for name, (call, right) in calls(tmp_path).items():
        function = name.partition(",")[0]
        for argument in right:
            for value in WRONG:
                try:
                    call(**{**right, argument: value})
                except (TypeError, ValueError) as error:
                    expected = NAMES_NO_ARGUMENT.get((function, argument), argument)
                    good = function in str(error) and (argument in str(error) or expected in str(error))
                    error_text = repr(error)
                except OSError as error:  # no such file
                    good, error_text = argument in ("path", "name", "directory"), repr(error)
                except Exception as error:
                    good, error_text = False, repr(error)
                else:
                    continue
                if not good:
                    complaints.append(f"{name}({argument}={value!r}): {error_text}")
    assert not complaints, "\n".join(complaints)


@pytest.mark.single
@pytest.mark.parametrize("compression", ["onebit", "powersgd"])
@pytest.mark.parametrize("boundaries", [[10**6], [-5]])
def test_boundaries_beyond_the_values(compression, boundaries):
    with pytest.raises(ValueError, match=r"boundaries must be positions in x, from 0 to 4000; got"):
        bitring.plan_allreduce(np.ones(4000, np.float32), compression=compression, boundaries=boundaries)


@pytest.mark.single
def test_a_state_of_another_kind_changes_nothing():
    w = {"a": np.arange(3.0), "b": np.ones(2000, np.float32)}
    trainer = bitring.DataParallel(w, bitring.SGD(lr=0.1, momentum=0.9), comm=MPI.COMM_SELF, compression="onebit")
    good, before = trainer.state_dict(), trainer.digest()
    for part, value in (
        ("parameters", {"a": np.zeros(3), "b": np.zeros((2000, 1), np.float32)}),
        ("parameters", {"a": np.zeros(3), "b": np.zeros(2000)}),
        ("parameters", {"a": np.zeros(3), "b": 3}),
        ("optimizer", {}),
        ("residuals", []),
        ("residuals", [{}] * len(trainer.plans)),
        ("steps", "x"),
        ("settings", {}),
    ):
        with pytest.raises((TypeError, ValueError), match=r"DataParallel.load_state_dict"):
            trainer.load_state_dict({**good, "parameters": {"a": np.zeros(3), "b": w["b"] * 2}, part: value})
        assert trainer.digest() == before, (part, value)
    trainer.load_state_dict(good)


def test_what_cannot_be_pickled_is_an_error_on_all_ranks(comm, agree):
    last = comm.rank == comm.size - 1
    for call in (allgather, partial(broadcast, root=comm.size - 1)):
        error: Exception | None = None
        try:
            call(comm, (lambda: 0) if last else 0, "try")
        except Exception as problem:
            error = problem
        named = "pickle" in str(error) and (last or isinstance(error, PeerError))
        agree(comm, comm.size == 1 or named, repr(error))
    agree(comm, allgather(comm, comm.rank, "try") == list(range(comm.size)), "the communicator is of no use")


def test_a_digest_of_any_name(comm, agree):
    trainer = bitring.DataParallel({"a\ud800": np.zeros(3)}, bitring.SGD(lr=0.1), comm=comm, check_every=1)
    trainer.step({"a\ud800": np.ones(3)})
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)
    trainer.free()
