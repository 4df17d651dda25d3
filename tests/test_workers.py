"""A data loader's worker processes beside ranks: the script that docs/communicator.md advises, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.single

DOCS = Path(__file__).resolve().parent.parent / "docs" / "communicator.md"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_advice_works(on_ranks, tmp_path: Path, method: str):
    section = DOCS.read_text(encoding="utf-8").split("## Worker processes")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None and '"spawn"' in code[1]
    script = tmp_path / "train.py"
    script.write_text(code[1].replace('"spawn"', f'"{method}"'), encoding="utf-8")
    done = on_ranks(2, script, timeout=150)
    assert done.returncode == 0, done.stderr
    # Ranks' lines may run into each other.
    assert sorted(re.findall(r"\d\.0", done.stdout)) == ["0.0", "0.0", "2.0", "2.0", "4.0", "4.0"]
