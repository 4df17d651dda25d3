"""``bitring fit``: files of both kinds, and what it writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.datasets import dump_svmlight_file

from bitring import __main__

pytestmark = pytest.mark.single


def rows() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 30)) * (rng.random((60, 30)) < 0.4)
    return x, x[:, :3] @ np.array([1.0, -2.0, 3.0]) + 0.01 * rng.standard_normal(60)


def test_files_of_both_kinds_give_the_same(on_ranks, tmp_path: Path):
    x, y = rows()
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    dump_svmlight_file(x, y, str(tmp_path / "rows.svmlight"))
    found = []
    for ranks, name in ((2, "rows.npz"), (1, "rows.svmlight")):
        output = tmp_path / f"run{ranks}"
        done = on_ranks(ranks, "-m", "bitring", "fit", "lasso", "--data", str(tmp_path / name), "--output", str(output))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "coefficients   3 of 30 features are not zero" in done.stdout
        summary = json.loads((output / "summary.json").read_text())
        assert (summary["ranks"], summary["rows"], summary["nonzero"]) == (ranks, 60, 3)
        assert (output / "objective.png").stat().st_size > 1000
        found.append((np.load(output / "coefficients.npy"), summary["objective"]))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    assert abs(found[0][1] - found[1][1]) < 1e-6


def test_mistakes_are_named(tmp_path: Path):
    np.savez(tmp_path / "odd.npz", x=np.ones((3, 2)), z=np.ones(3))
    run = CliRunner().invoke(__main__._bitring, ["fit", "lasso", "--data", str(tmp_path / "odd.npz")])
    assert run.exit_code == 2
    assert "it has no y, only x, z" in run.output


def write(path: Path, x: Any = None, y: Any = None) -> Path:
    np.savez(path, x=np.ones((3, 2)) if x is None else x, y=np.ones(3) if y is None else y)
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.parent, "it is a folder"),  # scikit-learn reads a folder for ever
        (lambda path: path, "there is no such file"),
        (lambda path: write_bytes(path, b"PK\x03\x04"), "cannot be used: File is not a zip file"),
        (lambda path: write_bytes(path, b""), "cannot be used: No data left in file"),
        (lambda path: write(path, y=np.ones(3) * 1j), "y must be real numbers; got complex128"),
        (lambda path: write(path, x=np.array([["a", "b"]] * 3)), "x must be real numbers; got <U1"),
        (lambda path: write(path, y=np.ones(4)), "got (3, 2) and (4,)"),
        (lambda path: write(path, x=np.full((3, 2), 1e200), y=np.full(3, 1e200)), "must be finite"),
    ],
)
def test_data_that_cannot_be_used_are_named(tmp_path: Path, make: Any, message: str):
    data = make(tmp_path / "data.npz")
    run = CliRunner().invoke(__main__._bitring, ["fit", "lasso", "--data", str(data)])
    assert run.exit_code == 2 and message in run.output, run.output
    assert len(run.output.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_found_before_the_fit(tmp_path: Path):
    (tmp_path / "file").touch()
    data = str(write(tmp_path / "rows.npz"))
    run = CliRunner().invoke(__main__._bitring, ["fit", "lasso", "--data", data, "--output", str(tmp_path / "file")])
    assert run.exit_code == 2 and "cannot be written" in run.output and "objective" not in run.output


def test_logistic_regression(tmp_path: Path):
    x, y = rows()
    np.savez(tmp_path / "signs.npz", x=x, y=y > 0)
    arguments = ["fit", "logistic_regression", "--data", str(tmp_path / "signs.npz"), "--output", str(tmp_path)]
    run = CliRunner().invoke(__main__._bitring, arguments)
    assert run.exit_code == 0, run.output
    coefficients = np.load(tmp_path / "coefficients.npy")
    assert np.mean((x @ coefficients > 0) == (y > 0)) > 0.9
    assert json.loads((tmp_path / "summary.json").read_text())["program"] == "logistic_regression"
    np.savez(tmp_path / "odd.npz", x=x, y=np.ones(60))
    run = CliRunner().invoke(__main__._bitring, [*arguments[:3], str(tmp_path / "odd.npz")])
    assert run.exit_code != 0
    assert "y must have two different values; got 1" in run.output
