"""Files that somebody made by hand, or that a fault has changed: loaded rightly, or refused with nothing changed."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitring.training.checkpoints.header import CheckpointError
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import save_checkpoint
from bitring.training.data_parallel import DataParallel
from bitring.training.modes.local import Local
from bitring.training.optimizers.sgd import SGD


@pytest.fixture
def path(mpi_tmp_path):
    return mpi_tmp_path / "run.npz"


def new_trainer(comm) -> DataParallel:
    trainer = DataParallel(
        {"w": np.zeros((100, 32), "f4"), "b": np.zeros(7, "f4")},
        SGD(momentum=0.5),
        comm=comm,
        mode=Local(tau=1),
        compression="onebit",
    )
    trainer.step({name: np.full_like(w, comm.rank + 1) for name, w in trainer.parameters.items()})
    return trainer


class Contents:
    """A checkpoint taken apart: its header, and the arrays by name."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as file:
            self.header: Any = json.loads(file.read("header.json"))
            self.arrays = {name: file.read(name) for name in file.namelist() if name != "header.json"}

    def replaced(self, member: str, array: Any) -> None:
        stream = io.BytesIO()
        np.save(stream, array)
        self.arrays[f"{member}.npy"] = stream.getvalue()

    def write(self, path: Path, then: Callable[[zipfile.ZipFile], None] = lambda file: None) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in self.arrays.items():
                file.writestr(name, content)
            file.writestr("header.json", json.dumps(self.header))
            then(file)


def state(trainer: DataParallel) -> tuple[Any, ...]:
    return (
        trainer.digest(),
        trainer.steps,
        *(x.tobytes() for plan in trainer.plans for x in plan.state_dict().values()),
        *(x.tobytes() for x in trainer.live()["optimizer"]["velocity"].values()),
    )


def outcome(path: Path, trainer: DataParallel) -> BaseException | None:
    try:
        load_checkpoint(path, trainer)
    except Exception as error:
        return error
    return None


W = "parameters/w"

CHANGES: dict[str, Callable[[Contents], Any]] = {
    "no dimensions": lambda c: c.replaced(W, np.float32(1)),
    "one value": lambda c: c.replaced(W, np.ones(1, "f4")),
    "one row": lambda c: c.replaced(W, np.ones(32, "f4")),
    "turned": lambda c: c.replaced(W, np.asfortranarray(np.ones((100, 32), "f4"))),
    "integers": lambda c: c.replaced(W, np.ones((100, 32), np.int32)),
    "integers, and says so": lambda c: (c.replaced(W, np.ones((9, 9), "i4")), c.header["dtypes"].update({W: "int32"})),
    "other byte order": lambda c: c.replaced(W, np.ones((100, 32), ">f4")),
    "objects": lambda c: c.arrays.update({f"{W}.npy": c.arrays[f"{W}.npy"].replace(b"'<f4'", b"'|O' ")}),
    "residual of one value": lambda c: c.replaced("residual/w", np.ones(1, "f4")),
    "steps -5": lambda c: c.header.update(steps=-5),
    "steps x": lambda c: c.header.update(steps="x"),
    "steps true": lambda c: c.header.update(steps=True),
    "steps beyond": lambda c: c.header.update(steps=1 << 60),
    "steps 1.5": lambda c: c.header.update(steps=1.5),
    "block steps -5": lambda c: c.header.update(numbers=[[at, -5] for at, _ in c.header["numbers"]]),
    "numbers are words": lambda c: c.header.update(numbers=[[at, "x"] for at, _ in c.header["numbers"]]),
    "NaN": lambda c: c.header.update(numbers=[[at, float("nan")] for at, _ in c.header["numbers"]]),
    "no ranks": lambda c: c.header.update(ranks=[]),
    "fewer ranks": lambda c: c.header["settings"].update(ranks=7),
    "a path twice": lambda c: c.header["ranks"][0].append(c.header["ranks"][0][0]),
    "a path less": lambda c: [table.pop() for table in c.header["ranks"]],
    "an unknown member": lambda c: c.header["ranks"][0][0].__setitem__(1, "nothing"),
    "the header is a list": lambda c: setattr(c, "header", []),
    **{f"without {name}": lambda c, name=name: c.header.pop(name) for name in (
        "format", "settings", "algorithms", "steps", "numbers", "ranks", "owner_residuals", "extra", "dtypes",
    )},
    **{f"null {name}": lambda c, name=name: c.header.update({name: None}) for name in (
        "format", "settings", "algorithms", "steps", "numbers", "ranks", "owner_residuals", "extra", "dtypes",
    )},
    **{f"settings without {name}": lambda c, name=name: c.header["settings"].pop(name) for name in (
        "parameters", "optimizer", "mode", "compression", "ranks",
    )},
}  # fmt: skip


