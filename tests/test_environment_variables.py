"""The table of environment variables has all that the library reads, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

ROOT = Path(__file__).resolve().parents[1]
QUOTED = re.compile(r"""["'](BITRING_[A-Z_]+)["']""")
ROW = re.compile(r"^\| `(BITRING_[A-Z_]+)` \| .+ \|$", re.MULTILINE)


def test_the_table_has_what_is_read():
    read: set[str] = set()
    for folder in ("src/bitring", "collectives", "compression", "models", "training"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu"):
                read |= set(QUOTED.findall(file.read_text(encoding="utf-8")))
    assert {"BITRING_TIMEOUT", "BITRING_TABLE"} <= read
    rows = ROW.findall((ROOT / "docs/launching.md").read_text(encoding="utf-8"))
    assert rows == sorted(read)


def test_no_other_page_has_a_variable_that_is_not_in_it():
    rows = set(ROW.findall((ROOT / "docs/launching.md").read_text(encoding="utf-8")))
    rows.add("BITRING_SANITIZE")  # of CMake
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"BITRING_[A-Z]+(?:_[A-Z]+)*", text)) <= rows, page
