"""Logistic regression by Strads: scikit-learn's objective, and bits on any number of ranks."""

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression as Theirs

import bitring
from bitring.training.logistic_regression import LogisticRegression
from bitring.training.strads import Strads


def problem() -> tuple[Any, Any]:
    """x, and y of the values 3 and 5."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((90, 30)) * (rng.random((90, 30)) < 0.7)
    w = np.zeros(30)
    w[:5] = 2 * rng.standard_normal(5)
    return x, np.where(x @ w + rng.standard_normal(90) > 0, 5, 3)


def objective(x: Any, y: Any, w: Any, penalty: float, ridge: float) -> float:
    margins = np.where(y == 5, 1, -1) * (x @ w)
    return float(np.logaddexp(0, -margins).sum() + penalty * np.abs(w).sum() + 0.5 * ridge * (w**2).sum())


@pytest.mark.single
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize(("penalty", "ridge"), [(2.0, 0.0), (0.0, 1.0), (1.0, 2.0)])
def test_the_objective_of_scikit_learn(comm, agree, kind, penalty, ridge):
    x, y = problem()
    given: Any = x if kind == "dense" else scipy.sparse.csr_array(x)
    program = bitring.LogisticRegression(penalty, ridge)
    fit = Strads(program, comm=comm, width=16, independence=0.3, tolerance=1e-9).fit(given, y)
    solver = {(True, False): "liblinear", (False, True): "lbfgs", (True, True): "saga"}[penalty > 0, ridge > 0]
    theirs = Theirs(
        C=1 / (penalty + ridge),
        l1_ratio=penalty / (penalty + ridge),
        solver=solver,
        fit_intercept=False,
        tol=1e-8,
        max_iter=10_000,
        random_state=0,
    ).fit(x, y)
    best = objective(x, y, theirs.coef_[0], penalty, ridge)
    agree(comm, fit.converged and abs(fit.objective - best) <= 1e-6, f"{fit.objective} {best} {fit.gap}")
    agree(comm, abs(objective(x, y, fit.coefficients, penalty, ridge) - fit.objective) <= 1e-9)
    agree(comm, fit.objective - fit.gap <= best + 1e-12, "the gap is no bound")


@pytest.mark.single
def test_the_objective_falls_with_every_round_on_independent_columns(comm, agree):
    """The parabola is above the objective: a step along one coordinate cannot raise it."""
    x, y = problem()
    fit = Strads(LogisticRegression(1.0), comm=comm, width=1, updates=200).fit(x, y)
    objectives = [each.objective for each in fit.history]
    agree(comm, all(after <= before + 1e-12 for before, after in itertools.pairwise(objectives)))
    agree(comm, objectives[-1] < 0.9 * objectives[0])


def test_the_same_bits_on_any_number_of_ranks(comm, agree):
    from mpi4py import MPI

    x, y = problem()
    fits = [
        Strads(LogisticRegression(1.0), comm=each, width=8, updates=300).fit(x, y) for each in (comm, MPI.COMM_SELF)
    ]
    agree(comm, fits[0].coefficients.tobytes() == fits[1].coefficients.tobytes())
    agree(comm, fits[0].coefficients.any())


@pytest.mark.single
def test_at_the_zeroing_penalty_all_are_zero_and_below_not(comm, agree):
    x, y = problem()
    for program in (LogisticRegression(), bitring.Lasso()):
        most = program.zeroing(x, y)
        for share, zero in ((1.001, True), (0.9, False)):
            fit = Strads(type(program)(share * most), comm=comm).fit(x, y)
            agree(comm, (not fit.coefficients.any()) == zero, f"{program} {share}")


def test_y_of_other_than_two_values(comm):
    x, y = problem()
    with pytest.raises(ValueError, match="LogisticRegression: y must have two different values; got 1"):
        Strads(LogisticRegression(), comm=comm).fit(x, np.ones_like(y))
    with pytest.raises(ValueError, match="two different values; got 3"):
        Strads(LogisticRegression(), comm=comm).fit(x, np.arange(90) % 3)
