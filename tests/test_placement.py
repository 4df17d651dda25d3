"""Placements as data: conversions and their adjoints on integers, schedules on paper, who gets which layer."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring.models.graph import INPUT, value_shapes
from bitring.native import extension
from bitring.training.placement.assignment import Placed, assign
from bitring.training.placement.choosing import considered, seconds_of
from bitring.training.placement.conversion import Hop, conversion
from bitring.training.placement.layout import Layout, lay
from bitring.training.placement.messages import Way
from bitring.training.placement.native_messages import serves
from bitring.training.placement.schedules import SCHEDULES, Course, Task, check
from bitring.training.placement.seconds import Link
from bitring.training.placement.step_hops import StepHops
from bitring.training.placement.weight_gradients import Product, WeightGradients
from bitring.training.placement.wiring import Wiring

pytestmark = pytest.mark.single

KINDS = ("samples", "features", "whole", "partial")
SIZES = [(7, 5), (1, 8), (3, 2), (0, 4), (8, 8), (2, 1)]


def carried_out(hop: Hop, x: dict[int, Any]) -> dict[int, Any]:
    """What every rank has after the hop, by its definition: the sum of what moves there."""
    out: dict[int, Any] = {}
    for rank in hop.after.ranks:
        mine = hop.after_it(rank)
        out[rank] = np.zeros((mine.last_row - mine.first_row, 2, mine.last - mine.first), np.int64)
    for source, to, region in hop.moves:
        have, get = hop.before_it(source), hop.after_it(to)
        out[to][
            region.first_row - get.first_row : region.last_row - get.first_row,
            :,
            region.first - get.first : region.last - get.first,
        ] += x[source][
            region.first_row - have.first_row : region.last_row - have.first_row,
            :,
            region.first - have.first : region.last - have.first,
        ]
    return out


def integers(layout: Layout, rows: int, width: int, random: Any, whole: Any = None) -> dict[int, Any]:
    """What every rank has: random integers, or its part of ``whole``."""
    found: dict[int, Any] = {}
    for rank in layout.ranks:
        mine = layout.region(rank, rows, width)
        if whole is None or layout.kind == "partial":
            found[rank] = random.integers(-9, 10, (mine.last_row - mine.first_row, 2, mine.last - mine.first))
        else:
            found[rank] = whole[mine.first_row : mine.last_row, :, mine.first : mine.last].copy()
    return found


def value(layout: Layout, x: dict[int, Any], rows: int, width: int) -> Any:
    if layout.kind == "partial":
        return sum(x.values())
    whole = np.zeros((rows, 2, width), np.int64)
    for rank in layout.ranks:
        mine = layout.region(rank, rows, width)
        whole[mine.first_row : mine.last_row, :, mine.first : mine.last] = x[rank]
    return whole


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5])
def test_conversions_keep_the_value_and_have_their_adjoints(p: int) -> None:
    random = np.random.default_rng(p)
    groups = {tuple(range(p)), (0,), (p - 1,), tuple(range(p // 2, p)), tuple(range(0, p, 2))}
    for ranks, others in itertools.product(groups, groups):
        for kinds, (rows, width) in itertools.product(itertools.product(KINDS, KINDS), SIZES):
            before, after = lay(kinds[0], ranks), lay(kinds[1], others)
            hops = conversion(before, after, rows, width)
            x = integers(before, rows, width, random, random.integers(-9, 10, (rows, 2, width)))
            wanted = value(before, x, rows, width)
            y = x
            for hop in hops:
                y = carried_out(hop, y)
            np.testing.assert_array_equal(value(after, y, rows, width), wanted)
            for rank in after.ranks if after.kind == "whole" else ():
                np.testing.assert_array_equal(y[rank], wanted)
            # The inner product over all ranks: <Ax, z> = <x, A*z>.
            x, z = integers(before, rows, width, random), integers(after, rows, width, random)
            ax, az = x, z
            for hop in hops:
                ax = carried_out(hop, ax)
            for hop in reversed(hops):
                az = carried_out(hop.adjoint, az)
            assert sum(np.vdot(ax[rank], z[rank]) for rank in after.ranks) == sum(
                np.vdot(x[rank], az[rank]) for rank in before.ranks
            )


def test_a_value_crosses_a_boundary_once_for_each_rank() -> None:
    """And a sum that is wanted whole costs an AllReduce's 2(p−1)/p, a gather (p−1)/p."""
    everyone = (0, 1, 2, 3)

    def sent(before: Layout, after: Layout) -> list[int]:
        hops = conversion(before, after, 8, 12)
        return [sum(move.region.size for hop in hops for move in hop.sent(rank)) for rank in everyone]

    assert sent(lay("whole", (0,)), lay("whole", (1, 2))) == [2 * 96, 0, 0, 0]
    assert sent(lay("whole", (0,)), lay("samples", (1, 2))) == [96, 0, 0, 0]
    assert sent(lay("samples", everyone), lay("whole", everyone)) == [3 * 24] * 4
    assert sent(lay("partial", everyone), lay("samples", everyone)) == [3 * 24] * 4
    assert sent(lay("partial", everyone), lay("whole", everyone)) == [6 * 24] * 4
    assert sent(lay("features", everyone), lay("samples", everyone)) == [3 * 6] * 4
    assert sent(lay("whole", everyone), lay("samples", everyone)) == [0] * 4
    assert sent(lay("samples", everyone), lay("partial", everyone)) == [0] * 4


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 8])
def test_schedules_come_to_their_end_in_the_time_that_is_known(stages: int, microbatches: int) -> None:
    passes = 2 * (microbatches + stages - 1)
    assert check(SCHEDULES["gpipe"], stages, microbatches) == Course(passes, [microbatches] * stages)
    course = check(SCHEDULES["one_forward_one_backward"], stages, microbatches)
    assert course.passes == passes
    assert course.held == [min(stages - stage, microbatches) for stage in range(stages)]


