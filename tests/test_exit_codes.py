"""The exit codes, of which there is one table."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bitring import __main__
from bitring.exit_codes import ExitCode

pytestmark = pytest.mark.single

DOCS = Path(__file__).resolve().parent.parent / "docs" / "launching.md"


def test_the_documentation_has_the_table():
    rows = "".join(f"| {code:d} | {code.meaning} |\n" for code in ExitCode)
    assert f"| code | meaning |\n| --- | --- |\n{rows}\n" in DOCS.read_text(encoding="utf-8")


def test_help_has_it():
    text = " ".join(CliRunner().invoke(__main__._bitring, ["train", "--help"]).output.split())
    for code in ExitCode:
        assert f"{code:d} {code.meaning}" in text


def test_a_code_is_its_number():
    assert [int(code) for code in ExitCode] == [0, 1, 2, 75, 130]
