"""Predicted steps: the parts by hand, what must be monotone, and where compression pays and where it does not."""

import dataclasses
import math

import pytest

import bitring
from bitring.commands._predict import advice
from bitring.compression.exchange.layout import lay_out
from bitring.compression.exchange.owner_schedule import encoders
from bitring.models.architecture import LayerTable, layer_table
from bitring.training.prediction import predict as module
from bitring.training.prediction.cluster import BUILT_IN, Cluster, Kernel, Machine
from bitring.training.prediction.predict import Prediction, predict

pytestmark = pytest.mark.single

GBIT = 1e9 / 8
FREE = Machine(
    "all but the wire is free",
    *[math.inf] * 4,
    step=0,
    step_together=0,
    step_array=0,
    powersgd=0,
    powersgd_together=0,
    powersgd_array=0,
    cores=64,
    wire=1.0,
    local_latency=0.0,
)
FAST = dataclasses.replace(BUILT_IN, flops=1e13)
MATRIX = [LayerTable("fc", "dense", (("fc.weight", (4096, 4096)),), 4096 * 4096, factors=1)]


def by_name(layers: list[LayerTable], cluster: Cluster, machine: Machine, **options) -> dict[str, Prediction]:
    return {each.exchange: each for each in predict(layers, cluster, machine, **options)}


@pytest.mark.parametrize("ranks", [2, 5, 16])
def test_a_step_by_hand_where_all_but_the_wire_is_free(ranks: int):
    n, share = 4096 * 4096, 2 * (ranks - 1) / ranks
    cluster = Cluster(ranks, ranks, bandwidth=GBIT, latency=0.0)
    found = by_name(MATRIX, cluster, FREE, compute=0.25, batch=1)
    assert found["exact"].seconds == pytest.approx(0.25 + share * 4 * n / GBIT, rel=1e-4)
    assert found["exact"].exposed == pytest.approx(found["exact"].wire, rel=1e-4)
    assert found["exact"].nbytes == share * 4 * n
    payload = lay_out(bitring.OneBit(), [(4096, 4096)], ranks).expected_nbytes
    assert found["onebit"].seconds == pytest.approx(0.25 + share * payload / GBIT, rel=1e-4)
    assert found["onebit"].nbytes == pytest.approx(share * payload)
    assert all(each.leaving == each.nbytes for each in found.values())  # one rank a node
    assert found["onebit"].speedup == pytest.approx(found["exact"].seconds / found["onebit"].seconds)
    assert found["powersgd"].nbytes == pytest.approx(share * 4 * module.RANK * (4096 + 4096))
    assert found["sufficient_factors"].nbytes == (ranks - 1) * 4 * (4096 + 4096)
    assert found["sufficient_factors"].wire == pytest.approx((ranks - 1) * 4 * (4096 + 4096) / GBIT)
    assert [each.exchange for each in found.values() if each.lossless] == ["exact", "mpi", "sufficient_factors"]


def test_what_is_flat_takes_as_long_as_its_own_kernels():
    """A matrix has panels with levels of rank one, what has no rows blocks: other kernels, timed apart."""
    kernels = {"onebit": Kernel(3e-9, 2e-9), "onebit, flat": Kernel(1e-9, 0.5e-9), "sign": Kernel(4e-9, 4e-9)}
    machine, cluster, n = dataclasses.replace(FREE, kernels=kernels), Cluster(4, 4, math.inf, latency=0.0), 1 << 20
    matrix = LayerTable("fc", "dense", (("fc.weight", (1024, 1024)),), 0)
    flat = LayerTable("scale", "normal", (("scale.weight", (n,)),), 0)
    for layers, encode, decode in (([matrix], 3e-9, 2e-9), ([flat], 1e-9, 0.5e-9), ([matrix, flat], 4e-9, 2.5e-9)):
        found = by_name(layers, cluster, machine, compute=1.0)
        assert found["onebit"].encode == pytest.approx(5 / 4 * encode * n)
        assert found["onebit"].decode == pytest.approx(2 * decode * n)
        assert found["sign"].encode == pytest.approx(5 / 4 * 4e-9 * n * len(layers))
    old = dataclasses.replace(machine, kernels={"onebit": Kernel(3e-9, 2e-9)})  # before they were timed apart
    assert by_name([flat], cluster, old, compute=1.0)["onebit"].encode == pytest.approx(5 / 4 * 3e-9 * n)


def test_every_encoder_is_there():
    assert set(encoders.names()) <= set(by_name(MATRIX, Cluster(4, 4, GBIT), BUILT_IN))


