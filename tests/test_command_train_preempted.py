"""``bitring train`` and signals: what is kept, what is said, and that the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from run import launcher

from bitring import __main__
from bitring.commands import _course, _train
from bitring.training.data_parallel import DataParallel

pytestmark = [pytest.mark.single, pytest.mark.timeout(300)]

KINDS = ["sync-none", "sync-onebit", "local-none", "local-onebit", "block_momentum-onebit"]

# Rank 1 gets a signal after steps 2, 8, 9 and 12 of 12; each time all are started again.
RUNS = """
import signal, sys
from bitring.__main__ import main
from bitring.training.data_parallel import DataParallel

step, moments = DataParallel.step, []

def disturbed(self, *arguments, **named):
    step(self, *arguments, **named)
    if self.steps in moments and self.rank == 1:
        moments.remove(self.steps)
        signal.raise_signal(signal.SIGUSR1 if self.steps % 2 else signal.SIGTERM)

DataParallel.step = disturbed
_, output, *kinds = sys.argv
for kind in kinds:
    mode, compression = kind.split("-")
    shared = ["bitring", "train", "--model", "mlp", "--mode", mode, "--compression", compression, "--batch", "360"]
    shared += ["--tau", "3"] * (mode != "sync") + ["--epochs", "3"]
    for name, moments in (("whole", []), ("parts", [2, 8, 9, 12])):
        codes = []
        while not codes or codes[-1] == 75:
            sys.argv = [*shared, "--output", f"{output}/{kind}/{name}"] + ["--resume"] * bool(codes)
            try:
                main()
            except SystemExit as end:
                codes.append(int(end.code or 0))
        assert codes == ([0] if name == "whole" else [75, 75, 75, 0]), (kind, codes)
