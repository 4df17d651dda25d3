"""README.md: its Python runs, its links lead somewhere, and its tables name what is registered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bitring

pytestmark = pytest.mark.single

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def first_column(table: str) -> set[str]:
    return set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))


@pytest.mark.parametrize(("number", "printed"), [(0, "test accuracy 0."), (1, "ring: asked for |")])
def test_the_code_runs(on_ranks, tmp_path: Path, number: int, printed: str):
    script = tmp_path / "train.py"
    script.write_text(BLOCKS[number], encoding="utf-8")
    done = on_ranks(2, script)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_every_block_is_run():
    assert len(BLOCKS) == 2


def test_the_loop_is_short():
    calls = [line for line in BLOCKS[0].splitlines() if line and not line.startswith(("import", "from"))]
    assert len(calls) <= 15


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_tables_name_all_that_is_registered():
    assert first_column(section("Algorithms")) == set(bitring.algorithms())
    assert first_column(section("Modes")) == set(bitring.modes())
