"""Clusters and machines: what is refused, and that a machine survives its file."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from bitring.training.prediction.cluster import BUILT_IN, Cluster, Kernel, read_machine, write_constants

pytestmark = pytest.mark.single


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"nodes": 0}, {"nodes": 3}, {"bandwidth": 0}, {"latency": -1.0}])
def test_clusters_that_cannot_be(wrong: dict[str, float]):
    given: dict[str, float] = {"ranks": 4, "nodes": 2, "bandwidth": 1e9, **wrong}
    with pytest.raises(ValueError, match=r"Cluster: expected .*; got "):
        Cluster(**given)  # type: ignore[arg-type]


def test_a_machine_survives_its_file(tmp_path: Path):
    machine = dataclasses.replace(
        BUILT_IN, title="another", kernels_together={"onebit": Kernel(1e-9, 2e-9)}, emulated=True
    )
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"constants": write_constants(machine)}))
    assert read_machine(path) == machine


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"constants": {"title": "x"}}', '{"constants": 1}', '{"constants": {"kernels": 3}}']
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other.json: it is not what bitring bench compress --json wrote"):
        read_machine(path)


def test_a_speed_of_nothing_is_refused(tmp_path: Path):
    path = tmp_path / "slow.json"
    path.write_text(json.dumps({"constants": {**write_constants(BUILT_IN), "copy": 0.0}}))
    with pytest.raises(ValueError, match="speeds must be positive"):
        read_machine(path)


def test_kernels_alone_together_and_unknown():
    machine = dataclasses.replace(
        BUILT_IN, kernels_together={"onebit": Kernel(1.0, 2.0)}, copy=1e10, cores=1, together=4
    )
    assert machine.kernel("onebit", 0.1, ranks=2) == (Kernel(1.0, 2.0), True)
    assert machine.kernel("onebit", 0.1, ranks=1) == (BUILT_IN.kernels["onebit"], True)
    kernel, measured = machine.kernel("unheard_of", 2.0, ranks=1)
    assert not measured
    assert kernel == pytest.approx((14e-10, 10e-10))
    shared = dataclasses.replace(machine, copy_together=3e10).kernel("unheard_of", 2.0, ranks=6)[0]
    assert shared == pytest.approx((14 / 5e9, 10 / 5e9))
    spare = dataclasses.replace(machine, cores=9)  # of which no more than 4 were measured at once
    assert [spare.kernel("onebit", 0.1, ranks)[0].encode for ranks in (1, 2, 3, 8)] == [0.25, 0.5, 1.0, 1.0]
    assert spare.kernel("onebit", 0.1, ranks=1, beside=True) == (BUILT_IN.kernels["onebit"], True)
    assert math.isfinite(BUILT_IN.flops)
