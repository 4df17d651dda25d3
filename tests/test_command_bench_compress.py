"""``bitring bench compress``: checked kernels, figures that fit together, and a file that ``predict`` reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitring import __main__
from bitring.commands._bench_compress import by_packbits
from bitring.compression.encoders.onebit import OneBit
from bitring.training.prediction.cluster import read_machine

pytestmark = pytest.mark.single


def run(*arguments: object):
    return CliRunner().invoke(__main__._bitring, ["bench", "compress", *map(str, arguments)], prog_name="bitring")


def test_two_ranks(on_ranks, tmp_path: Path):
    kept, plot = tmp_path / "c.json", tmp_path / "c.png"
    arguments = ["--json", kept, "--plot", plot, "--values", "20000", "--samples", "2", "--dtype", "float32,bfloat16"]
    names = ["onebit", "linear:bits=2,block=64"]  # all of them take long to compile
    arguments += ["--compressors", ",".join(names)]
    done = on_ranks(2, "-m", "bitring", "bench", "compress", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one rank alone" in done.stdout
    assert "each of 2 ranks at once" in done.stdout
    assert plot.read_bytes()[:4] == b"\x89PNG"
    found = json.loads(kept.read_text())
    wanted = [f"{name} {operation}" for _ in range(2) for name in names for operation in ("encode", "decode-and-add")]
    steps = ["step without exchange", "step without exchange, many arrays", "powersgd", "powersgd, many arrays"]
    for ranks in (1, 2):
        rows = [row for row in found["results"] if row["ranks"] == ranks]
        assert [row["kernel"] for row in rows] == [
            "np.add",
            "np.add in place",
            "copy",
            "np.packbits encode",
            "matrix product",
            *steps,
            *wanted,
        ]
        shares = [row["of_the_roofline"] for row in rows if "bandwidth" in row]
        assert max(shares[:3]) == 1
        for row in rows:
            assert len(row["samples"]) == 2
            if "bandwidth" in row:
                assert row["bandwidth"] == pytest.approx(row["bytes_a_value"] * 20000 / row["seconds"])
    onebit = {
        (row["operation"], row["dtype"]): row["bytes_a_value"] for row in found["results"] if row["encoder"] == "onebit"
    }
    payload = OneBit().nbytes(20000) / 20000
    assert onebit == pytest.approx(
        {
            ("encode", "float32"): 12 + payload,
            ("decode", "float32"): 8 + payload,
            ("encode", "bfloat16"): 10 + payload,
            ("decode", "bfloat16"): 4 + payload,
        }
    )
    machine = read_machine(kept)
    assert set(machine.kernels) == set(machine.kernels_together) == set(names)
    row = next(row for row in found["results"] if row["kernel"] == "onebit encode" and row["ranks"] == 2)
    assert machine.kernels_together["onebit"].encode == pytest.approx(row["seconds"] / 20000)
    assert machine.copy_together == pytest.approx(
        2 * next(row["bandwidth"] for row in found["results"] if row["kernel"] == "copy" and row["ranks"] == 2)
    )
    assert not machine.emulated


def test_one_rank_is_measured_once():
    result = run("--values", 5000, "--samples", 1, "--dtype", "float32", "--compressors", "onebit")
    assert result.exit_code == 0, result.output
    assert result.output.count("onebit encode") == 1


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    def forgets(self, values, residual, payload):
        payload[: self.nbytes(values.size)] = 0
        residual[:] = np.float32(0)
        return self.nbytes(values.size)

    monkeypatch.setattr(OneBit, "encode", forgets)
    result = run("--values", 5000, "--samples", 1, "--dtype", "float32", "--compressors", "onebit")
    assert isinstance(result.exception, RuntimeError)
    assert "onebit of float32 leaves out" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--compressors", "zip"], "unknown encoder 'zip'; known: "),
        (["--compressors", "topk:k=9"], "unknown setting 'k' of the encoder topk; known: density, sampled, block"),
        (["--dtype", "int32"], "compression is for float16"),
        (["--json", "/nowhere/c.json"], "there is no folder /nowhere"),
        (["--plot", "c.txt"], "--plot must end in"),
    ],
)
def test_mistakes(arguments: list[str], text: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in result.output


def test_the_numpy_formulation_computes_the_same():
    values, residual = np.random.default_rng(0).standard_normal((2, 5 * 1024)).astype(np.float32)
    mine, other = residual.copy(), residual.copy()
    levels, bits = by_packbits(values, mine)
    payload = np.empty(OneBit().nbytes(values.size), np.uint8)
    OneBit().encode(values, other, payload)
    blocks = payload.reshape(5, 8 + 128)
    np.testing.assert_array_equal(bits, blocks[:, 8:])
    np.testing.assert_allclose(levels, blocks[:, :8].copy().view(np.float32), rtol=1e-5)
    np.testing.assert_allclose(mine, other, atol=1e-5)
