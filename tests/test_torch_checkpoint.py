"""Checkpoints of training with PyTorch: bit for bit on the same ranks, and residuals on another number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import batches, convnet, cross_entropy, dense, values  # noqa: E402

import bitring  # noqa: E402
from bitring.errors import PeerError  # noqa: E402
from bitring.torch import (  # noqa: E402
    GradientAverager,
    LocalUpdates,
    OneBitAdam,
    load_checkpoint,
    save_checkpoint,
)
from bitring.torch.residuals import Kept  # noqa: E402


def raised(call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        call(*arguments, **options)
    except Exception as error:
        return error
    return None


class Averaged:
    """Adam with a schedule, a scaler and a compressed exchange."""

    def __init__(self, comm: Any, compression: str, model: Any = None) -> None:
        self.model = model or dense()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        self.owner: Any = GradientAverager(
            self.model, comm=comm, compression=compression, scaler=self.scaler, bucket_bytes=500
        )
        self.parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }

    def step(self, x: Any, y: Any) -> None:
        self.optimizer.zero_grad()
        with self.owner.batch():
            self.scaler.scale(cross_entropy(self.model, x, y)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()


class OneBit:
    def __init__(self, comm: Any) -> None:
        self.model = dense()
        self.owner: Any = OneBitAdam(
            self.model.parameters(), lr=1e-2, comm=comm, freeze_step=4, compression="onebit:block=64"
        )
        self.parts = {"model": self.model, "optimizer": self.owner}

    def step(self, x: Any, y: Any) -> None:
        self.owner.zero_grad()
        cross_entropy(self.model, x, y).backward()
        self.owner.step()


class Alone:
    def __init__(self, comm: Any) -> None:
        self.model = dense()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.owner: Any = LocalUpdates(
            self.model, self.optimizer, comm=comm, tau=3, compression="onebit:block=64", fragments=2
        )
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def step(self, x: Any, y: Any) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model, x, y).backward()
        self.owner.step()


KINDS = {
    "onebit": lambda comm: Averaged(comm, "onebit:block=64"),
    "powersgd": lambda comm: Averaged(comm, "powersgd"),
    "randomk": lambda comm: Averaged(comm, "randomk"),
    "channels_last": lambda comm: Averaged(comm, "linear", convnet()),
    "onebit_adam": OneBit,
    "local_updates": Alone,
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(comm, agree, mpi_tmp_path: Path, kind):
    """Saved in the middle, also of a block of steps that ranks make alone."""
    data = list(batches(14, seed=comm.rank))
    one = KINDS[kind](comm)
    for x, y in data[:7]:
        one.step(x, y)
    save_checkpoint(mpi_tmp_path / "run.pt", one.owner, **one.parts, epoch=3)
    other = KINDS[kind](comm)
    for x, y in data[9:11]:
        other.step(x, y)
    extra = load_checkpoint(mpi_tmp_path / "run.pt", other.owner, **other.parts)
    agree(comm, extra == {"epoch": 3} and other.owner.steps == 7, repr(extra))
    for x, y in data[7:]:
        one.step(x, y)
        other.step(x, y)
    agree(comm, torch.equal(values(one.model), values(other.model)))
    one.owner.free()
    other.owner.free()


@pytest.mark.parametrize("kind", ["onebit", "onebit_adam"])
def test_on_other_ranks(comm, agree, mpi_tmp_path: Path, kind):
    """All that the old ranks owe, the new ones do."""
    from mpi4py import MPI

    data = list(batches(5, seed=comm.rank))
    one = KINDS[kind](comm)
    for x, y in data:
        one.step(x, y)

    def owed(kept: Kept, ranks: Any) -> Any:
        mine = np.concatenate([a.reshape(-1).astype(np.float64) for a in kept.residual.values()])
        total = np.zeros_like(mine)
        ranks.Allreduce(mine, total)
        return total + np.concatenate([a.reshape(-1) for a in kept.owner_residual.values()])

    expected = owed(one.owner.residuals(), comm)
    save_checkpoint(mpi_tmp_path / "run.pt", one.owner, **one.parts)
    half = comm.Split(0 if comm.rank < max(1, comm.size - 1) else MPI.UNDEFINED)
    ok, text = True, ""
    if half != MPI.COMM_NULL and half.size < comm.size:
        other = KINDS[kind](half)
        load_checkpoint(mpi_tmp_path / "run.pt", other.owner, **other.parts)
        found = owed(other.owner.residuals(), half) if half.size > 1 else None
        ok = found is None or np.allclose(found, expected, atol=1e-6)
        ok = ok and torch.equal(values(one.model), values(other.model))
        other.step(*data[0])
        save_checkpoint(mpi_tmp_path / "fewer.pt", other.owner, **other.parts)
        text = "the sum of residuals differs"
    agree(comm, ok, text)
    if comm.size > 1:
        last = KINDS[kind](comm)
        load_checkpoint(mpi_tmp_path / "fewer.pt", last.owner, **last.parts)
        agree(comm, last.owner.steps == 6)
        last.step(*data[1])
        same = comm.allgather(values(last.model).numpy().tobytes())
        agree(comm, len(set(same)) == 1)


def test_errors(comm, agree, mpi_tmp_path: Path):
    one = Averaged(comm, "onebit:block=64")
    error = raised(load_checkpoint, mpi_tmp_path / "none.pt", one.owner, **one.parts)
    agree(comm, type(error) is FileNotFoundError and "none.pt cannot be read" in str(error), repr(error))
    error = raised(save_checkpoint, mpi_tmp_path / "no" / "such.pt", one.owner, **one.parts)
    agree(comm, isinstance(error, OSError) and "cannot be written" in str(error), repr(error))
    error = raised(save_checkpoint, mpi_tmp_path / "run.pt", one.owner, position={1, 2})
    agree(comm, type(error) is TypeError and "extra must be what JSON holds" in str(error), repr(error))
    for _ in range(2):
        save_checkpoint(mpi_tmp_path / "run.pt", one.owner, **one.parts)
    agree(comm, (mpi_tmp_path / "run.pt.previous").exists() and not (mpi_tmp_path / "run.pt.partial").exists())
    before = values(one.model)
    error = raised(load_checkpoint, mpi_tmp_path / "run.pt", one.owner, model=one.model)
    agree(comm, type(error) is bitring.CheckpointError and "asked for are ['model']" in str(error), repr(error))
    error = raised(load_checkpoint, mpi_tmp_path / "run.pt", Averaged(comm, "bfloat16").owner, **one.parts)
    agree(comm, isinstance(error, (bitring.CheckpointError, PeerError)) and "residuals" in str(error), repr(error))
    if comm.rank == 0:
        whole = (mpi_tmp_path / "run.pt").read_bytes()
        (mpi_tmp_path / "run.pt").write_bytes(whole[: len(whole) // 2])
    error = raised(load_checkpoint, mpi_tmp_path / "run.pt", one.owner, **one.parts)
    agree(comm, type(error) is bitring.CheckpointError and "run.pt.previous" in str(error), repr(error))
    agree(comm, torch.equal(before, values(one.model)))


def test_what_could_not_be_loaded_is_not_saved(comm, agree, mpi_tmp_path: Path):
    class Remembers(torch.nn.Linear):
        def get_extra_state(self) -> Any:
            return {"seen": np.arange(3)}

    model = Remembers(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.logspace(-2, -1, 3)[1])
    averager = GradientAverager(model, comm=comm)
    path = mpi_tmp_path / "run.pt"
    save_checkpoint(path, averager, optimizer=optimizer)  # NumPy's numbers become Python's
    before = path.read_bytes()
    error = raised(save_checkpoint, path, averager, model=model)
    agree(comm, type(error) is TypeError and "a state_dict() holds numpy" in str(error), repr(error))
    agree(comm, path.read_bytes() == before and sorted(p.name for p in mpi_tmp_path.iterdir()) == ["run.pt"])
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 1.0
    load_checkpoint(path, averager, optimizer=optimizer)
    agree(comm, optimizer.param_groups[0]["lr"] == rate)
    error = raised(save_checkpoint, mpi_tmp_path, averager, optimizer=optimizer)
    agree(comm, type(error) is IsADirectoryError and mpi_tmp_path.is_dir(), repr(error))
    averager.free()
