"""L-BFGS from dot products: its direction, its line search, and as many evaluations as SciPy's."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

import bitring
from bitring.errors import NonFiniteError
from bitring.training.lbfgs import EVALUATIONS, Accept, Combine, Evaluate, History, Measure, direction, iteration
from bitring.training.line_search import CURVATURE, DECREASE, LineSearch
from bitring.training.shard import Shard, held_by, parts_for
from bitring.training.sum_tree import SumTree

pytestmark = pytest.mark.single


class Vectors:
    """The shards of ``ranks`` ranks, which obey an iteration's commands in place of messages."""

    def __init__(self, fun: Any, w: Any, memory: int, ranks: int = 1) -> None:
        self.fun, self.ranks = fun, ranks
        self.shards = [Shard(w[held_by(r, ranks, w.size)], memory, r, ranks, w.size) for r in range(ranks)]
        self.history = History(memory)
        self.cuts = [held_by(r, ranks, w.size) for r in range(ranks)]

    @property
    def w(self) -> Any:
        return np.concatenate([shard.w for shard in self.shards])

    @property
    def direction(self) -> Any:
        return np.concatenate([shard._direction for shard in self.shards])

    def summed(self, answers: list[Any]) -> Any:
        tree = SumTree(parts_for(self.ranks))
        for shard, rows in zip(self.shards, answers, strict=True):
            for node, values in zip(shard.nodes, rows, strict=True):
                tree.add(node, values.copy())
        return tree.total

    def obey(self, command: Any) -> Any:
        if isinstance(command, Evaluate):
            loss, gradient = self.fun(np.concatenate([shard.point(command.step) for shard in self.shards]))
            parts = zip(self.shards, self.cuts, strict=True)
            return loss, float(self.summed([shard.slope(gradient[cut]) for shard, cut in parts])[0])
        if isinstance(command, Measure):
            return self.summed([shard.measure() for shard in self.shards])
        if isinstance(command, Accept):
            return self.summed([shard.accept(command.keep) for shard in self.shards])
        for shard in self.shards:
            if isinstance(command, Combine):
                shard.combine(command.coefficients)
            else:
                shard.forget()
        return None

    def iterate(self, new_batch: bool = False) -> float:
        run, answer = iteration(self.history, new_batch or math.isnan(self.history.loss)), None
        try:
            while True:
                answer = self.obey(run.send(answer))
        except StopIteration as end:
            return float(end.value)


def two_loops(s: Any, y: Any, g: Any) -> Any:
    """−H·g as Nocedal and Wright have it, with vectors."""
    q, alphas = g.copy(), []
    for a, b in zip(reversed(s), reversed(y), strict=True):
        alphas.append(a @ q / (a @ b))
        q -= alphas[-1] * b
    if len(s):
        q *= s[-1] @ y[-1] / (y[-1] @ y[-1])
    for a, b, alpha in zip(s, y, reversed(alphas), strict=True):
        q += (alpha - b @ q / (a @ b)) * a
    return -q


def rosenbrock(w: Any) -> tuple[float, Any]:
    return float(scipy.optimize.rosen(w)), scipy.optimize.rosen_der(w)


@pytest.mark.parametrize("memory", range(11))
def test_direction_is_that_of_two_loops(memory):
    rng = np.random.default_rng(memory)
    curvature = np.exp(rng.uniform(-3, 3, 500))
    s = [rng.standard_normal(500) for _ in range(memory)]
    y = [curvature * each for each in s]
    g = rng.standard_normal(500)
    basis = np.array([*s, *y, g])
    wanted = two_loops(s, y, g)
    got = direction(basis @ basis.T) @ basis
    assert np.linalg.norm(got - wanted) <= 1e-12 * np.linalg.norm(wanted)


@pytest.mark.parametrize("ranks", range(1, 8))
@pytest.mark.parametrize("memory", [0, 1, 3, 10])
def test_every_direction_of_a_run_is_that_of_two_loops(ranks, memory):
    w = np.random.default_rng(1).uniform(-1, 1, 61)
    vectors = Vectors(rosenbrock, w, memory, ranks)
    for _ in range(14):
        s = [np.concatenate([shard.s[i] for shard in vectors.shards]) for i in range(vectors.history.pairs)]
        y = [np.concatenate([shard.y[i] for shard in vectors.shards]) for i in range(vectors.history.pairs)]
        g = rosenbrock(vectors.w)[1]
        vectors.iterate()
        wanted = two_loops(s, y, g)
        assert np.linalg.norm(vectors.direction - wanted) <= 1e-12 * np.linalg.norm(wanted)
    assert vectors.history.pairs == memory
    assert vectors.history.restarts == 0


def test_any_number_of_shards_gives_the_same_bits():
    w = np.random.default_rng(2).uniform(-1, 1, 100_003)
    results = []
    for ranks in (1, 2, 3, 5, 8):
        vectors = Vectors(rosenbrock, w, 5, ranks)
        losses = [vectors.iterate() for _ in range(8)]
        results.append((losses, vectors.w.tobytes(), vectors.history.gram.tobytes()))
    assert all(result == results[0] for result in results)


def test_gram_matrix_is_that_of_the_vectors():
    vectors = Vectors(rosenbrock, np.linspace(-1, 1, 30), 3, 2)
    for _ in range(7):
        vectors.iterate()
        k, history = vectors.history.pairs, vectors.history
        whole = [
            np.concatenate(each)
            for each in zip(*([*shard.s, *shard.y, shard.g] for shard in vectors.shards), strict=True)
        ]
        used = history.gram[np.ix_(history.basis, history.basis)]
        np.testing.assert_allclose(used, np.array(whole) @ np.array(whole).T, rtol=1e-13)
        assert len(whole) == 2 * k + 1


