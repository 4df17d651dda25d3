"""`bitring train --placement`: accuracy whatever the placement, what it writes, errors; and docs/placements.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

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
