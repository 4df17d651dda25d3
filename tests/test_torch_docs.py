"""docs/torch.md: its scripts run; and `import bitring` loads no PyTorch."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

pytestmark = pytest.mark.single

PAGE = (Path(__file__).resolve().parent.parent / "docs/torch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SCRIPTS = [block for block in BLOCKS if "import bitring.torch\n" in block]


@pytest.mark.timeout(300)  # importing Lightning takes most of a minute where others compute, too
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_the_scripts_run(on_ranks, tmp_path: Path, number: int):
    for other in ("accelerate", "pytorch_lightning"):
        if f" {other} " in SCRIPTS[number] and importlib.util.find_spec(other) is None:
            pytest.skip(f"{other} is not installed; see CONTRIBUTING.md")
    script = tmp_path / "train.py"
    script.write_text(SCRIPTS[number], encoding="utf-8")
    done = on_ranks(2, script, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, timeout=150)
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"test accuracy (0\.\d+)", done.stdout)
    assert accuracy is not None and float(accuracy[1]) > 0.6, done.stdout


def test_import_bitring_loads_no_pytorch():
    code = "import sys, bitring; bitring.DataParallel; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