def test_a_schedule_that_cannot_be_is_found() -> None:
    with pytest.raises(ValueError, match="stage 0 must run each micro-batch once forward and once backward"):
        check(lambda stage, stages, microbatches: [Task(False, 0)], 1, 1)
    with pytest.raises(ValueError, match="tasks wait for each other for ever"):
        check(lambda stage, stages, microbatches: [Task(True, 0), Task(False, 0)], 2, 1)


@pytest.mark.parametrize("pieces", [(3, 3, 4), (4, 3), (0, 2), (300, 300, 213), (600, 600), (700, 701, 2), (250,) * 30])
def test_weights_gradients_are_the_sum_of_the_pieces_products(pieces: tuple[int, ...]) -> None:
    """Whenever products are made, to the bit."""
    random = np.random.default_rng(0)
    factors = [Product(random.standard_normal((rows, 5)), random.standard_normal((rows, 7))) for rows in pieces]
    wanted = sum(dy.T @ x for dy, x in factors)
    weights = WeightGradients()
    found = []
    for every in (1, 3, 100):
        gradients: dict[str, Any] = {}
        weights.begin(gradients)
        for number, product in enumerate(factors):
            copies = Product(product.dy.copy(), product.x.copy())
            weights.add("w", copies)
            copies.dy[...], copies.x[...] = 0, 0
            if number % every == every - 1:
                weights.make_one()
        weights.finish()
        np.testing.assert_allclose(gradients["w"], wanted, rtol=0, atol=1e-11)
        found.append(gradients["w"])
    assert all((each == found[0]).all() for each in found)


def test_products_do_not_depend_on_the_steps_before() -> None:
    """A step of larger micro-batches leaves room for more of them."""
    random = np.random.default_rng(0)
    larger, *factors = (
        Product(random.standard_normal((rows, 5)), random.standard_normal((rows, 7))) for rows in [700] + [200] * 6
    )
    found = []
    for before in ([], [larger]):
        weights = WeightGradients()
        gradients: dict[str, Any] = {}
        for mine, products in (({}, before), (gradients, factors)):
            weights.begin(mine)
            for product in products:
                weights.add("w", product)
            weights.finish()
        found.append(gradients["w"])
    np.testing.assert_array_equal(*found)


def placed(placement: Any, ranks: int, model: Any = None) -> dict[str, Placed]:
    model = model or bitring.CNN((8, 8), 10)
    x = model.arranged(np.zeros((1, *model.input_shape), np.float32))
    shapes = {**value_shapes(model.nodes, model.parameters, x, np), INPUT: x.shape[1:]}
    return {each.node.name: each for each in assign(placement, model.nodes, shapes, ranks)}


def test_hybrid_is_convolutions_by_samples_and_dense_layers_in_turn() -> None:
    found = placed("hybrid", 3)
    everyone = (0, 1, 2)
    assert {name: each.split for name, each in found.items()} == {
        **dict.fromkeys(("conv1", "maxpool2", "relu3", "conv2", "maxpool5", "relu6", "flatten7"), "samples"),
        "dense1": "columns",
        "relu9": "features",
        "dense2": "rows",
    }
    assert found["dense1"].takes == lay("whole", everyone) and found["dense1"].gives == lay("features", everyone)
    assert found["dense2"].gives == lay("partial", everyone)
    assert {each.takes.ranks for each in placed("data", 1).values()} == {(0,)}


