"""``bitring train``: what it writes, what it refuses, and that a run goes on bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import bitring
from bitring import __main__
from bitring.commands._settings import difference

pytestmark = [pytest.mark.single, pytest.mark.timeout(300)]

BITRING = [sys.executable, "-m", "bitring"]
FILES = {"metrics.jsonl", "summary.json", "curve.png", "checkpoint.npz"}


def train(*arguments: object) -> Any:
    """On one rank, in this process."""
    return CliRunner().invoke(__main__._bitring, ["train", *map(str, arguments)], prog_name="bitring")


def summary(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return read


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks(on_ranks, tmp_path: Path):
    folder = tmp_path / "run"
    arguments = ["--model", "mlp", "--data", "digits", "--compression", "onebit", "--epochs", 3, "--output", folder]
    done = on_ranks(2, "-m", "bitring", "train", *map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert set(os.listdir(folder)) - {"checkpoint.npz.previous"} == FILES

    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["epoch", f"{epoch}/3"] for epoch in (1, 2, 3)]
    assert lines[3].startswith("test accuracy  0.")
    assert "MB per rank; an exact exchange in each step sends" in lines[4]
    assert lines[5] == f"curve          {folder}/curve.png"
    assert len(lines) == 6  # rank 0 alone prints

    records, result = history(folder), summary(folder)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert set(records[0]) == {
        "epoch", "train_loss", "test_accuracy", "seconds", "samples_per_second", "bytes_sent", "bytes_exact", "digest",
        "telemetry",
    }  # fmt: skip
    told = records[2]["telemetry"]
    assert min(told[f"{part}_seconds"] for part in ("encode", "wire", "decode", "wait")) > 0
    assert 0 < told["contraction"] < 1 < told["bytes_sent"]
    assert told["slowest_rank"] in (0, 1)
    assert "(encode " in lines[2]
    assert " of the gradient)" in lines[2]
    assert records[2]["train_loss"] < records[0]["train_loss"]
    sent = [record["bytes_sent"] for record in records]
    assert sent[0] > sent[2] - sent[1] == sent[1] - sent[0]  # the first step of 69 is exact
    assert result["warmup_steps"] == 1
    assert records[0]["seconds"] < records[2]["seconds"]
    assert result["test_accuracy"] == records[2]["test_accuracy"] > 0.5
    assert result["bytes_sent"] * 15 < result["bytes_exact"]
    for name, value in {
        "ranks": 2, "mode": "sync", "compression": "onebit", "algorithm": "auto", "seed": 0, "lr": 0.02, "epochs": 3,
    }.items():  # fmt: skip
        assert result[name] == value
    assert {"train_loss", "seconds", "samples_per_second", "versions"} <= set(result)
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"


MIDDLES = """
import json, os, shutil, sys
from mpi4py import MPI
from bitring.__main__ import main
from bitring.commands import _train

output = sys.argv[1]
comm = MPI.COMM_WORLD

