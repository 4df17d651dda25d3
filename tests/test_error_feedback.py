"""The residual earns its place: one bit a value trains like the exact exchange with it, and visibly worse without.

Coarse on purpose: one pair of levels for a whole layer, or a sixth of one. Over 8 seeds on 2 ranks the training loss
ended, with feedback, at 0.996 to 1.023 of the exact exchange's, without at 1.92 to 2.08 of it; test accuracy was 0.3
points lower at most, and 1.4 to 5.0.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.compression.encoder import residual_dtype
from bitring.compression.kernels.functions import ENCODE, Functions, address_of
from bitring.training.data_parallel import DataParallel
from bitring.training.optimizers.sgd import SGD

HIDDEN, EPOCHS, LR = 64, 12, 0.5


@functools.cache
def forgetful(encode: int, itemsize: int) -> Any:
    """The C function at ``encode``, but what it leaves as residual, of so many bytes per value, is dropped."""
    function = ENCODE(encode)

    def call(values: int, residual: int, n: int, *rest: int) -> int:
        used: int = function(values, residual, n, *rest)
        if n:
            ctypes.memset(residual, 0, n * itemsize)
        return used

    return ENCODE(call)


@dataclass(frozen=True)
class WithoutFeedback(bitring.OneBit):
    """One bit per value; what it leaves out is lost."""

    def encode(
        self, values: Any, residual: Any, payload: Any, seed: int = 0, shape: tuple[int, ...] | None = None
    ) -> int:
        """For the portable exchange."""
        used = super().encode(values, residual, payload, seed, shape)
        residual[...] = 0
        return used

    def functions(self, dtype: Any) -> Functions:
        """For the native one."""
        kept = super().functions(dtype)
        return kept._replace(encode=address_of(forgetful(kept.encode, residual_dtype(dtype).itemsize)))


def train(comm: Any, compression: Any, seed: int) -> tuple[float, float, float]:
    """The digits; training loss, test accuracy, and the norm of what this rank's residuals hold at the end."""
    data = bitring.load("digits")
    batches = bitring.Batches(data.x_train, data.y_train, 96)
    net = bitring.MLP(data.input_shape, data.classes, hidden=(HIDDEN,), seed=seed)
    trainer = DataParallel(net.parameters, SGD(LR), comm=comm, compression=compression)
    for epoch in range(EPOCHS):
        for x, y in bitring.shard(batches, comm, seed=seed, epoch=epoch):
            trainer.optimizer = SGD(LR * (1 - trainer.steps / len(batches) / EPOCHS))
            trainer.step(net.loss_and_gradients(x, y)[1], weight=len(x))
    state = [plan.state_dict().get("residual", np.zeros(0)) for plan in trainer.plans]  # biases travel exactly
    left = float(np.linalg.norm(np.concatenate(state)))
    trainer.free()
    return float(net.loss_and_gradients(data.x_train, data.y_train)[0]), net.accuracy(data.x_test, data.y_test), left


def test_without_error_feedback_one_bit_is_visibly_worse(comm: Any, agree: Any, request: Any) -> None:
    pytest.importorskip("sklearn")
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    if comm.size > 2 and not request.config.getoption("--all"):
        pytest.skip("two ranks show it; --all tries more")
    block = 10 * HIDDEN  # the last layer
    for seed in range(3 if request.config.getoption("--all") else 1):
        exact, onebit, without = (
            train(comm, compression, seed)
            for compression in (None, bitring.OneBit(block, "block"), WithoutFeedback(block, "block"))
        )
        told = f"seed {seed}: exact {exact}, with feedback {onebit}, without {without}"
        agree(comm, onebit[2] > 0 and without[2] == 0, told)
        agree(comm, exact[1] > 0.94, told)
        agree(comm, onebit[0] < 1.06 * exact[0] and onebit[1] > exact[1] - 0.015, told)
        agree(comm, without[0] > 1.6 * exact[0] and without[1] < exact[1], told)