def test_computing_takes_three_passes():
    layers = layer_table("vgg16")
    one = by_name(layers, Cluster(1, 1), dataclasses.replace(FREE, flops=1e12), batch=4)
    assert one["exact"].seconds == pytest.approx(3 * 2 * 4 * 15.47e9 / 1e12, rel=1e-3)
    assert one["exact"].exposed == one["exact"].nbytes == one["onebit"].encode == 0


@pytest.mark.parametrize("model", ["alexnet", "googlenet", "lstm"])
def test_more_bandwidth_never_makes_a_step_longer(model: str):
    curves = [by_name(layer_table(model), Cluster(8, 8, gbit * GBIT), FAST) for gbit in (0.3, 3, 30, 300)]
    for name in curves[0]:
        seconds = [found[name].seconds for found in curves]
        assert seconds == sorted(seconds, reverse=True), name


def test_buckets_are_exchanged_while_others_are_packed_and_updated():
    """Two buckets: the second's exchange hides the first's update; all are checked before, and packed."""
    layers = [LayerTable(f"fc{i}", "dense", ((f"fc{i}.weight", (4096, 4096)),), 4096 * 4096) for i in (1, 2)]
    machine = dataclasses.replace(FREE, step=32e-9, step_array=1e-3)
    n = 4096 * 4096
    exchange = 2 * (1 / 2) * 4 * n / GBIT
    exact = by_name(layers, Cluster(2, 2, GBIT, latency=0.0), machine, compute=0.0)["exact"]
    bucket = 32e-9 * n + 1e-3
    before = (2 * module.CHECK + module.PACK) * bucket
    assert exact.wire == pytest.approx(2 * exchange)
    assert exact.seconds == pytest.approx(before + 2 * exchange + module.UPDATE * bucket)
    assert exact.exposed == pytest.approx(exact.seconds - 2 * bucket)


def test_without_a_second_core_a_processor_s_work_adds_up():
    layers = layer_table("resnet50")
    machine = dataclasses.replace(BUILT_IN, cores=1)
    cluster = Cluster(2, 2, 100 * GBIT)
    two, one = (by_name(layers, cluster, dataclasses.replace(BUILT_IN, cores=n), compute=0.0)["onebit"] for n in (2, 1))
    work = machine.step * sum(layer.values for layer in layers) + one.encode + one.decode
    assert two.seconds < one.seconds
    assert one.seconds == pytest.approx(work, rel=0.1)


@pytest.mark.parametrize("ranks_per_node", [1, 4])
def test_sending_is_a_processor_s_work_too(ranks_per_node: int):
    machine = dataclasses.replace(FREE, cores=1)
    slow = dataclasses.replace(machine, wire_work=1e-6)
    cluster = Cluster(2 * ranks_per_node, 2, 1000 * GBIT, latency=0.0)
    free, busy = (by_name(MATRIX, cluster, each, compute=0.5) for each in (machine, slow))
    leaving = 4 * 4096 * 4096 / ranks_per_node
    assert busy["exact"].seconds == pytest.approx(0.5 + 1e-6 * leaving)
    for name, each in free.items():
        assert each.nbytes == busy[name].nbytes
        inside = 2 * (ranks_per_node - 1) / ranks_per_node * 4 * 4096 * 4096
        if each.how.endswith("owners"):
            assert busy[name].seconds == pytest.approx(0.5 + 1e-6 * (each.nbytes - inside))


def test_powersgd_takes_what_was_measured():
    machine = dataclasses.replace(FREE, powersgd=3e-9, powersgd_array=0.25, powersgd_together=1.0)
    layers = [*MATRIX, LayerTable("bn", "normal", (("bn.weight", (99,)),), 0)]
    one = by_name(layers, Cluster(2, 2, math.inf, latency=0.0), machine, compute=1.0)["powersgd"]
    assert one.seconds - 1.0 == pytest.approx(one.encode)
    assert one.encode == pytest.approx(3e-9 * 4096 * 4096 + 0.25)


def test_overlap_hides_communication_behind_back_propagation():
    layers, cluster = layer_table("vgg16"), Cluster(8, 8, 10 * GBIT)
    late, early = (by_name(layers, cluster, FAST, compute=3.0, overlap=overlap) for overlap in (False, True))
    for name, each in early.items():
        assert 3.0 < each.seconds < late[name].seconds
    # VGG's last layers have most of the values and are ready first: nearly all is hidden.
    assert early["exact"].exposed < 0.1 * late["exact"].exposed