def test_stages_of_about_equal_computing_and_by_name() -> None:
    def stages(placement: Any, ranks: int) -> list[int]:
        return [each.stage for each in placed(placement, ranks).values()]

    assert stages(bitring.Placement(stages=2), 2) == [0] * 7 + [1] * 3
    assert stages(bitring.Placement(stages=[("conv1", "conv2"), ("dense1", "dense2")]), 2) == [0] * 7 + [1] * 3
    model = bitring.MLP((64,), 64, (64, 64, 64, 64, 64))
    for count in range(1, 7):
        found = [each.stage for each in placed(bitring.Placement(stages=count), count, model).values()]
        layers = [found[i] for i in range(0, 11, 2)]
        assert found == sorted(found) and set(found) == set(range(count))
        assert max(map(layers.count, layers)) == -(-6 // count)


def test_predicted_seconds_tell_placements_apart() -> None:
    """On a slow network: convolutions by samples and dense layers split; a deep net of wide layers as a pipeline."""
    gigabit = Link(5e-5, 8e-9)
    deep = bitring.MLP((512,), 512, (512,) * 7)
    for model, samples, best in (
        (bitring.CNN((28, 28), 10), 64, "hybrid"),
        (deep, 512, "Placement"),
        (bitring.MLP((64,), 10, (32, 32)), 4096, "data"),
    ):
        x = model.arranged(np.zeros((1, *model.input_shape), np.float32))
        shapes = {**value_shapes(model.nodes, model.parameters, x, np), INPUT: x.shape[1:]}
        way: Any = Way(MPI.COMM_SELF, (0, 1, 2, 3), 0, 0, shapes, np.dtype(np.float32), None)
        found = {
            repr(each): seconds_of(model, way, each, 1, samples, gigabit, gigabit)
            for each in considered(len(way.ranks))
        }
        assert min(found, key=found.__getitem__).strip("'").startswith(best), found


def test_messages_that_one_call_of_the_library_cannot_carry_are_pythons() -> None:
    """2 GiB, of values or of their payloads, which may be longer."""
    model = bitring.MLP((4,), 4, (4,))
    shapes = {**value_shapes(model.nodes, model.parameters, np.zeros((1, 4), np.float32), np), INPUT: (4,)}
    wiring = Wiring(assign({"dense1": 0, "dense2": 1}, model.nodes, shapes, 2), shapes, [1])
    cases: list[tuple[int, Any, bool]] = [
        (2**26, None, True),
        (2**27, None, False),
        (2**26, SimpleNamespace(has_functions=True, nbytes=lambda values: 9 * values), False),
        (2**26, SimpleNamespace(has_functions=True, nbytes=lambda values: 2 * values), True),
    ]
    for samples, encoder, native in cases:
        way: Any = Way(MPI.COMM_SELF, (0, 1), 0, 0, shapes, np.dtype(np.float32), encoder)
        assert serves(way, StepHops(wiring, samples)) == (native and extension is not None), (samples, encoder)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("both", "placement must be 'data', 'hybrid', 'hybrid_in_turns', 'auto', a Placement, or a dict of layer -> "),
        ({"dense9": "rows"}, "placement['dense9']: no such layer; known: conv1, "),
        ({"dense1": 2}, "placement['dense1'] must be a rank of a replica, from 0 to 1; got 2"),
        ({"dense1": "whole"}, "placement['dense1'] must be 'samples', 'columns', 'rows' or a rank; got 'whole'"),
        ({"conv1": "columns"}, "placement['conv1']: only dense layers are split by columns; got one of Conv"),
        (bitring.Placement(stages=3), "placement has 3 stages, one rank each; a replica has 2 ranks"),
        (bitring.Placement(stages=[("conv1",), ("dense1", "dense2")]), "layer 'conv2' is in no stage"),
        (bitring.Placement(stages=[("conv1",), ("conv1",)]), "layer 'conv1' is in two stages"),
        (bitring.Placement(stages=[("conv1",), ("relu",)]), "no layer 'relu'; known: conv1, conv2, dense1, dense2"),
        (
            bitring.Placement(stages=[("dense1", "dense2"), ("conv1", "conv2")]),
            "dense1 in stage 0 takes flatten7 of a later one, stage 1",
        ),
    ],
)
def test_placements_that_cannot_be(placement: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        placed(placement, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stages": 0}, ValueError, "Placement: stages must be at least 1; got 0"),
        ({"stages": "ab"}, TypeError, "Placement: stages must be an int; got str"),
        ({"stages": [()]}, ValueError, "Placement: stages must be one or more, of one layer or more each"),
        ({"stages": 2, "microbatches": 0}, ValueError, "Placement: microbatches must be at least 1; got 0"),
        (
            {"stages": 2, "schedule": "zigzag"},
            ValueError,
            "schedule must be one of 'gpipe', 'one_forward_one_backward'",
        ),
    ],
)
def test_arguments_of_a_placement(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        bitring.Placement(**arguments)