@pytest.mark.parametrize("name", ["softmax", "mlp"])
def test_as_many_evaluations_as_scipy(name):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((150, 12))
    y = (x @ rng.standard_normal((12, 4)) + rng.standard_normal((150, 4))).argmax(1)
    ratios = []
    for seed in range(5):
        hidden: Any = {"hidden": (8,)} if name == "mlp" else {}
        kind: Any = {"softmax": bitring.Softmax, "mlp": bitring.MLP}[name]
        model = kind((12,), 4, dtype=np.float64, seed=seed, **hidden)
        seen: list[float] = []

        def fun(w: Any, model: Any = model, seen: Any = seen) -> tuple[float, Any]:
            first = 0
            for value in model.parameters.values():
                value[...] = w[first : first + value.size].reshape(value.shape)
                first += value.size
            loss, gradients = model.loss_and_gradients(x, y)
            seen.append(loss + 5e-3 * w @ w)
            return seen[-1], np.concatenate([g.ravel() for g in gradients.values()]) + 1e-2 * w

        start = np.concatenate([w.ravel() for w in model.parameters.values()])
        start = start + 0.1 * np.random.default_rng(seed).standard_normal(start.size)
        options = {"maxcor": 10, "maxiter": 200 if name == "softmax" else 40, "maxfun": 1000, "ftol": 0, "gtol": 1e-7}
        theirs = scipy.optimize.minimize(fun, start, jac=True, method="L-BFGS-B", options=options)
        target = theirs.fun + 1e-6
        needed = next(i for i, loss in enumerate(seen, 1) if loss <= target)
        vectors = Vectors(fun, start, 10)
        loss = math.inf
        while loss > target and vectors.history.evaluations < 2 * needed:
            loss = vectors.iterate()
        ratios.append(vectors.history.evaluations / needed)
        if name == "softmax":  # convex: one minimum
            assert abs(loss - theirs.fun) <= 1e-6
    assert 0.9 <= float(np.median(ratios)) <= 1.1, ratios


@given(st.floats(-2, 2), st.floats(0.01, 100), st.floats(1e-3, 30), st.sampled_from(["quartic", "wavy", "log"]))
def test_line_search_ends_at_a_point_of_both_conditions(bend, scale, first, kind):
    def phi(t: float) -> tuple[float, float]:
        if kind == "quartic":
            return scale * (t**4 / 4 + bend * t**3 / 3 - t), scale * (t**3 + bend * t**2 - 1)
        if kind == "wavy":
            return scale * (0.1 * t * t - np.sin(t)), scale * (0.2 * t - np.cos(t))
        return scale * (-t / (t * t + 2)), scale * (t * t - 2) / (t * t + 2) ** 2

    (loss, slope), tries = phi(0.0), 0
    search = LineSearch(loss, slope, first)
    while not search.tell(*phi(search.step)):
        tries += 1
        assert tries < 2 * EVALUATIONS
    there, slope_there = phi(search.step)
    if search.converged:
        assert there <= loss + DECREASE * search.step * slope
        assert abs(slope_there) <= CURVATURE * abs(slope)
    else:
        assert there < loss


def test_line_search_comes_back_from_where_the_loss_is_no_number():
    def fun(w: Any) -> tuple[float, Any]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(-np.log(1 - w @ w) - w.sum()), 2 * w / (1 - w @ w) - 1

    vectors = Vectors(fun, np.full(4, 0.1), 5)
    losses = [vectors.iterate() for _ in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert np.linalg.norm(fun(vectors.w)[1]) < 1e-6


def test_pairs_that_give_no_descent_are_dropped():
    vectors = Vectors(rosenbrock, np.full(8, -1.0), 4)
    for _ in range(5):
        vectors.iterate()
    vectors.history.gram[-1, :-1] = vectors.history.gram[:-1, -1] = 1e9  # g·s and g·y that are no longer so
    before = vectors.history.loss
    assert vectors.iterate() < before
    assert vectors.history.restarts == 1
    assert len(vectors.shards[0].s) == vectors.history.pairs == 1


def test_a_minimum_is_left_as_it_is():
    vectors = Vectors(lambda w: (float(w @ w), 2 * w), np.zeros(5), 3)
    assert vectors.iterate() == 0
    assert vectors.iterate() == 0
    assert vectors.history.evaluations == 1


def test_where_no_step_lowers_the_loss_it_is_tried_once():
    w = np.arange(1.0, 6.0)
    vectors = Vectors(lambda w: (1.0, 2 * w), w, 3)  # rounding has eaten the loss
    assert [vectors.iterate() for _ in range(3)] == [1.0, 1.0, 1.0]
    assert vectors.history.evaluations <= 1 + EVALUATIONS
    np.testing.assert_array_equal(vectors.w, w)
    before = vectors.history.evaluations
    vectors.fun = lambda w: (float(w @ w), 2 * w)
    assert vectors.iterate(new_batch=True) < 55
    assert vectors.history.evaluations > before


def test_no_number_at_the_beginning_is_an_error():
    bad = [True]
    vectors = Vectors(lambda w: (math.nan if bad[0] else float(w @ w), 2 * w), np.ones(5), 3)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        vectors.iterate()
    bad[0] = False
    assert vectors.iterate(new_batch=True) < 5


def test_settings():
    with pytest.raises(ValueError, match="LBFGS: memory must be 0 to 150; got -1"):
        bitring.LBFGS(memory=-1)
    assert bitring.LBFGS().memory == 10
