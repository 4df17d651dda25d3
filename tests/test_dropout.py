"""Dropout: drawn by sample and step, whatever part of a batch or of a value is computed at once."""

from __future__ import annotations

import numpy as np
import pytest

import bitring
from bitring.launcher import RANK_VARIABLES
from bitring.models.dropout import drawn
from bitring.models.layers import Draw

pytestmark = pytest.mark.single


def test_what_is_drawn_does_not_depend_on_how_the_batch_is_cut() -> None:
    """By samples, by the last axis, and both."""
    whole = drawn(np, (7, 3, 5), Draw(4), 9)
    for rows in (slice(0, 3), slice(3, 7), slice(5, 5)):
        for columns in (slice(0, 5), slice(1, 4), slice(4, 5)):
            mine = whole[rows, :, columns]
            np.testing.assert_array_equal(drawn(np, mine.shape, Draw(4, rows.start, columns.start, 5), 9), mine)
    for others in (drawn(np, (7, 3, 5), Draw(5), 9), drawn(np, (7, 3, 5), Draw(4), 10)):
        assert not (others == whole).any()


def test_the_share_that_is_dropped() -> None:
    """Within 4σ of the rate, over values, and over neighbouring samples and steps alike."""
    for rate in (0.1, 0.5):
        kept = np.array([drawn(np, (64, 100), Draw(step), 0) for step in range(20)]) >= np.uint64(int(rate * 2**64))
        for axis in (None, 0, 1, 2):
            found = 1 - kept.mean(axis)
            sigma = (rate * (1 - rate) * np.size(found) / kept.size) ** 0.5
            assert np.abs(found - rate).max() < (4 if axis is None else 5) * sigma
        both = (kept[:, 1:] & kept[:, :-1]).mean()  # of one sample and the next
        assert abs(both - (1 - rate) ** 2) < 0.01


def model(rate: float) -> bitring.Sequence:
    layers = [bitring.Dense("dense1", 20), bitring.ReLU(), bitring.Dropout(rate, seed=3), bitring.Dense("dense2", 4)]
    return bitring.Sequence(layers, (6,), 4, dtype=np.float64, seed=1)


def test_gradients_are_those_of_the_loss() -> None:
    """By differences, of one draw; and an evaluation drops nothing."""
    random = np.random.default_rng(0)
    x, y = random.standard_normal((5, 6)), random.integers(0, 4, 5)
    dropping, plain = model(0.5), model(0.0)
    draw = bitring.Draw(2, first=10)
    loss, gradients = dropping.loss_and_gradients(x, y, draw=draw)
    assert loss != plain.loss_and_gradients(x, y)[0] and dropping.loss(x, y) == plain.loss(x, y)
    w = dropping.parameters["dense1.weight"]
    for place in ((0, 0), (7, 3), (19, 5)):
        before, ends = w[place], []
        for change in (1e-6, -1e-6):
            w[place] = before + change
            ends.append(dropping.loss_and_gradients(x, y, draw=draw)[0])
        w[place] = before
        assert abs((ends[0] - ends[1]) / 2e-6 - gradients["dense1.weight"][place]) < 1e-8


def test_calls_draw_anew_and_a_draw_again() -> None:
    x, y = np.ones((3, 6)), np.zeros(3, int)
    first, again = model(0.5), model(0.5)
    losses = [first.loss_and_gradients(x, y)[0] for _ in range(3)]
    assert len(set(losses)) == 3 and losses == [again.loss_and_gradients(x, y)[0] for _ in range(3)]
    assert losses[1] == again.loss_and_gradients(x, y, draw=bitring.Draw(1))[0]


def test_each_rank_draws_for_itself(monkeypatch) -> None:
    x, y = np.ones((3, 6)), np.zeros(3, int)
    losses = []
    for rank in range(3):
        monkeypatch.setenv(RANK_VARIABLES[0], str(rank))
        losses.append(model(0.5).loss_and_gradients(x, y)[0])
    assert len(set(losses)) == 3
    assert losses[0] == model(0.5).loss_and_gradients(x, y, draw=bitring.Draw(0))[0]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_that_cannot_be(rate: float) -> None:
    with pytest.raises(ValueError, match="Dropout: rate must be"):
        bitring.Dropout(rate)
