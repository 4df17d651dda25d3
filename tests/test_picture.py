"""Pictures of schedules."""

import subprocess
import sys
from pathlib import Path

import pytest

from bitring.collectives.schedules.drawing import draw
from bitring.collectives.schedules.schedule import algorithms

pytestmark = pytest.mark.single


@pytest.mark.parametrize("name", [name for name in algorithms.names() if algorithms.get(name).collectives()])
def test_eight_ranks_fit_in_100_kilobytes(name: str, tmp_path: Path):
    algorithm = algorithms.get(name)()
    path = tmp_path / "picture.png"
    draw(algorithm, "allreduce", 8, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert 5_000 < len(data) < 100_000


@pytest.mark.parametrize("size", [1, 2, 13, 48])
def test_any_number_of_ranks(size: int, tmp_path: Path):
    for name in ("ring", "double_binary_tree"):
        path = tmp_path / f"{name}.svg"
        draw(algorithms.get(name)(), "allreduce", size, path)
        assert "</svg>" in path.read_text()


def test_reducing_and_replacing_look_different(tmp_path: Path):
    path = tmp_path / "picture.svg"
    draw(algorithms.get("binomial_tree")(), "reduce", 8, path)
    assert "stroke-dasharray" not in path.read_text()
    draw(algorithms.get("binomial_tree")(), "broadcast", 8, path)
    assert path.read_text().count("stroke-dasharray") >= 7


def test_pyplot_stays_out(tmp_path: Path):
    """Drawing must not touch the figures, nor the backend, of the program that calls it."""
    program = (
        "import sys\n"
        "from bitring.collectives.schedules.drawing import draw\n"
        "from bitring.collectives.algorithms.ring import Ring\n"
        "assert 'matplotlib' not in sys.modules\n"
        "draw(Ring(), 'allreduce', 2, sys.argv[1])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "picture.png")], check=True, timeout=150)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib, which is not installed: pip install 'bitring\[demo\]'"):
        draw(algorithms.get("ring")(), "allreduce", 4, tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def test_unknown_format(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'nonsense' is not supported"):
        draw(algorithms.get("ring")(), "allreduce", 4, tmp_path / "picture.nonsense")
