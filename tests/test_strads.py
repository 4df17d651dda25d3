"""Strads and its Lasso: scikit-learn's objective, the same choices on any number of ranks, what scheduling is for."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import ElasticNet

import bitring
from bitring.errors import MismatchError
from bitring.training.lasso import Lasso
from bitring.training.strads import Strads


def problem(rows: int = 120, features: int = 90, common: float = 0.0) -> tuple[Any, Any, float]:
    """x, y and a penalty. ``common``: the share of the columns' variance that ten neighbours have in common."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, features)) * np.sqrt(1 - common)
    x += np.sqrt(common) * np.repeat(rng.standard_normal((rows, -(-features // 10))), 10, axis=1)[:, :features]
    w = np.zeros(features)
    w[: features // 10] = rng.standard_normal(features // 10)
    y = x @ w + 0.1 * rng.standard_normal(rows)
    return x, y, 0.05 * float(np.abs(x.T @ y).max())


def objective(x: Any, y: Any, w: Any, penalty: float, ridge: float = 0.0) -> float:
    return float(0.5 * ((y - x @ w) ** 2).sum() + penalty * np.abs(w).sum() + 0.5 * ridge * (w**2).sum())


def theirs(x: Any, y: Any, penalty: float, ridge: float = 0.0) -> float:
    both, rows = penalty + ridge, len(y)
    net = ElasticNet(alpha=both / rows, l1_ratio=penalty / both, fit_intercept=False, tol=1e-12, max_iter=100_000)
    return objective(x, y, net.fit(x, y).coef_, penalty, ridge)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("ridge", [0.0, 2.0])
def test_the_objective_of_scikit_learn(comm, agree, kind, ridge):
    x, y, penalty = problem()
    if kind == "sparse":
        x = x * (np.abs(x) > 1)
    given: Any = x if kind == "dense" else scipy.sparse.csr_array(x)
    fit = Strads(Lasso(penalty, ridge), comm=comm, width=16).fit(given, y)
    agree(comm, fit.converged and abs(fit.objective - theirs(x, y, penalty, ridge)) <= 1e-6)
    agree(comm, abs(objective(x, y, fit.coefficients, penalty, ridge) - fit.objective) <= 1e-9 * fit.objective)


@pytest.mark.parametrize("priority", [True, False])
def test_the_same_choices_and_bits_on_any_number_of_ranks(comm, agree, priority):
    from mpi4py import MPI

    x, y, penalty = problem()
    fits = [
        Strads(Lasso(penalty), comm=which, width=8, priority=priority, seed=4, updates=600).fit(x, y)
        for which in (comm, MPI.COMM_SELF)
    ]
    agree(comm, fits[0].coefficients.tobytes() == fits[1].coefficients.tobytes())
    agree(comm, [list(each) for each in fits[0].chosen] == [list(each) for each in fits[1].chosen])
    other = Strads(Lasso(penalty), comm=comm, width=8, priority=priority, seed=5, updates=600).fit(x, y)
    agree(comm, [list(each) for each in other.chosen] != [list(each) for each in fits[0].chosen])


def test_dependent_columns_are_not_changed_together(comm, agree):
    x, y, penalty = problem(common=0.9)
    lengths = np.sqrt((x**2).sum(0))
    cosines = np.abs(x.T @ x) / np.outer(lengths, lengths)
    x[:, ::2] *= -1  # half of the cosines are negative now
    fit = Strads(Lasso(penalty), comm=comm, width=32, independence=0.4).fit(x, y)
    for chosen in fit.chosen:
        among = cosines[np.ix_(chosen, chosen)].copy()
        np.fill_diagonal(among, 0)
        agree(comm, float(among.max(initial=0)) <= 0.4 + 1e-6)
    agree(comm, any(len(chosen) > 1 for chosen in fit.chosen))
    agree(comm, abs(fit.objective - theirs(x, y, penalty)) <= 1e-6)
    with pytest.raises(FloatingPointError, match="columns that depend on each other are changed together"):
        Strads(Lasso(penalty), comm=comm, width=32, independence=1.0).fit(x, y)


@pytest.mark.single
def test_priority_saves_updates(comm, agree):
    x, y, penalty = problem(rows=100, features=150)
    best = theirs(x, y, penalty)
    needed: dict[bool, list[int]] = {}
    for priority in (True, False):
        for width in (8, 16):
            fit = Strads(Lasso(penalty), comm=comm, width=width, priority=priority, tolerance=1e-7).fit(x, y)
            there = next(each.updates for each in fit.history if each.objective <= best * (1 + 1e-6))
            needed.setdefault(priority, []).append(there)
    agree(comm, min(needed[True]) <= 0.7 * min(needed[False]), str(needed))


def test_a_program_of_ones_own(comm, agree):
    """Least squares, with a schedule that does not look at priorities."""

    class Shuffled(Lasso):
        def schedule(self, random: Any, priorities: Any, width: int) -> Any:
            return random.permutation(len(priorities))[:width]

    x, y, _ = problem(rows=60, features=20)
    fit = Strads(Shuffled(penalty=0.0), comm=comm, width=4, independence=0.3).fit(x, y)
    wanted = np.linalg.lstsq(x, y, rcond=None)[0]
    agree(comm, float(np.abs(fit.coefficients - wanted).max()) < 1e-3)


def test_a_width_beyond_the_features_is_theirs(comm, agree):
    x, y = np.random.default_rng(0).standard_normal((20, 6)), np.arange(20.0)
    wide = bitring.Strads(bitring.Lasso(1.0), comm=comm, width=10**6).fit(x, y)  # whose products would be terabytes
    fit = bitring.Strads(bitring.Lasso(1.0), comm=comm, width=6).fit(x, y)
    agree(comm, wide.coefficients.tobytes() == fit.coefficients.tobytes() and wide.updates == fit.updates)


def test_odd_shapes(comm, agree):
    rng = np.random.default_rng(0)
    for rows, features in ((1, 1), (2, 5), (5, 1), (17, 3)):
        x, y = rng.standard_normal((rows, features)), rng.standard_normal(rows)
        x[:, 0] = 0 if features > 1 else x[:, 0]
        fit = Strads(bitring.Lasso(penalty=0.01), comm=comm).fit(x, y)
        agree(comm, fit.converged and abs(fit.objective - theirs(x, y, 0.01)) <= 1e-6, f"{rows}, {features}")
    zero = Strads(bitring.Lasso(penalty=1e6), comm=comm).fit(x, y)
    agree(comm, not zero.coefficients.any() and zero.converged)
    for kind in (scipy.sparse.lil_array, scipy.sparse.dok_array):  # which have no array of their values
        again = Strads(bitring.Lasso(penalty=0.01), comm=comm).fit(kind(x), y)
        agree(comm, abs(again.objective - fit.objective) <= 1e-12, kind.__name__)


def test_mistakes_are_raised_on_all_ranks(comm):
    x, y, penalty = problem(rows=20, features=5)
    last = comm.rank == comm.size - 1
    with pytest.raises(TypeError, match=r"Strads: program must be one such as bitring\.Lasso; got SGD"):
        bitring.Strads(bitring.SGD() if last else Lasso(penalty), comm=comm)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Strads: independence must be 0 to 1; got 2"):
        Strads(Lasso(penalty), comm=comm, independence=2)
    with pytest.raises(ValueError, match=r"Strads\.fit: y must have shape \(20,\)"):
        Strads(Lasso(penalty), comm=comm).fit(x, y[: 3 if last else None])
    with pytest.raises(ValueError, match=r"Strads\.fit: x and y must be finite"):
        Strads(Lasso(penalty), comm=comm).fit(x * (np.nan if last else 1.0), y)
    if comm.size > 1:
        with pytest.raises(MismatchError, match="Strads: seed is"):
            Strads(Lasso(penalty), comm=comm, seed=comm.rank)
        with pytest.raises(MismatchError, match=r"Strads\.fit: the digest of y is"):
            Strads(Lasso(penalty), comm=comm).fit(x, y[:: -1 if last else 1])
