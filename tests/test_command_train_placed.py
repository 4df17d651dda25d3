"""`bitring train --placement`: accuracy whatever the placement, what it writes, errors; and docs/placements.md."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mpi4py import MPI

import bitring
from bitring import __main__
from bitring.training.model_parallel import ModelParallel

pytestmark = pytest.mark.single

PAGE = (Path(__file__).resolve().parent.parent / "docs/placements.md").read_text(encoding="utf-8")
SCRIPTS = [block for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if "import" in block]


def test_accuracy_is_the_same_whatever_the_placement(on_ranks, tmp_path: Path):
    found = []
    for number, placement in enumerate(("data", "pipeline:stages=2,microbatches=3", "dense1=columns,dense2=1")):
        done = on_ranks(
            2,
            *("-m", "bitring", "train", "--model", "mlp", "--data", "digits", "--epochs", "1"),
            *("--placement", placement, "--output", tmp_path / str(number)),
        )
        assert done.returncode == 0, done.stderr
        assert "in all:" in done.stdout
        found.append(json.loads((tmp_path / str(number) / "summary.json").read_text(encoding="utf-8")))
        assert (tmp_path / str(number) / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 1
        assert (tmp_path / str(number) / "placement.png").stat().st_size > 5000
    for each in found[1:]:
        assert abs(each["test_accuracy"] - found[0]["test_accuracy"]) <= 1 / 360 + 1e-12
        assert each["train_loss"] == pytest.approx(found[0]["train_loss"], rel=1e-4)


def test_a_run_goes_on_under_another_placement(on_ranks, tmp_path: Path):
    common = ("-m", "bitring", "train", "--model", "mlp", "--data", "digits", "--epochs", "2", "--output", tmp_path)
    done = on_ranks(2, *common, "--placement", "hybrid")
    assert done.returncode == 0, done.stderr
    whole = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    (tmp_path / "checkpoint.npz.previous").replace(tmp_path / "checkpoint.npz")  # as if it had ended there
    done = on_ranks(2, *common, "--placement", "data", "--resume")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert again["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4) and again["epochs"] == 2
    done = on_ranks(2, *common, "--placement", "data", "--resume", "--batch", "256")
    assert done.returncode == 2, done.stderr
    assert "--resume: the checkpoint was made with --batch 64; got 256" in " ".join(done.stderr.split())


def test_replicas_make_steps_of_their_own_and_go_on_in_other_replicas(on_ranks, tmp_path: Path):
    common = ("-m", "bitring", "train", "--model", "mlp", "--data", "digits", "--output", tmp_path, "--epochs", "2")
    common += ("--mode", "ssp:staleness=1", "--optimizer", "adagrad", "--lr", "0.02", "--compression", "onebit")
    done = on_ranks(4, *common, "--placement", "hybrid", "--replicas", "2")
    assert done.returncode == 0, done.stderr
    first, last = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert last["test_accuracy"] > 0.85 and last["train_loss"] < first["train_loss"], last
    (tmp_path / "checkpoint.npz.previous").replace(tmp_path / "checkpoint.npz")  # as if it had ended there
    done = on_ranks(3, *common, "--placement", "data", "--replicas", "3", "--resume")
    assert done.returncode == 0, done.stderr
    again, now = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert again == first and now["test_accuracy"] > 0.85 and now["train_loss"] < first["train_loss"], now


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--placement", ""], "unknown placement ''"),
        (["--placement", "dense1=rows,dense1=0"], "dense1 is given twice"),
        (["--placement", "dense1="], "expected LAYER=samples|columns|rows|RANK; got 'dense1='"),
        (["--placement", "data", "--device", "cuda"], "--device cuda is not for --placement"),
        (["--placement", "data", "--checkpoint-every", "3steps"], "--checkpoint-every must be in epochs"),
        (["--optimizer", "lbfgs", "--mode", "sandblaster", "--device", "cuda"], "--device cuda is not for"),
        (["--optimizer", "lbfgs", "--mode", "sandblaster", "--algorithm", "ring"], "--algorithm and --timeline"),
        (["--optimizer", "lbfgs:is_for=x", "--mode", "sandblaster"], "unknown setting 'is_for'"),
        (["--lr", "nan"], "lr must be above 0 and finite; got nan"),
        (["--timeline", "/dev/null/x.png"], "--timeline /dev/null/x.png cannot be written"),
    ],
)
def test_errors_of_the_first(tmp_path: Path, options: list[str], message: str):
    run = CliRunner().invoke(__main__._bitring, ["train", "--model", "softmax", *options, "--output", str(tmp_path)])
    assert run.exit_code == 2 and message in " ".join(run.output.split()), run.output


@pytest.mark.parametrize("kind", [["--placement", "data"], ["--optimizer", "lbfgs", "--mode", "sandblaster"]])
def test_a_disk_that_is_full_is_one_line(tmp_path: Path, kind: list[str]):
    """Whichever file it is."""
    for name in ("metrics.jsonl.partial", "checkpoint.npz.partial", "summary.json.partial"):
        folder = tmp_path / name.partition(".")[0]
        (folder / name).mkdir(parents=True)  # a folder of that name stands for what makes writing impossible
        arguments = ["train", "--model", "softmax", "--epochs", "1", *kind, "--output", str(folder)]
        run = CliRunner().invoke(__main__._bitring, arguments)
        assert run.exit_code == 1, run.output
        assert "Error: " in run.stderr and str(folder / name.removesuffix(".partial")) in run.stderr
        assert len(run.stderr.splitlines()) == 1


def test_what_rank_0_alone_cannot_write_ends_all(on_ranks, tmp_path: Path):
    (tmp_path / "metrics.jsonl.partial").mkdir()
    train = ("-m", "bitring", "train", "--model", "softmax", "--epochs", "1", "--placement", "data")
    done = on_ranks(2, *train, "--output", tmp_path)
    assert done.returncode == 1 and "metrics.jsonl" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_sandblaster_goes_on_with_the_same_data_alone(tmp_path: Path):
    common = ["train", "--model", "softmax", "--epochs", "1", "--output", str(tmp_path)]
    common += ["--optimizer", "lbfgs", "--mode", "sandblaster"]
    assert CliRunner().invoke(__main__._bitring, common).exit_code == 0
    run = CliRunner().invoke(__main__._bitring, [*common, "--resume", "--seed", "3"])
    assert run.exit_code == 2 and "--resume: the checkpoint was made with --seed 0; got 3" in run.output
    comm = MPI.COMM_SELF
    model = bitring.Softmax((8, 8), 10, seed=0)
    job = bitring.Sandblaster(model, bitring.LBFGS(), comm=comm)
    bitring.save_checkpoint(tmp_path / "checkpoint.npz", job)
    job.free()
    run = CliRunner().invoke(__main__._bitring, [*common, "--resume"])
    assert run.exit_code == 2 and "was not made by bitring train" in run.output


def test_a_signal_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch):
    common = ["train", "--model", "softmax", "--batch", "360", "--epochs", "2", "--placement", "data"]  # 4 steps each
    step, moments = ModelParallel.step, [2, 4, 7]

    def disturbed(self: Any, *arguments: Any) -> float:
        if self.steps + 1 in moments:
            moments.remove(self.steps + 1)
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments)

    assert CliRunner().invoke(__main__._bitring, [*common, "--output", str(tmp_path / "whole")]).exit_code == 0
    monkeypatch.setattr(ModelParallel, "step", disturbed)
    parts = [*common, "--output", str(tmp_path / "parts")]
    kept = ("step 2 of epoch 1", "epoch 1", "step 3 of epoch 2")
    for number, place in enumerate(kept):
        run = CliRunner().invoke(__main__._bitring, [*parts, *["--resume"] * bool(number)], prog_name="bitring")
        assert run.exit_code == 75 and f"holds all that was trained, up to {place}\n" in run.output, run.output
    assert CliRunner().invoke(__main__._bitring, [*parts, "--resume"]).exit_code == 0
    for one, other in zip(*map(history, (tmp_path / "whole", tmp_path / "parts")), strict=True):
        assert (one["epoch"], one["train_loss"], one["test_accuracy"]) == (
            other["epoch"],
            other["train_loss"],
            other["test_accuracy"],
        )


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--placement", "both"],
            "unknown placement 'both'; known: auto, data, hybrid, hybrid_in_turns, pipeline:stages=2",
        ),
        (["--placement", "auto", "--mode", "downpour"], "need a mode in which all ranks make the same steps"),
        (["--replicas", "2"], "--replicas is for --placement"),
    ],
)
def test_errors(on_ranks, tmp_path: Path, options: list[str], message: str):
    done = on_ranks(2, "-m", "bitring", "train", "--model", "mlp", *options, "--output", tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_the_pages_scripts_run(on_ranks, tmp_path: Path, number: int):
    script = tmp_path / "train.py"
    script.write_text(SCRIPTS[number], encoding="utf-8")
    done = on_ranks(2, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy 0.9" in done.stdout


def test_the_page_has_a_script():
    assert SCRIPTS