def test_vgg_at_a_gigabit_is_worth_compressing():
    found = predict(layer_table("vgg16"), Cluster(64, 64, GBIT), FAST)
    best = min(found, key=lambda each: each.seconds)
    assert not best.lossless
    assert best.speedup > 4
    assert f"{best.exchange} is the best: {best.speedup:.1f}x" in advice(found, Cluster(64, 64, GBIT))


@pytest.mark.parametrize(
    ("model", "cluster"),
    [
        ("cnn", Cluster(16, 16, 400 * GBIT, latency=2e-6)),
        ("vgg16", Cluster(4, 4, 400 * GBIT, latency=2e-6)),
        ("mlp", Cluster(2, 1)),
        ("vgg16", Cluster(4, 1)),
    ],
)
def test_where_compression_does_not_pay(model: str, cluster: Cluster):
    found = predict(layer_table(model), cluster, BUILT_IN)
    exact = found[0]
    assert exact.seconds <= 1.01 * min(each.seconds for each in found if not each.lossless)
    assert advice(found, cluster).startswith("Compression does not pay ")
    assert ("within one node" in advice(found, cluster)) == (cluster.nodes == 1)


def test_ranks_of_a_node_sum_and_each_encodes_a_lane():
    layers = layer_table("alexnet")
    spread, dense = (by_name(layers, Cluster(4 * q, 4, GBIT), BUILT_IN) for q in (1, 8))
    assert dense["onebit"].how == "node sums, owners"
    inside = 2 * (8 - 1) / 8 * 4 * sum(layer.values for layer in layers)
    assert dense["onebit"].nbytes == pytest.approx(inside + spread["onebit"].nbytes / 8, rel=1e-3)
    assert BUILT_IN.cores == 2  # with which a rank encodes that has a node to itself
    assert dense["onebit"].encode == pytest.approx(2 * spread["onebit"].encode / 8)
    assert dense["onebit"].wire > spread["onebit"].wire


def test_bytes_that_leave_a_node():
    n, nodes, q = 4096 * 4096, 4, 8
    found = by_name(MATRIX, Cluster(nodes * q, nodes, GBIT), FAST, batch=1)
    share = 2 * (nodes - 1) / nodes
    assert found["exact"].leaving == found["mpi"].leaving == share * 4 * n < q * found["exact"].nbytes
    payload = lay_out(bitring.OneBit(), [(4096, 4096)], nodes).expected_nbytes
    assert found["onebit"].leaving == pytest.approx(share * payload)
    assert found["sufficient_factors"].leaving == (nodes * q - 1) * 4 * (4096 + 4096)
    assert all(each.leaving == 0 for each in predict(MATRIX, Cluster(q, 1), FAST))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_is_one_without_an_exchange_and_what_is_exposed(overlap: bool, monkeypatch: pytest.MonkeyPatch):
    """With buckets of one size: they are smaller between nodes, where the last update begins earlier."""
    monkeypatch.setattr(module, "largest_bucket", lambda bucket_bytes, nbytes, nodes: bucket_bytes)
    layers = layer_table("resnet50")
    alone = by_name(layers, Cluster(1, 1), FAST, overlap=overlap)["exact"].seconds
    for each in predict(layers, Cluster(8, 8, GBIT), FAST, overlap=overlap):
        assert each.seconds - each.exposed == pytest.approx(alone, rel=0.01)


def test_emulated_nodes_share_the_cores_of_one_machine():
    machine = dataclasses.replace(BUILT_IN, copy_together=BUILT_IN.copy, step_together=2 * BUILT_IN.step)
    layers, cluster = layer_table("alexnet"), Cluster(4, 4, 10 * GBIT)
    real, emulated = (by_name(layers, cluster, dataclasses.replace(machine, emulated=each)) for each in (False, True))
    assert emulated["onebit"].encode > real["onebit"].encode
    assert emulated["exact"].seconds > real["exact"].seconds


def test_factors_are_used_where_they_are_fewer_bytes():
    layers, cluster = layer_table("vgg16"), Cluster(8, 8, GBIT)
    assert by_name(layers, cluster, FAST, batch=32)["sufficient_factors"].how == "factors of 3 layers"
    assert "sufficient_factors" not in by_name(layers, cluster, FAST, batch=4096)
    assert "sufficient_factors" not in by_name(layer_table("cnn"), Cluster(1, 1), FAST)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"compute": -1.0}, {"compute": math.nan}])
def test_numbers_out_of_range_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=r"predict: expected layers, batch >= 1 and compute >= 0; got 1 layers"):
        predict(MATRIX, Cluster(2, 2, GBIT), BUILT_IN, **wrong)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match=r"predict: expected layers.*; got 0 layers"):
        predict([], Cluster(2, 2, GBIT), BUILT_IN)