def run(*arguments):
    sys.argv = ["bitring", "train", "--model", "mlp", "--batch", "120", "--epochs", "2", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code

for mode, compression in (("sync", "none"), ("sync", "onebit"), ("local", "onebit"), ("block_momentum", "none")):
    shared = ["--mode", mode, "--compression", compression] + ["--tau", "5"] * (mode != "sync")
    folder = f"{output}/{mode}-{compression}"
    run(*shared, "--output", f"{folder}/whole")
    run(*shared, "--output", f"{folder}/saved", "--checkpoint-every", "4steps", "--keep", "9")
    # Go on from one in the first epoch, and from one in the second.
    for number in ("5", "2"):
        parts = f"{folder}/parts{number}"
        if comm.rank == 0:
            os.mkdir(parts)
            shutil.copy(f"{folder}/saved/checkpoint.npz.previous{number}", f"{parts}/checkpoint.npz")
        comm.Barrier()
        run(*shared, "--output", parts, "--resume")
"""


def test_going_on_in_the_middle_of_an_epoch_gives_the_same_bits(on_ranks, tmp_path: Path):
    """And saving there, every 4 of 12 steps, makes no difference. In modes with blocks, it is done at a block's end."""
    done = on_ranks(2, "-c", MIDDLES, tmp_path, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": going on after step ") == 8
    for folder in tmp_path.iterdir():
        whole = history(folder / "whole")
        for run in ("saved", "parts5", "parts2"):
            for one, other in zip(whole, history(folder / run), strict=True):
                for name in ("epoch", "train_loss", "test_accuracy", "bytes_sent", "bytes_exact", "digest"):
                    assert one[name] == other[name], (folder, run, name)
            assert history(folder / run)[1]["seconds"] > history(folder / run)[0]["seconds"]
            with np.load(folder / "whole/checkpoint.npz") as one, np.load(folder / run / "checkpoint.npz") as other:
                for name in one.files:
                    if name != "header.json":
                        np.testing.assert_array_equal(one[name], other[name], err_msg=f"{folder}: {name}")


def test_a_checkpoint_of_the_middle_of_an_epoch_on_another_number_of_ranks(on_ranks, tmp_path: Path):
    arguments = ["train", "--model", "softmax", "--output", tmp_path, "--checkpoint-every", "5steps", "--keep", "9"]
    assert on_ranks(2, "-m", "bitring", *arguments, "--epochs", "1", "--batch", "120").returncode == 0
    whole = history(tmp_path)
    middle = tmp_path / "checkpoint.npz.previous"
    middle.rename(tmp_path / "checkpoint.npz")
    result = train(*arguments[1:], "--epochs", 1, "--batch", 120, "--resume")
    assert result.exit_code == 0, result.output
    assert "going on after step 10 of epoch 1\n" in result.output
    assert history(tmp_path)[0]["train_loss"] == pytest.approx(whole[0]["train_loss"], rel=1e-4)
    assert history(tmp_path)[0]["bytes_sent"] > 0  # those of the run on two ranks


def test_a_checkpoint_every_so_often(tmp_path: Path, monkeypatch):
    """Rank 0's clock decides; the last --keep are kept, and an earlier run's that are more are not."""
    ticks = itertools.count()
    monkeypatch.setattr("bitring.commands._due.time.monotonic", lambda: next(ticks) / 2)
    arguments = ["--model", "softmax", "--batch", 120, "--output", tmp_path]
    result = train(*arguments, "--epochs", 2, "--checkpoint-every", "3s", "--keep", 3)
    assert result.exit_code == 0, result.output
    names = {"checkpoint.npz", "checkpoint.npz.previous", "checkpoint.npz.previous2"}
    assert {file.name for file in tmp_path.glob("checkpoint*")} == names
    steps = [steps_of(tmp_path / name) for name in sorted(names)]
    assert steps == [24, 18, 12]
    assert train(*arguments, "--epochs", 3, "--resume", "--keep", 1).exit_code == 0
    assert {file.name for file in tmp_path.glob("checkpoint*")} == {"checkpoint.npz"}


def steps_of(checkpoint: Path) -> int:
    with zipfile.ZipFile(checkpoint) as file:
        return int(json.loads(file.read("header.json"))["steps"])


RUNS = """
import shutil, sys
from mpi4py import MPI
from bitring.__main__ import main

output = sys.argv[1]
for mode in ("sync", "local", "block_momentum"):
    shared = ["bitring", "train", "--model", "mlp", "--mode", mode, "--compression", "onebit", "--batch", "360"]
    shared += ["--tau", "3"] * (mode != "sync") + ["--epochs", "2", "--output"]
    whole, parts = f"{output}/{mode}/whole", f"{output}/{mode}/parts"
    for arguments in ([whole], [parts, "--resume"]):
        if parts in arguments and MPI.COMM_WORLD.rank == 0:
            # What a run that was interrupted in its second epoch leaves behind.
            shutil.copytree(whole, parts)
            shutil.move(f"{parts}/checkpoint.npz.previous", f"{parts}/checkpoint.npz")
        MPI.COMM_WORLD.Barrier()
        sys.argv = [*shared, *arguments]
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
"""


def test_resumed_equals_uninterrupted(on_ranks, tmp_path: Path):
    """Two ranks, compressed: parameters, residuals and the mode's state must all have been kept."""
    done = on_ranks(2, "-c", RUNS, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for mode in ("sync", "local", "block_momentum"):
        whole, parts = tmp_path / mode / "whole", tmp_path / mode / "parts"
        assert history(whole)[0]["digest"] != history(whole)[1]["digest"]
        assert history(whole)[0] == history(parts)[0]
        assert history(whole)[1]["seconds"] != history(parts)[1]["seconds"]  # it was trained again
        for name in ("epoch", "train_loss", "test_accuracy", "bytes_sent", "bytes_exact", "digest"):
            assert history(whole)[1][name] == history(parts)[1][name], (mode, name)
        with np.load(whole / "checkpoint.npz") as one, np.load(parts / "checkpoint.npz") as other:
            assert set(one.files) == set(other.files)
            for name in one.files:
                if name != "header.json":
                    np.testing.assert_array_equal(one[name], other[name], err_msg=f"{mode}: {name}")


def test_one_rank_and_one_seed_give_the_same_bits(tmp_path: Path):
    digests: dict[str, str] = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = train("--model", "softmax", "--epochs", 1, "--seed", seed, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "bytes sent     none, there is one rank" in result.output
        digests[name] = summary(tmp_path / name)["digest"]
    assert digests["a"] == digests["b"] != digests["c"]


def test_a_complete_run_is_not_repeated(tmp_path: Path):
    arguments = ["--model", "softmax", "--epochs", 1, "--output", tmp_path]
    train(*arguments)
    before = history(tmp_path)
    result = train(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/checkpoint.npz has 1 epoch: there is nothing left to train\n" in result.output
    assert " after 1 epoch, " in result.output
    assert history(tmp_path) == before
    assert set(os.listdir(tmp_path)) >= FILES
    # With --fresh it begins anew.
    train(*arguments, "--fresh")
    assert history(tmp_path)[0]["seconds"] != before[0]["seconds"]
    assert len(history(tmp_path)) == 1


def test_a_checkpoint_is_not_deleted_by_mistake(tmp_path: Path):
    """A batch system that starts the same command again must not undo the first run."""
    arguments = ["--model", "softmax", "--epochs", 1, "--output", tmp_path]
    assert train(*arguments).exit_code == 0
    checkpoint = tmp_path / "checkpoint.npz"
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    result = train(*arguments)
    assert result.exit_code == 2
    message = f"Error: {checkpoint} is there, of another run: --resume goes on from it, --fresh deletes it\n"
    assert result.output == message
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    # A run that ended while it put a checkpoint in its place, where there are no hard links, leaves the one before.
    checkpoint.rename(f"{checkpoint}.previous")
    assert f"{checkpoint}.previous is there" in train(*arguments).output
    result = train("--model", "softmax", "--epochs", 2, "--output", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    assert f"{checkpoint}.previous: going on after epoch 1\n" in result.output
    assert len(history(tmp_path)) == 2


def test_resume_without_a_checkpoint_begins(tmp_path: Path):
    result = train("--model", "softmax", "--epochs", 1, "--output", tmp_path, "--resume")
    assert result.exit_code == 0
    assert f"{tmp_path}/checkpoint.npz is not there: starting from the beginning" in result.output


def test_resume_with_other_settings_is_refused(tmp_path: Path):
    train("--model", "softmax", "--epochs", 1, "--output", tmp_path)
    result = train("--model", "softmax", "--epochs", 2, "--output", tmp_path, "--resume", "--seed", 5)
    assert result.exit_code == 2
    assert "Error: --resume: the checkpoint was made with --seed 0; got 5" in result.output
    result = train("--model", "mlp", "--epochs", 2, "--output", tmp_path, "--resume")
    assert result.exit_code == 2
    assert "belongs to other training" in result.output


def test_resume_compares_what_the_compressor_is_not_how_it_is_written(tmp_path: Path):
    arguments = ["--model", "softmax", "--output", tmp_path, "--resume", "--compression"]
    assert train("--epochs", 1, *arguments, "topk:density=0.010,block=4096").exit_code == 0
    assert summary(tmp_path)["compression"] == "topk:block=4096"
    result = train("--epochs", 2, *arguments, "topk:block=4096")
    assert result.exit_code == 0, result.output
    assert len(history(tmp_path)) == 2
    result = train("--epochs", 3, *arguments, "topk")
    assert result.exit_code == 2
    assert "TopK(density=0.01, sampled=False, block=65536)" in result.output


@pytest.mark.parametrize("mode", ["local", "block_momentum"])
def test_resume_compares_values_in_force(tmp_path: Path, mode: str):
    """Defaults too, in what is compared, in what is said, and in the summary."""
    arguments = ["--model", "softmax", "--mode", mode, "--output", tmp_path, "--resume"]
    assert train("--epochs", 1, *arguments).exit_code == 0
    kept = summary(tmp_path)
    assert (kept["tau"], kept["lr"], kept["momentum"]) == (50, 0.02, 0.9)
    result = train("--epochs", 2, *arguments, "--tau", 50, "--lr", 0.02, "--momentum", 0.9)
    assert result.exit_code == 0, result.output
    for option, got, was in (("--tau", "20", "50"), ("--lr", "0.1", "0.02"), ("--warmup-steps", "3", "its default")):
        result = train("--epochs", 3, *arguments, option, got)
        assert result.exit_code == 2
        assert f"Error: --resume: the checkpoint was made with {option} {was}; got {got}\n" in result.output


def test_settings_behind_the_name(tmp_path: Path):
    """The summary spells modes and optimizers; what has an option of its own is there by itself, too."""
    arguments = ["--model", "softmax", "--batch", 360, "--output", tmp_path, "--resume"]
    named = ["--mode", "block_momentum:tau=2,zeta=0.5", "--optimizer", "sgd:nesterov=true,weight_decay=1e-3"]
    assert train("--epochs", 1, *arguments, *named).exit_code == 0
    kept = summary(tmp_path)
    assert kept["mode"] == "block_momentum:tau=2,zeta=0.5"
    assert kept["optimizer"] == "sgd:lr=0.02,momentum=0.9,nesterov=true,weight_decay=0.001"
    assert (kept["tau"], kept["lr"], kept["momentum"], kept["nesterov"]) == (2, 0.02, 0.9, True)
    # The same in other words.
    again = ["--mode", "block_momentum:zeta=5e-1,nesterov=true", "--tau", 2, "--lr", 0.02, "--momentum", 0.9]
    again += ["--optimizer", "sgd:momentum=0.90,weight_decay=0.001,nesterov=true"]
    result = train("--epochs", 2, *arguments, *again)
    assert result.exit_code == 0, result.output
    assert len(history(tmp_path)) == 2
    for changed, message in (
        (["--mode", "block_momentum:tau=3,zeta=0.5"], "--tau 2; got 3"),
        (["--mode", "block_momentum:tau=2"], "--mode block_momentum:tau=2,zeta=0.5; got block_momentum:tau=2"),
        (["--optimizer", "sgd:nesterov=true"], f"--optimizer {kept['optimizer']}; got sgd:lr=0.02,momentum=0.9,"),
    ):
        result = train("--epochs", 3, *arguments, *named, *changed)
        assert result.exit_code == 2
        assert f"Error: --resume: the checkpoint was made with {message}" in result.output


def test_each_setting_has_its_effect(tmp_path: Path):
    """None is dropped on the way."""
    digests: list[str] = []
    for number, optimizer in enumerate(("sgd", "sgd:weight_decay=0.1", "adagrad", "adagrad:eps=1")):
        arguments = ["--model", "softmax", "--batch", 720, "--epochs", 1, "--output", tmp_path / str(number)]
        result = train(*arguments, "--optimizer", optimizer)
        assert result.exit_code == 0, result.output
        digests.append(summary(tmp_path / str(number))["digest"])
    assert len(set(digests)) == len(digests)


def test_checkpoints_from_before_modes_and_optimizers_were_spelled():
    """They have the bare names, and the values in force of the three options."""
    now = {"model": "mlp", "mode": "local", "tau": 50, "optimizer": "sgd:lr=0.02,momentum=0.9", "lr": 0.02}
    now |= {"momentum": 0.9}
    was = {**now, "optimizer": "sgd"}
    assert difference(was, now) is None
    assert difference(now, now) is None
    assert difference({**was, "tau": 20}, now) == ("tau", 20, 50)
    assert difference(was, {**now, "mode": "sync", "tau": None}) == ("mode", "local", "sync")
    assert difference({**was, "model": "cnn"}, now) == ("model", "cnn", "mlp")
    # What is no such thing differs, and is no error of its own.
    for odd in ({}, {"mode": 3}, {"mode": "gone"}, {"tau": "x"}, {"lr": -1}, {"optimizer": None}):
        assert difference({**was, **odd} if odd else {}, now) is not None


def test_help_has_the_defaults_in_force():
    text = " ".join(train("--help").output.split())
    assert f"block_momentum. [default: {bitring.Local().tau}]" in text
    assert bitring.Local().tau == bitring.BlockMomentum().tau


def test_a_truncated_checkpoint_is_refused(tmp_path: Path):
    train("--model", "softmax", "--epochs", 2, "--output", tmp_path)
    checkpoint = tmp_path / "checkpoint.npz"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    result = train("--model", "softmax", "--epochs", 3, "--output", tmp_path, "--resume")
    assert result.exit_code == 2
    assert "truncated or damaged" in result.output
    assert f"the checkpoint before it is {checkpoint}.previous" in result.output
    assert (tmp_path / "summary.json").exists()  # nothing was touched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cnm"], "Error: unknown model 'cnm'; known: cnn, mlp, softmax"),
        (["--data", "digit"], "Error: load: unknown data set 'digit'; known: cifar10, digits,"),
        (["--mode", "asink"], f"Error: unknown mode 'asink'; known: {', '.join(bitring.modes())}"),
        (["--compression", "2bit"], "Error: unknown compressor '2bit'; known: none, "),
        (["--algorithm", "rong"], "Error: unknown algorithm 'rong'; known: binomial_tree,"),
        (
            ["--optimizer", "rmsprop"],
            "Error: unknown optimizer 'rmsprop'; known: adagrad, adam, onebit_adam, sgd",
        ),
        (["--optimizer", "adagrad", "--momentum", "0.5"], "Error: --momentum is not for the optimizer adagrad"),
        (["--tau", "5"], "Error: --tau is not for the mode sync"),
        (["--mode", "local:tua=5"], "Error: unknown setting 'tua' of the mode local; known: tau"),
        (["--mode", "local:tau=5", "--tau", "6"], "Error: --mode local:tau=5 and --tau 6 differ in tau; give it once"),
        (["--optimizer", "sgd:lr=1", "--lr", "0.5"], "--optimizer sgd:lr=1 and --lr 0.5 differ in lr; give it once"),
        (["--optimizer", "adagrad:eps=0"], "Error: AdaGrad: eps must be above 0 and finite; got 0.0"),
        (["--mode", "block_momentum:zeta=x"], "block_momentum:zeta=x: zeta must be a number; got 'x'"),
        (["--compression", "2bit:block=64"], "Error: unknown compressor '2bit'; known: none, "),
        (["--compression", "none:block=64"], "Error: --compression none:block=64: none has no settings"),
        (["--compression", "topk:k=9"], "Error: unknown setting 'k' of the compressor topk; known: density, sampled,"),
        (["--compression", "onebit:block=10"], "OneBit: block must be a positive multiple of 64; got 10"),
        (["--batch", "0"], "Error: --batch must be at least 1; got 0"),
        (
            ["--checkpoint-every", "0"],
            "expected such as 10min, 2epochs or 500steps; units are epochs, steps, s, min, h; got '0'",
        ),
        (["--checkpoint-every", "1.5steps"], "expected such as 10min, 2epochs or 500steps"),
        (["--checkpoint-every", "3days"], "expected such as 10min, 2epochs or 500steps"),
        (["--timeline", "a.txt"], "Error: --timeline must end in .png, .svg or .pdf; got a.txt"),
        (["--keep", "0"], "Error: --keep must be at least 1; got 0"),
        (["--resume", "--fresh"], "Error: --resume and --fresh exclude each other"),
        (["--lr", "-1"], "SGD: lr must be above 0 and finite; got -1.0"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--output", "/proc/no"], "Error: --output /proc/no cannot be written: "),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str):
    result = train("--output", tmp_path / "run", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_a_card_cuda_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No CuPy; or one that finds no card, or cannot look for one."""

    def no_driver() -> int:
        raise RuntimeError("cudaErrorNoDevice")

    cases: dict[str, Any] = {
        "CuPy, which is not there": None,
        "a card, and CuPy finds none": lambda: 0,
        "a card, and CuPy finds none: cudaErrorNoDevice": no_driver,
    }
    for message, count in cases.items():
        runtime = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count)))
        monkeypatch.setitem(sys.modules, "cupy", runtime if count else None)
        result = train("--output", tmp_path / "run", "--device", "cuda")
        assert result.exit_code == 2, result.output
        assert f"--device cuda needs {message}" in result.output


def test_the_model_computes_with_the_devices_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NumPy under another name stands for CuPy."""
    card: Any = ModuleType("card")
    card.__dict__.update({name: getattr(np, name) for name in dir(np) if not name.startswith("__")})
    given: list[Any] = []
    card.asarray = lambda x: given.append(x) or np.asarray(x)
    modules = {"host": np, "cuda": card}
    monkeypatch.setattr("bitring.commands._device.array_module", lambda device, rank: modules[device])
    options = ["--model", "mlp", "--epochs", 1, "--data", "digits"]
    for device in ("host", "cuda"):
        result = train("--output", tmp_path / device, "--device", device, *options)
        assert result.exit_code == 0, result.output
        assert bool(given) == (device == "cuda")
    assert len(given) > 2 * summary(tmp_path / "cuda")["epochs"] * 20
    found = [summary(tmp_path / device)["test_accuracy"] for device in ("host", "cuda")]
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_mistakes_end_all_ranks_alike(on_ranks, tmp_path: Path):
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--output", tmp_path / "file" / "run"], "--output "),  # only rank 0 looks at it
        (["--output", tmp_path / "run", "--data", "mnist", "--data-directory", tmp_path], "mnist: found no place"),
        (["--output", tmp_path / "run", "--modle", "cnn"], "No such option"),
    ):
        done = on_ranks(2, "-m", "bitring", "train", *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("Error: ") == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_training_that_diverges(on_ranks, tmp_path: Path):
    done = on_ranks(2, "-m", "bitring", "train", "--model", "mlp", "--lr", "1000", "--output", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("Error: ") == 1
    assert "holds NaN on rank" in done.stderr
    assert "a smaller --lr may help" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


RAISES = """
import sys
from bitring.__main__ import main
from bitring.training.data_parallel import DataParallel

step = DataParallel.step

def failing(self, gradients, weight=1.0):
    if self.rank == 1 and self.steps == 3:
        raise RuntimeError("the disk of rank 1 caught fire")
    step(self, gradients, weight)

DataParallel.step = failing
sys.argv = ["bitring", "train", "--model", "mlp", "--output", sys.argv[1]]
main()
"""


@pytest.mark.slow
def test_a_rank_that_raises_ends_all(on_ranks, tmp_path: Path):
    begin = time.monotonic()
    done = on_ranks(3, "-c", RAISES, tmp_path)
    assert done.returncode != 0
    assert "[rank 1] RuntimeError: the disk of rank 1 caught fire" in done.stderr
    assert "[rank 1] Traceback" in done.stderr
    assert "[rank 0] Traceback" not in done.stderr
    assert time.monotonic() - begin < 40


DIFFERS = """
import sys
from mpi4py import MPI
from bitring.__main__ import main
from bitring.training.data_parallel import DataParallel

synchronize = DataParallel.synchronize

def disturbed(self):
    synchronize(self)
    if self.rank == 1:
        next(iter(self.parameters.values()))[0] += 1

DataParallel.synchronize = disturbed
sys.argv = ["bitring", "train", "--model", "mlp", "--epochs", "1", "--output", sys.argv[1]]
main()
"""


def test_replicas_that_differ_are_found(on_ranks, tmp_path: Path):
    done = on_ranks(2, "-c", DIFFERS, tmp_path)
    assert done.returncode != 0
    assert "MismatchError: after epoch 1 the parameters differ: rank 1 has " in done.stderr


# Sends Ctrl-C from a finalizer, where Python drops what it raises: that of the second checkpoint's archive.
CTRL_C_IN_A_FINALIZER = """
import os, signal, zipfile
def __del__(self, close=zipfile.ZipFile.__del__, sent=[]):
    close(self)
    if not sent and os.path.exists("run/checkpoint.npz.previous"):
        sent.append(True)
        os.kill(os.getpid(), signal.SIGINT)
zipfile.ZipFile.__del__ = __del__
from bitring.__main__ import main
main()
"""


@pytest.mark.parametrize("program", [["-m", "bitring"], ["-c", CTRL_C_IN_A_FINALIZER]], ids=["plain", "finalizer"])
def test_ctrl_c(program: list[str], tmp_path: Path, clean_environment):
    def mind_ctrl_c() -> None:  # which a shell makes its background jobs ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, *program, "train", "--model", "softmax", "--epochs", "100000", "--output", "run"],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=mind_ctrl_c,
    ) as process:
        try:
            assert process.stdout is not None
            if program[0] == "-m":
                for line in process.stdout:
                    if line.split()[1] == "2/100000":
                        break
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=150)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted; --resume goes on after epoch " in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("part", "arguments", "left"),
    [
        ("load", ["--fresh"], " before the first checkpoint"),
        ("_accuracy", ["--fresh"], " before the first checkpoint"),
        ("load", ["--resume"], "; the checkpoint is as it was"),
        ("_accuracy", ["--resume"], "; --resume goes on after epoch 1"),
    ],
)
def test_ctrl_c_before_a_checkpoint(tmp_path: Path, monkeypatch, part: str, arguments: list[str], left: str):
    """What can be gone on from is named, whatever another run has left there."""
    assert train("--model", "softmax", "--epochs", 1, "--output", tmp_path).exit_code == 0

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"bitring.commands._train.{part}", interrupted)
    result = train("--model", "softmax", "--epochs", 2, "--output", tmp_path, *arguments)
    assert result.exit_code == 1
    assert f"\ninterrupted{left}\n" in result.output


@pytest.mark.slow
def test_the_bar_is_shown_through_mpirun(tmp_path: Path, clean_environment):
    """The launcher's terminal counts: a rank's own output is a pipe."""
    mpirun = Path(sys.executable).with_name("mpirun")
    if (
        not mpirun.exists()
        or "Open MPI" in subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("how MPICH's mpirun passes output on")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [mpirun, "-n", "2", *BITRING, "train", "--model", "softmax", "--epochs", "2", "--output", "run"],
        cwd=tmp_path,
        env=clean_environment(TERM="xterm"),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        shown += piece
    os.close(ours)
    assert process.wait(timeout=150) == 0, shown.decode()
    assert "━".encode() in shown
    assert b"epoch 2/2  loss" in shown


def test_sandblaster_trains_and_goes_on_on_other_ranks(on_ranks, tmp_path):
    train = ("-m", "bitring", "train", "--model", "softmax", "--data", "digits", "--optimizer", "lbfgs:memory=5")
    train += ("--mode", "sandblaster:portions=16", "--output", str(tmp_path))
    done = on_ranks(2, *train, "--epochs", "4", "--placement", "hybrid")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["placement"] == "hybrid"
    done = on_ranks(1, *train, "--epochs", "6", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    losses = [record["train_loss"] for record in records]
    assert losses == sorted(losses, reverse=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mode"] == "sandblaster:portions=16"
    assert summary["test_accuracy"] > 0.8
    assert summary["evaluations"] == records[-1]["evaluations"] >= 6
    assert (tmp_path / "portions.png").stat().st_size > 1000


def test_one_model_in_shared_memory(on_ranks, tmp_path):
    """Hogwild's parameters are put where it wants them, and a run of it goes on."""
    common = ["train", "--model", "softmax", "--data", "digits", "--mode", "hogwild", "--output", str(tmp_path)]
    for more in (["--epochs", "2"], ["--epochs", "3", "--resume"]):
        done = on_ranks(2, "-m", "bitring", *common, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [line["epoch"] for line in history(tmp_path)] == [1, 2, 3]
    assert summary(tmp_path)["test_accuracy"] > 0.8 and summary(tmp_path)["bytes_sent"] == 0


def test_lbfgs_is_for_sandblaster_alone(tmp_path):
    for given, text in (
        (
            ["--optimizer", "lbfgs"],
            "--optimizer lbfgs is for whole batches, and needs --mode sandblaster; got --mode sync",
        ),
        (["--mode", "sandblaster"], "--mode sandblaster needs --optimizer lbfgs; got --optimizer sgd"),
    ):
        result = CliRunner().invoke(__main__._bitring, ["train", *given, "--output", str(tmp_path)])
        assert result.exit_code == 2
        assert text in result.output
