"""``bitring predict``: its table, its advice, its files, its refusals; on a login node."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_command_schedule import WITHOUT_MPI

from bitring import __main__
from bitring.models.architecture import layer_tables
from bitring.training.prediction.cluster import BUILT_IN, write_constants

pytestmark = pytest.mark.single


def run(*arguments: object) -> Result:
    return CliRunner().invoke(__main__._bitring, ["predict", *map(str, arguments)], prog_name="bitring")


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit) or result.exception is None
    return result.output


VGG = "--model", "vgg16", "--ranks", "8", "--flops", "10Tflops"


def test_the_table_and_the_advice():
    result = run(*VGG, "--bandwidth", "1Gbit")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "model    vgg16: 138,357,544 parameters, 15.5 G multiply-adds per sample"
    assert lines[1] == "ranks    8 on 8 nodes, 1 Gbit/s, 50 µs per message"
    assert lines[2].endswith("2.97 Tflop at 10 Tflop/s; exchanges begin when all gradients are there")
    assert lines[3] == (
        "alone    440 ms without an exchange: 297 ms for the gradients, "
        "143 ms more for the NaN check, packing and the update"
    )
    assert lines[4] == f"machine  {BUILT_IN.title} (built-in figures)"
    assert "leaving a node" in lines[6]
    exchanges = [line.split()[0] for line in lines[8:] if line][:-1]
    assert exchanges[:2] == ["exact", "mpi"]
    assert {"onebit", "powersgd", "sufficient_factors"} <= set(exchanges)
    assert "is the best: " in lines[-1]


def test_one_node_is_advised_against():
    result = run("--model", "mlp", "--ranks", 4, "--nodes", 1)
    assert result.exit_code == 0, result.output
    assert "4 on 1 node, through the node's memory" in result.output
    assert "sent per rank" in result.output
    assert result.output.splitlines()[-1].startswith("Compression does not pay within one node: ")


def test_the_advice_names_the_speed_it_rests_on(tmp_path: Path):
    network = "--bandwidth", "10Gbit"
    assumed = (
        " This is at 119 Gflop/s per rank, as where bitring is developed; "
        "--flops, --compute or --machine tell of yours."
    )
    assert run("--model", "mlp", "--ranks", 4, *network).output.splitlines()[-1].endswith(assumed)
    machine = tmp_path / "m.json"
    machine.write_text(json.dumps({"constants": write_constants(BUILT_IN)}))
    for told in (("--flops", "1Tflops"), ("--compute", "1s"), ("--machine", machine)):
        assert "as where bitring" not in run("--model", "mlp", "--ranks", 4, *network, *told).output
    assert "as where bitring" not in run("--model", "mlp", "--ranks", 1).output


def test_files(tmp_path: Path):
    kept, plot, machine = (tmp_path / name for name in ("p.json", "p.png", "m.json"))
    machine.write_text(json.dumps({"constants": {**write_constants(BUILT_IN), "title": "a slow one"}}))
    arguments = "--bandwidth", "1.25GB/s", "--latency", "20us", "--compute", "80ms", "--overlap", "--machine", machine
    result = run("--model", "resnet50", "--ranks", 4, *arguments, "--json", kept, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "machine  a slow one\n" in result.output
    assert "10 Gbit/s, 20 µs per message" in result.output
    assert "80 ms of computing; exchanges begin as back-propagation makes the gradients" in result.output
    assert plot.read_bytes()[:4] == b"\x89PNG"
    found = json.loads(kept.read_text())
    assert found["prediction"]["bandwidth"] == 1.25e9
    assert found["prediction"]["machine"] == "a slow one"
    assert found["advice"] in result.output
    points = found["by_bandwidth"]
    assert [point["bandwidth"] for point in points] == sorted(point["bandwidth"] for point in points)
    here = min(points, key=lambda point: abs(point["bandwidth"] - 1.25e9))
    assert here["seconds"] == {each["exchange"]: each["seconds"] for each in found["exchanges"]}


def test_an_encoder_that_was_not_measured_is_marked(tmp_path: Path):
    machine = tmp_path / "m.json"
    machine.write_text(json.dumps({"constants": {**write_constants(BUILT_IN), "kernels": {}, "kernels_together": {}}}))
    output = run(*VGG, "--bandwidth", "1Gbit", "--machine", machine).output
    assert "onebit ~" in output
    assert "~ not measured on this machine" in output


def test_the_network_is_the_machine_s_unless_it_is_given(tmp_path: Path):
    machine = tmp_path / "m.json"
    measured = dataclasses.replace(BUILT_IN, latency=3e-5, bandwidth=1e9 * BUILT_IN.wire)
    machine.write_text(json.dumps({"constants": write_constants(measured)}))
    assert "8 nodes, 8 Gbit/s, 30 µs per message" in run(*VGG, "--machine", machine).output
    given = run(*VGG, "--machine", machine, "--bandwidth", "10Gbit", "--latency", "20us").output
    assert "8 nodes, 10 Gbit/s, 20 µs per message" in given


def test_mistakes_say_what_is_expected(tmp_path: Path):
    assert f"known: {', '.join(layer_tables())}" in refused("--model", "vgg", "--ranks", 4, "--bandwidth", "1Gbit")
    assert "expected such as 10Gbit or 1.25GB/s" in refused(*VGG, "--bandwidth", "10")
    assert "expected such as 10Gbit or 1.25GB/s" in refused(*VGG, "--bandwidth", "0Gbit")
    assert "expected such as 50us or 0.2s" in refused(*VGG, "--bandwidth", "1Gbit", "--latency", "5 parsecs")
    assert "--bandwidth is needed between 8 nodes" in refused(*VGG)
    assert "give one" in refused(*VGG, "--bandwidth", "1Gbit", "--compute", "1s")
    message = "Error: --ranks must be a multiple of --nodes, as many on each node; got 8 ranks on 3 nodes\n"
    assert refused(*VGG, "--bandwidth", "1Gbit", "--nodes", 3) == message
    assert "must end in .png" in refused(*VGG, "--bandwidth", "1Gbit", "--plot", "x.txt")
    assert "one node has no network" in refused(*VGG, "--nodes", 1, "--plot", tmp_path / "x.png")
    assert "there is no folder" in refused(*VGG, "--bandwidth", "1Gbit", "--json", tmp_path / "none" / "x.json")
    assert "ran on several nodes" in refused(*VGG)
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "is not what bitring bench compress" in refused(*VGG, "--bandwidth", "1Gbit", "--machine", other)


def test_a_reader_that_has_seen_enough():
    command = [sys.executable, "-m", "bitring", "predict", "--model", "mlp", "--ranks", "2", "--nodes", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate(timeout=150)
    assert errors == b""


def test_it_needs_no_mpi():
    arguments = "predict", "--model", "cnn", "--ranks", "64", "--bandwidth", "10Gbit"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MPI, *arguments], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "onebit" in done.stdout
