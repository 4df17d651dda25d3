"""Arrays packed and updated in one native call: the bits are NumPy's, and what it is not for it leaves alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitring import SGD, AdaGrad
from bitring.native import address_of, extension, native, type_of
from bitring.training.optimizer import Elementwise

pytestmark = [pytest.mark.single, pytest.mark.skipif(native() is None, reason="the native engine alone packs")]

SHAPES = ((3, 5), (), (0,), (70_001,), (7,))
PACKED, NOT_FINITE, DECLINED = 1, 0, -1


def arrays_of(dtype: Any, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [np.asarray(random.standard_normal(shape)).astype(dtype) for shape in SHAPES]


def packer_of(flat: Any) -> Any:
    kind: Any = type_of(flat.dtype)
    return extension.Packer(kind, address_of(flat), list(SHAPES), flat)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1e-40])
def test_products_are_numpys(dtype: str, scale: float) -> None:
    arrays = arrays_of(dtype)
    flat = np.full(sum(each.size for each in arrays), 7, dtype)
    assert packer_of(flat).pack(arrays, scale) == PACKED
    assert flat.tobytes() == (np.concatenate(arrays, axis=None) * scale).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1, 3, 4])
def test_one_that_is_not_finite_is_seen(dtype: str, bad: float, which: int) -> None:
    arrays = arrays_of(dtype)
    flat = np.empty(sum(each.size for each in arrays), dtype)
    arrays[which].reshape(-1)[-1] = bad
    assert packer_of(flat).pack(arrays, 0.5) == NOT_FINITE
    arrays[which].reshape(-1)[-1] = np.finfo(dtype).max
    assert packer_of(flat).pack(arrays, 0.5) == PACKED


def test_other_arrays_are_left_alone() -> None:
    arrays = arrays_of(np.float32)
    flat = np.full(sum(each.size for each in arrays), 7, np.float32)
    packer = packer_of(flat)
    for given in (
        arrays[1:],
        [*arrays, arrays[0]],
        [arrays[0].reshape(5, 3), *arrays[1:]],
        [*arrays[:-1], np.zeros(14, np.float32)[::2]],
        [np.asfortranarray(arrays[0]), *arrays[1:]],
        [*arrays[:-1], np.zeros(7, np.float64)],
        [*arrays[:-1], np.zeros(7, ">f4")],
        [*arrays[:-1], np.zeros(7, ml_dtypes.bfloat16)],
        [*arrays[:-1], None],
    ):
        assert packer.pack(given, 0.5) == DECLINED
        assert (flat == 7).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(0.1),
        SGD(0.1, weight_decay=0.3),
        SGD(0.1, 0.9),
        SGD(0.1, 0.9, nesterov=True, weight_decay=1e-3),
        AdaGrad(0.1),
    ],
)
def test_updates_are_numpys(monkeypatch: pytest.MonkeyPatch, optimizer: Any, dtype: str) -> None:
    both = []
    for natively in (True, False):
        parameters = {str(i): each for i, each in enumerate(arrays_of(dtype))}
        state = optimizer.init(parameters)
        for step in range(1, 4):
            gradients = {str(i): each for i, each in enumerate(arrays_of(dtype, step))}
            gradients["0"][0, 0], gradients["4"][:3] = np.inf, (-0.0, np.finfo(dtype).max, 1e-40)
            with monkeypatch.context() as patch, np.errstate(all="ignore"):
                if natively:
                    patch.setattr(Elementwise, "_update_alone", None)
                    patch.setattr(Elementwise, "_update_together", None)
                else:
                    patch.setattr(Elementwise, "update_natively", lambda *given: False)
                optimizer.update(parameters, gradients, state)
        values = [*parameters.values(), *(array for slot in optimizer.slots for array in state[slot].values())]
        both.append([np.where(np.isnan(each), np.asarray(0, dtype), each).tobytes() for each in values])
        both[-1].append([np.isnan(each).tolist() for each in values])
    assert both[0] == both[1]


@pytest.mark.parametrize("kind", ["strided", "fortran", "shared", "bfloat16"])
def test_other_parameters_are_updated_by_numpy(kind: str) -> None:
    dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else np.float32
    w, g = np.ones((4, 6), dtype), np.full((4, 6), 0.5, dtype)
    if kind == "strided":
        g = np.full((4, 12), 0.5, dtype)[:, ::2]
    if kind == "fortran":
        w = np.asfortranarray(w)
    if kind == "shared":
        g = w
    optimizer = SGD(0.5)
    optimizer.update({"w": w}, {"w": g}, optimizer.init({"w": w}))
    assert (w == (0.5 if kind == "shared" else 0.75)).all()


def test_a_read_only_parameter_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    w, other = np.ones(4, np.float32), np.ones(4, np.float32)
    other.flags.writeable = False
    optimizer = SGD(0.5)
    with pytest.raises(ValueError, match="read-only"):
        optimizer.update({"other": other, "w": w}, {"other": other * 1, "w": w * 1}, {})
    assert (other == 1).all()