def test_files_made_by_hand_are_refused(comm, agree, path):
    """On all ranks alike, before anything is changed or allocated."""
    trainer = new_trainer(comm)
    save_checkpoint(path, trainer)
    before = state(trainer)
    for name, change in CHANGES.items():
        comm.Barrier()
        if comm.rank == 0:
            contents = Contents(path)
            change(contents)
            contents.write(path.with_name("changed.npz"))
        error = outcome(path.with_name("changed.npz"), trainer)
        agree(comm, type(error) is CheckpointError and "changed.npz" in str(error), f"{name}: {error!r}")
        agree(comm, state(trainer) == before, name)
    agree(comm, outcome(path, trainer) is None)
    trainer.free()


def twice(file: zipfile.ZipFile) -> None:
    file.filelist.append(copy.copy(file.getinfo(f"{W}.npy")))


def overlapping(file: zipfile.ZipFile) -> None:
    for number in range(2000):
        info = copy.copy(file.getinfo(f"{W}.npy"))
        info.filename = info.orig_filename = f"bomb{number}.npy"
        file.filelist.append(info)


def compressed(file: zipfile.ZipFile) -> None:
    file.writestr("bomb.npy", bytes(1 << 28), zipfile.ZIP_DEFLATED)


def lying(file: zipfile.ZipFile) -> None:
    file.getinfo(f"{W}.npy").file_size = file.getinfo(f"{W}.npy").compress_size = 1 << 40


@pytest.mark.single
@pytest.mark.parametrize("trick", [twice, overlapping, compressed, lying])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_are_traps(comm, path, trick):
    trainer = new_trainer(comm)
    save_checkpoint(path, trainer)
    before = state(trainer)
    Contents(path).write(path, trick)
    tracemalloc.start()
    begin = time.monotonic()
    error = outcome(path, trainer)
    seconds, (_, peak) = time.monotonic() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert type(error) is CheckpointError, repr(error)
    assert peak < 32 << 20
    assert seconds < 60
    assert state(trainer) == before
    trainer.free()


@pytest.mark.single
def test_what_is_no_file(comm, path):
    trainer = new_trainer(comm)
    os.mkfifo(path)
    for place, kind in ((path, CheckpointError), (Path("/dev/zero"), CheckpointError), (path.parent, OSError)):
        error = outcome(place, trainer)
        assert isinstance(error, kind), repr(error)
    trainer.free()


VALUES: tuple[Any, ...] = (None, -5, 0, "x", "", [], {}, True, 1e308, 1 << 70, [[]], {"a": 1}, "parameters/b", [["w"]])


def mutated(raw: bytes, contents: Contents, rng: random.Random) -> bytes:
    """The file with a few bytes, or a few of its fields, changed."""
    if rng.random() < 0.4:
        data = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            choice = rng.random()
            if choice < 0.6:
                data[at] = rng.randrange(256)
            elif choice < 0.8:
                del data[at : at + rng.randint(1, 300)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 20))
        return bytes(data)
    header = contents.header
    for _ in range(rng.randint(1, 3)):
        node: Any = header
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            if rng.random() < 0.3:
                del node[key]
            elif isinstance(node, list) and rng.random() < 0.3:
                node.append(node[key])
            else:
                node[key] = rng.choice(VALUES)
            break
    if rng.random() < 0.3:
        member = rng.choice(list(contents.arrays))
        contents.arrays[member] = rng.choice([b"", contents.arrays[member][:-1], contents.arrays[f"{W}.npy"]])
    changed = io.BytesIO()
    contents.write(changed)  # type: ignore[arg-type]
    return changed.getvalue()


def test_random_changes(comm, agree, path, pytestconfig):
    """All ranks load it, or all refuse it and nothing has changed; never another error, never a wait."""
    trainer = new_trainer(comm)
    save_checkpoint(path, trainer, history=[1, {"a": None}])
    raw, before = path.read_bytes(), state(trainer)
    rng, refused = random.Random(7), 0
    examples = 2000 if pytestconfig.getoption("--all") else 250 if comm.size == 1 else 30
    for number in range(examples):
        data = mutated(raw, Contents(path), rng) if comm.rank == 0 else b""
        changed = path.with_name("changed.npz")
        if comm.rank == 0:
            changed.write_bytes(data)
        error = outcome(changed, trainer)
        ok = error is None or (isinstance(error, (CheckpointError, OSError)) and state(trainer) == before)
        agree(comm, ok, f"{number}: {error!r}")
        refused += error is not None
        if error is None:
            load_checkpoint(path, trainer)
            agree(comm, state(trainer) == before, f"{number}")
    agree(comm, refused > examples // 2, f"{refused} of {examples} refused")
    trainer.free()
