"""docs/jax.md: its scripts run; and `import bitring` loads no JAX."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

jax: Any = pytest.importorskip("jax", reason="JAX is not installed")
pytest.importorskip("optax", reason="optax is not installed")

pytestmark = pytest.mark.single

PAGE = (Path(__file__).resolve().parent.parent / "docs/jax.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_the_scripts_run(on_ranks, tmp_path: Path, number: int):
    script = tmp_path / "train.py"
    script.write_text(SCRIPTS[number], encoding="utf-8")
    done = on_ranks(2, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"test accuracy (0\.\d+)", done.stdout)
    assert accuracy is not None and float(accuracy[1]) > 0.85, done.stdout


def test_import_bitring_loads_no_jax():
    code = "import sys, bitring; bitring.DataParallel; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