"""


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_preempted_run_ends_as_an_undisturbed_one(on_ranks, tmp_path: Path):
    done = on_ranks(2, "-c", RUNS, tmp_path, *KINDS, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in KINDS:
        whole, parts = tmp_path / kind / "whole", tmp_path / kind / "parts"
        for one, other in zip(history(whole), history(parts), strict=True):
            for name in ("epoch", "train_loss", "test_accuracy", "bytes_sent", "bytes_exact", "digest"):
                assert one[name] == other[name], (kind, one["epoch"], name)
        with np.load(whole / "checkpoint.npz") as one, np.load(parts / "checkpoint.npz") as other:
            assert set(one.files) == set(other.files)
            for name in one.files:
                if name != "header.json":
                    np.testing.assert_array_equal(one[name], other[name], err_msg=f"{kind}: {name}")


def train(*arguments: object) -> Any:
    """On one rank, in this process."""
    arguments = ("train", "--model", "softmax", "--batch", "360", "--output", *arguments)  # 4 steps per epoch
    return CliRunner().invoke(__main__._bitring, [*map(str, arguments)], prog_name="bitring")


def with_a_signal(of: Callable[..., Any], at: int = 1) -> Callable[..., Any]:
    """``of``, with a signal in its call number ``at``."""
    calls: list[None] = []

    def disturbed(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return of(*arguments, **named)

    return disturbed


@pytest.mark.parametrize(
    ("where", "part", "at", "kept"),
    [
        (_train, "load", 1, "nothing was trained yet"),
        (_train, "_begin", 1, "nothing was trained yet"),
        (DataParallel, "begin", 2, "run/checkpoint.npz holds all that was trained, up to step 2 of epoch 1"),
        (DataParallel, "step", 2, "run/checkpoint.npz holds all that was trained, up to step 3 of epoch 1"),
        (_train, "_accuracy", 1, "run/checkpoint.npz holds all that was trained, up to epoch 1"),
        (_course, "write_checkpoint", 2, "run/checkpoint.npz holds all that was trained, up to epoch 2"),
    ],
)
def test_wherever_the_signal_comes(tmp_path: Path, monkeypatch, where: Any, part: str, at: int, kept: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bitring", "train", "--output", "a b"])
    with monkeypatch.context() as once:
        once.setattr(where, part, with_a_signal(getattr(where, part), at))
        result = train("run", "--epochs", 3)
    assert result.exit_code == 75, result.output
    resume = "" if "yet" in kept else " --resume"
    assert result.output.endswith(f"\npreempted; {kept}\ngo on with: bitring train --output 'a b'{resume}\n")
    result = train("run", "--epochs", 3, *resume.split())
    assert result.exit_code == 0, result.output
    assert [record["epoch"] for record in history(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(("where", "part"), [(DataParallel, "step"), (_train, "_accuracy"), (_train, "conclude")])
def test_a_run_whose_last_step_is_made_is_finished(tmp_path: Path, monkeypatch, where: Any, part: str):
    at = {"step": 8, "_accuracy": 2, "conclude": 1}[part]
    monkeypatch.setattr(where, part, with_a_signal(getattr(where, part), at))
    result = train(tmp_path, "--epochs", 2)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "summary.json").exists()
    # Nor is there anything to stop in one that was complete before.
    monkeypatch.setattr(_train, "_begin", with_a_signal(_train._begin))
    result = train(tmp_path, "--epochs", 2, "--resume")
    assert result.exit_code == 0, result.output
    assert "nothing left to train" in result.output


def test_before_the_first_step_a_checkpoint_stays_as_it_was(tmp_path: Path, monkeypatch):
    assert train(tmp_path, "--epochs", 1).exit_code == 0
    before = (tmp_path / "checkpoint.npz").read_bytes()
    for option in ("--resume", "--fresh"):
        monkeypatch.setattr(sys, "argv", ["bitring", "train", option])
        monkeypatch.setattr(_train, "load", with_a_signal(_train.load))
        result = train(tmp_path, "--epochs", 2, option)
        assert result.exit_code == 75, result.output
        kept = (
            "nothing more was trained; the checkpoint is as it was"
            if option == "--resume"
            else "nothing was trained yet"
        )
        assert f"\npreempted; {kept}\ngo on with: bitring train {option}\n" in result.output
        assert (tmp_path / "checkpoint.npz").read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch):
    def full(*arguments: object, **named: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(_course, "write_checkpoint", full)
    monkeypatch.setattr(DataParallel, "step", with_a_signal(DataParallel.step))
    result = train(tmp_path)
    assert result.exit_code == 1
    assert "Error: no space left\n" in result.output
    assert "preempted" not in result.output


def test_what_is_said_can_be_typed(tmp_path: Path, clean_environment):
    """A signal to the launcher, which passes it on; twice."""
    prefix, extra = launcher(2)
    command = [*prefix, sys.executable, "-m", "bitring", "train", "--model", "softmax", "--output", "my run"]
    command += ["--epochs", "100000", "--checkpoint-every", "1000"]
    for _ in range(2):
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=clean_environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if re.match(r"epoch +\d+/100000", line):
                        break
                process.send_signal(signal.SIGUSR1)
                _, errors = process.communicate(timeout=150)
            finally:
                process.kill()
        assert process.returncode == 75, errors
        assert "Traceback" not in errors
        (said,) = re.findall(r"^go on with: (.*)$", errors, re.MULTILINE)
        typed = shlex.split(said)
        assert typed[-1] == "--resume"
        assert typed[1:3] == ["-n", "2"]
        command = [*prefix, *typed[3:]]  # with what this machine's mpirun wants besides
    assert command.count("--resume") == 1


ENDING = """
import atexit, os, signal, sys
def strike():
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
atexit.register(strike)  # called after what is registered later
from bitring.__main__ import main
sys.argv[:] = ["bitring", "train", "--model", "softmax", "--epochs", "1", "--output", sys.argv[1]]
main()
"""


def test_a_signal_while_the_process_ends_does_not_change_its_status(tmp_path: Path, clean_environment):
    command = [sys.executable, "-c", ENDING, str(tmp_path)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "summary.json").exists()
