"""``bitring bench train``: a step with each exchange, and the bytes that each has to send."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitring import __main__
from bitring.commands._units import traffic

pytestmark = pytest.mark.single


def test_two_ranks(on_ranks, tmp_path: Path):
    kept = tmp_path / "t.json"
    exchanges = ["exact", "mpi", "onebit", "onebit:levels=block", "powersgd", "topk:density=0.25,block=64"]
    arguments = ["--json", kept, "--model", "softmax", "--samples", "2", "--exchanges", ",".join(exchanges)]
    done = on_ranks(2, "-m", "bitring", "bench", "train", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(kept.read_text())
    rows = {row["exchange"]: row for row in found["results"]}
    assert list(rows) == exchanges
    for row in rows.values():
        assert len(row["samples"]) == 2
        assert row["speedup"] == pytest.approx(rows["exact"]["seconds"] / row["seconds"])
    assert found["values"] == 7850
    assert rows["exact"]["nbytes"] == 4 * 7850
    assert " 31.4 kB " in done.stdout
    # The 10 biases are fewer than a block, and travel exactly.
    blocks = rows["onebit:levels=block"]["nbytes"]
    assert blocks == 7840 / 8 + 8 * 8 + 4 * 10
    assert 7840 / 8 < rows["onebit"]["nbytes"] <= blocks
    assert rows["topk:density=0.25,block=64"]["nbytes"] > 4 * 7840 / 4


def test_bytes_for_people():
    numbers = 0, 999, 1000, 31_400, 99_900, 100_000, 36_200_000, 1_089_600_000
    read = ["0 B", "999 B", "1.0 kB", "31.4 kB", "99.9 kB", "0.1 MB", "36.2 MB", "1,090 MB"]
    assert [traffic(nbytes) for nbytes in numbers] == read


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--exchanges", "exact,zip"], "unknown exchange 'zip'; known: exact, mpi, "),
        (["--exchanges", "zip:level=9"], "unknown exchange 'zip'; known: exact, mpi, "),
        (["--exchanges", "onebit:block=10"], "OneBit: block must be a positive multiple of 64; got 10"),
        (["--exchanges", "exact,mpi:x=1"], "mpi:x=1: mpi has no settings"),
        (["--model", "vgg"], "unknown model 'vgg'; known: alexnet"),
        (["--json", "/nowhere/t.json"], "there is no folder /nowhere"),
    ],
)
def test_mistakes(arguments: list[str], text: str):
    result = CliRunner().invoke(__main__._bitring, ["bench", "train", *arguments], prog_name="bitring")
    assert result.exit_code == 2
    assert text in result.output
