"""Synchronous training, exact and compressed; what all modes share: checks, errors, buckets, state."""

import dataclasses
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import other_libraries as tensors
import pytest
from other_libraries import Immutable

from bitring.collectives.schedules.schedule import algorithms
from bitring.compression.factors import Factors
from bitring.errors import MismatchError, NonFiniteError, PeerError
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import save_checkpoint
from bitring.training.data_parallel import DataParallel
from bitring.training.lbfgs import LBFGS
from bitring.training.mode import modes
from bitring.training.modes.block_momentum import BlockMomentum
from bitring.training.modes.local import Local
from bitring.training.optimizers.adagrad import AdaGrad
from bitring.training.optimizers.sgd import SGD

# A multilayer perceptron: 20 -> 30 -> 5, softmax and cross-entropy.


def new_mlp(dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (20, 30), "b1": (30,), "w2": (30, 5), "b2": (5,)}
    return {name: (rng.standard_normal(shape) * 0.3).astype(dtype) for name, shape in shapes.items()}


@np.errstate(invalid="ignore")  # OpenBLAS computes with what is behind small matrices, too
def mlp_gradients(p, x, y):
    """Gradients of the mean loss over the samples; zeros when there are none."""
    h = np.tanh(x @ p["w1"] + p["b1"])
    logits = h @ p["w2"] + p["b2"]
    e = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    d = e / e.sum(axis=1, keepdims=True)
    d[np.arange(len(y)), y] -= 1
    d /= max(len(y), 1)
    dh = (d @ p["w2"].T) * (1 - h**2)
    return {"w1": x.T @ dh, "b1": dh.sum(axis=0), "w2": h.T @ d, "b2": d.sum(axis=0)}


def batches(dtype, steps, batch=23):
    rng = np.random.default_rng(1)
    for _ in range(steps):
        yield rng.standard_normal((batch, 20)).astype(dtype), rng.integers(0, 5, batch)


def parts(n, size, step):
    """Unequal parts of a batch, cut differently in every step; some are empty."""
    return np.sort(np.concatenate([[0], np.random.default_rng(step).integers(0, n + 1, size - 1), [n]]))


def raised(call, *arguments, **named):
    """The exception that a call raises, so that its text can be judged on all ranks together."""
    try:
        call(*arguments, **named)
    except Exception as error:
        return error
    return None


def describes(error, kind, *texts):
    return type(error) is kind and all(text in str(error) for text in texts)


class Tensor:
    """Another library's array: nothing but DLPack."""

    def __init__(self, array, shares=True):
        self._array, self._shares = array, shares

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, copy=None, **options):
        if copy is False and not self._shares:
            raise BufferError("it would be a copy")
        return self._array.__dlpack__(copy=copy, **options)


def snapshot(trainer):
    """All of a rank's state as bytes."""

    def flat(x):
        if isinstance(x, dict):
            return {key: flat(value) for key, value in x.items()}
        if isinstance(x, list):
            return [flat(value) for value in x]
        return x.tobytes() if isinstance(x, np.ndarray) else x

    return flat({key: value for key, value in trainer.state_dict().items() if key != "steps"})


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(lr=0.1),
        SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
        AdaGrad(lr=0.05, eps=1e-6, weight_decay=1e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)], ids=["f4", "f8"])
def test_equals_one_process_with_the_same_batches(comm, agree, dtype, tolerance, optimizer):
    alone = new_mlp(dtype)
    state = optimizer.init(alone)
    together = new_mlp(dtype, seed=comm.rank)
    trainer = DataParallel(together, optimizer, comm=comm, bucket_bytes=1000)
    for step, (x, y) in enumerate(batches(dtype, 50)):
        optimizer.update(alone, mlp_gradients(alone, x, y), state)
        cuts = parts(len(y), comm.size, step)
        mine = slice(cuts[comm.rank], cuts[comm.rank + 1])
        trainer.step(mlp_gradients(together, x[mine], y[mine]), weight=len(y[mine]))
    for name, w in alone.items():
        error = np.linalg.norm(together[name] - w) / np.linalg.norm(w)
        agree(comm, error <= tolerance, f"{name}: {error}")
    agree(comm, trainer.steps == 50)
    trainer.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
@pytest.mark.parametrize("mode", ["sync", "local"])
def test_tensors_of_other_libraries(comm, agree, mode, compression):
    """They train as arrays do, bit for bit, in their own memory; also where gradients are views, or have no axes."""
    arrays = {"a": np.ones((40, 60), np.float32), "b": np.ones((), np.float32)}
    shared = {name: w.copy() for name, w in arrays.items()}
    tensors = {name: Tensor(w) for name, w in shared.items()}
    trainers = [
        DataParallel(parameters, SGD(momentum=0.9), comm=comm, mode=mode, compression=compression)
        for parameters in (arrays, tensors)
    ]
    rng = np.random.default_rng(comm.rank)
    for _ in range(5):
        gradients = {"a": rng.standard_normal((60, 40)).astype(np.float32).T, "b": np.ones((), np.float32)}
        trainers[0].step(gradients)
        trainers[1].step({name: Tensor(g) for name, g in gradients.items()})
    for trainer in trainers:
        trainer.synchronize()
    same = all(np.array_equal(shared[name], arrays[name]) for name in arrays)
    agree(comm, same and trainers[0].digest() == trainers[1].digest())
    agree(comm, (shared["a"] != 1).all() and np.shares_memory(trainers[1].parameters["a"], shared["a"]))
    for trainer in trainers:
        trainer.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
@pytest.mark.parametrize("algorithm", ["auto", *algorithms.names()])
def test_replicas_are_equal_after_every_step(comm, agree, algorithm, compression):
    rng = np.random.default_rng(comm.rank)
    parameters = {
        "a": rng.standard_normal((40, 60)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float32),
        "c": rng.standard_normal(3001),
    }
    trainer = DataParallel(
        parameters, SGD(lr=0.1, momentum=0.9), comm=comm, algorithm=algorithm, compression=compression
    )
    for step in range(6):
        gradients = {name: rng.standard_normal(w.shape).astype(w.dtype) for name, w in parameters.items()}
        trainer.step(gradients, weight=float((comm.rank + step) % 3 + 0.5))
        agree(comm, len(set(comm.allgather(trainer.digest()))) == 1, f"step {step}")
    trainer.free()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("compression", [None, "onebit"])
def test_every_dtype(comm, agree, dtype, compression):
    w = np.zeros(2500, dtype)
    trainer = DataParallel({"w": w}, SGD(lr=1.0), comm=comm, compression=compression)
    trainer.step({"w": np.full(2500, comm.rank + 1, dtype)}, weight=comm.rank + 1)
    ranks = np.arange(1, comm.size + 1)
    expected = (ranks * ranks).sum() / ranks.sum()
    agree(comm, np.allclose(w.astype(float), -expected, rtol=2e-2 if w.itemsize == 2 else 1e-6), str(w[:3]))
    trainer.free()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_error_feedback_loses_nothing(comm, agree, dtype):
    """With plain SGD at learning rate 1: what was applied, plus all residuals, is the sum of the gradients."""
    rng = np.random.default_rng(comm.rank)
    shapes = {"a": (50, 41), "b": (1024,), "c": (1500,)}
    parameters = {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
    trainer = DataParallel(parameters, SGD(lr=1.0), comm=comm, compression="onebit")
    given = {name: np.zeros(shape) for name, shape in shapes.items()}
    steps = 30
    for _ in range(steps):
        gradients = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
        weight = float(rng.integers(0, 4)) if comm.rank else 2.0
        total = sum(comm.allgather(weight))
        for name, gradient in gradients.items():
            given[name] += weight / total * gradient
        trainer.step(gradients, weight=weight)
    left = {name: np.zeros(shape) for name, shape in shapes.items()}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        state = plan.state_dict()
        owed = np.array(state["residual"], np.float64)
        owed[slice(*plan.owned)] += state["owner_residual"]
        for name, part in bucket.unflatten(owed):
            left[name] += part
    for name in shapes:
        total_given = comm.allreduce(given[name])
        total_left = comm.allreduce(left[name])
        applied = -parameters[name].astype(np.float64)
        error = np.abs(applied + total_left - total_given).max() / np.abs(total_given).max()
        agree(comm, error < (1e-4 if dtype == np.float32 else 1e-12), f"{name}: {error}")
        agree(comm, comm.size == 1 or np.abs(total_left).max() > 0, f"{name}: there must be residuals")
    trainer.free()


def test_compression_makes_the_exchange_small(comm, agree):
    def sent(compression):
        w = np.zeros(1 << 17, np.float32)
        trainer = DataParallel([w], SGD(), comm=comm, compression=compression)
        trainer.step([np.ones_like(w)])
        trainer.free()
        return trainer.bytes_sent

    exact, compressed = sent(None), sent("onebit")
    if comm.size == 1:
        agree(comm, exact == compressed == 0, f"{exact} {compressed}")
    else:
        agree(comm, 0 < compressed <= exact / 20, f"{exact} {compressed}")


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_large_buckets_travel_while_others_are_packed(comm, agree, compression, monkeypatch):
    """As bits, it makes no difference."""
    digests = []
    for overlap_bytes in (0, 1 << 30):
        monkeypatch.setattr("bitring.training.step.bucket_sizes.OVERLAP_BYTES", overlap_bytes)
        rng = np.random.default_rng(comm.rank)
        parameters = [np.zeros(n, np.float32) for n in (3000, 2000, 5, 4000)]
        trainer = DataParallel(parameters, SGD(momentum=0.9), comm=comm, compression=compression, bucket_bytes=100)
        for _ in range(5):
            trainer.step([rng.standard_normal(w.shape).astype(np.float32) for w in parameters])
        digests.append(trainer.digest())
        trainer.free()
    agree(comm, digests[0] == digests[1] == comm.bcast(digests[0]))


def test_warm_up_is_exact(comm, agree):
    rng = np.random.default_rng(comm.rank)
    exact, warm = np.zeros(3000, np.float32), np.zeros(3000, np.float32)
    trainers = [
        DataParallel([exact], SGD(), comm=comm),
        DataParallel([warm], SGD(), comm=comm, compression="onebit", warmup_steps=3),
    ]
    for step in range(5):
        gradient = rng.standard_normal(3000).astype(np.float32)
        for trainer in trainers:
            trainer.step([gradient])
        # One rank has nothing to send, so nothing to encode.
        agree(comm, np.array_equal(exact, warm) == (step < 3 or comm.size == 1), f"step {step}")
    for trainer in trainers:
        trainer.free()


def test_buckets(comm, agree):
    """Reverse order, by dtype, closed at a size; small parameters travel exactly; empty ones do not travel."""
    parameters = {
        "a": np.zeros(2000, np.float32),
        "b": np.zeros((2, 5), np.float32),
        "c": np.zeros(3000, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "d": np.zeros(1024, np.float64),
        "e": np.zeros(1500, np.float32),
        "f": np.zeros((), np.float32),
    }
    trainer = DataParallel(parameters, SGD(lr=1.0), comm=comm, compression="onebit", bucket_bytes=18000)
    found = [(list(bucket.views), bucket.compressed, bucket.flat.dtype.name) for bucket in trainer.buckets]
    expected = [
        (["e", "c"], True, "float32"),
        (["f", "b"], False, "float32"),
        (["d"], True, "float64"),
        (["a"], True, "float32"),
    ]
    agree(comm, sorted(found) == sorted(expected), str(found))
    trainer.step({name: np.ones_like(w) for name, w in parameters.items()})
    agree(comm, all(np.allclose(w, -1) for w in parameters.values()))
    trainer.free()


def test_only_empty_parameters(comm, agree):
    w = np.zeros((0, 3))
    trainer = DataParallel([w], "sgd", comm=comm, compression="onebit")
    trainer.step([np.zeros((0, 3))])
    agree(comm, trainer.steps == 1 and trainer.bytes_sent == 0)
    trainer.free()


def test_gradients_are_only_read_and_may_be_views(comm, agree):
    parameters = [np.zeros((4, 6)), np.zeros(5)]
    trainer = DataParallel(parameters, SGD(lr=1.0, momentum=0.5, weight_decay=0.1), comm=comm)
    big = np.arange(60.0).reshape(6, 10)
    gradients = [big.T[:8:2], big[0, ::2]]
    big.flags.writeable = False
    trainer.step(gradients)
    for w, g in zip(parameters, gradients, strict=True):
        agree(comm, np.allclose(w, -g, rtol=1e-14))
    trainer.free()


def test_no_samples_changes_nothing(comm, agree):
    w = np.ones(2000, np.float32)
    trainer = DataParallel([w], SGD(momentum=0.9, weight_decay=0.1), comm=comm, compression="onebit")
    trainer.step([np.ones_like(w)])
    before = snapshot(trainer)
    trainer.step([np.full_like(w, np.nan)], weight=0)
    agree(comm, snapshot(trainer) == before and trainer.steps == 2)
    trainer.free()


@pytest.mark.parametrize("mode", ["sync", Local(tau=3)], ids=str)
def test_notices_reach_all_ranks_with_the_record_of_a_step(comm, agree, mode):
    """In a mode with blocks, at the block's end: no rank acts on one before all know of it."""
    last, block = comm.size - 1, 1 if mode == "sync" else 3
    trainer = DataParallel([np.zeros(5)], SGD(), comm=comm, mode=mode)
    found: list[tuple[int, bool]] = []
    for step in range(9):
        if step == 4:
            trainer.notices.own |= 1 if comm.rank == 0 else 0
            trainer.notices.own |= 4 if comm.rank == last else 0
        trainer.step([np.ones(5)])
        found.append((trainer.notices.everyone, trainer.in_a_block))
    told = 4 if block == 1 else 5
    expected = [(5 if step == told else 0, (step + 1) % block > 0) for step in range(9)]
    agree(comm, found == expected, str(found))
    trainer.free()


def test_compression_as_on_the_command_line(comm, agree):
    trainer = DataParallel([np.zeros(100)], SGD(), comm=comm, compression="topk:density=0.001,block=64")
    agree(comm, trainer.describe()["compression"].startswith("TopK(density=0.001, "), str(trainer.compression))
    trainer.free()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("compression", [None, "onebit"])
def test_not_finite_raises_everywhere_and_changes_nothing(comm, agree, compression, value):
    def train(poisoned):
        rng = np.random.default_rng(comm.rank)
        parameters = {"a": np.zeros(2000, np.float32), "b": np.zeros(3)}
        trainer = DataParallel(parameters, SGD(lr=0.1, momentum=0.9), comm=comm, compression=compression)
        for step in range(5):
            gradients = {name: rng.standard_normal(w.shape).astype(w.dtype) for name, w in parameters.items()}
            if poisoned and step == 3:
                bad = {name: g.copy() for name, g in gradients.items()}
                if comm.rank == comm.size - 1:
                    bad["a"][1234] = value
                before = snapshot(trainer)
                error = raised(trainer.step, bad)
                texts = "'a'", f"on rank {comm.size - 1}", "NaN" if np.isnan(value) else "Inf", "(step 3)"
                agree(comm, describes(error, NonFiniteError, *texts), repr(error))
                agree(comm, isinstance(error, FloatingPointError))
                agree(comm, snapshot(trainer) == before and trainer.steps == 3)
            trainer.step(gradients)
        trainer.free()
        return trainer.digest()

    agree(comm, train(False) == train(True))


def test_large_but_finite_gradients_pass(comm, agree):
    w = np.zeros(100, np.float32)
    trainer = DataParallel([w], SGD(lr=1e-38), comm=comm)
    trainer.step([np.full(100, 3e38, np.float32)])
    agree(comm, np.allclose(w, -3, rtol=1e-5))
    trainer.free()


@pytest.mark.parametrize(
    ("gradients", "weight", "kind", "text"),
    [
        ({"a": np.ones(3)}, 1, ValueError, "missing: ['b'], unknown: []"),
        ({"a": np.ones(3), "b": np.ones(2), "c": np.ones(1)}, 1, ValueError, "missing: [], unknown: ['c']"),
        (
            {"a": np.ones(4), "b": np.ones(2)},
            1,
            ValueError,
            "'a' must be float64 of shape (3,), got float64 of shape (4,)",
        ),
        ({"a": np.ones(3, "f4"), "b": np.ones(2)}, 1, ValueError, "'a' must be float64 of shape (3,), got float32"),
        (
            {"a": [1.0, 1.0, 1.0], "b": np.ones(2)},
            1,
            TypeError,
            "the gradient of 'a' must be a NumPy or CuPy array, or offer DLPack",
        ),
        ([np.ones(3)], 1, ValueError, "one for each of the 2 parameters, got 1"),
        (np.ones(5), 1, TypeError, "gradients must be a dict or a list of arrays, got ndarray"),
        ([np.ones(3), np.ones(2)], -1, ValueError, "weight must be finite and >= 0, got -1.0"),
        ([np.ones(3), np.ones(2)], np.nan, ValueError, "weight must be finite and >= 0, got nan"),
        ([np.ones(3), np.ones(2)], "1", TypeError, "weight must be a number"),
        ([np.ones(3), np.ones(2)], None, TypeError, "weight must be a number"),
        ([np.ones(3), np.ones(2)], np.array([2.0]), TypeError, "weight must be a number, the samples in this rank's"),
        ([np.ones(3), np.ones(2)], np.complex64(1), TypeError, "weight must be a number"),
        ([np.ones(3, ">f8"), np.ones(2)], 1, TypeError, "the gradient of 'a' must have this machine's byte order"),
        ({"a": None, "b": np.ones(2)}, 1, TypeError, "the gradient of 'a' is None: the parameter had no part in the"),
        (
            [np.ma.masked_array([np.nan, 1, 1], [True, False, False]), np.ones(2)],
            1,
            NonFiniteError,
            "'a' holds NaN",
        ),
    ],
)
def test_a_rank_with_bad_arguments(comm, agree, gradients, weight, kind, text):
    """It raises its own error, the others one that names it; then training goes on."""
    parameters = {"a": np.zeros(3), "b": np.zeros(2)}
    trainer = DataParallel(parameters, SGD(lr=1.0), comm=comm)
    good = {"a": np.ones(3), "b": np.ones(2)}
    wrong = comm.size // 2
    error = raised(trainer.step, *((gradients, weight) if comm.rank == wrong else (good, 1)))
    if comm.rank == wrong:
        agree(comm, describes(error, kind, text, "DataParallel.step (step 0)"), repr(error))
    elif kind is NonFiniteError:
        agree(comm, describes(error, NonFiniteError, text), repr(error))
    else:
        agree(comm, describes(error, PeerError, text, f"rank {wrong} raised {kind.__name__}"), repr(error))
    agree(comm, all((w == 0).all() for w in parameters.values()) and trainer.steps == 0)
    trainer.step(good)
    agree(comm, all(np.allclose(w, -1) for w in parameters.values()))
    trainer.free()


def test_weights_without_a_finite_sum(comm, agree):
    """Each is finite, and a step by their mean would do nothing."""
    trainer = DataParallel({"a": np.zeros(3)}, SGD(lr=1.0), comm=comm)
    error = raised(trainer.step, {"a": np.ones(3)}, 1.7e308)
    if comm.size > 1:
        agree(comm, describes(error, ValueError, "the weights of all ranks have no finite sum"), repr(error))
    agree(comm, trainer.steps == (comm.size == 1))
    trainer.free()


READ_ONLY = np.ones(3)
READ_ONLY.flags.writeable = False
SHARED = np.ones(6)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"parameters": np.ones(3)}, TypeError, "parameters must be a dict or a list of arrays, got ndarray"),
        ({"parameters": []}, ValueError, "parameters must hold at least one array"),
        ({"parameters": {"": np.ones(3)}}, TypeError, "named by non-empty strings, got the name ''"),
        ({"parameters": {1: np.ones(3)}}, TypeError, "named by non-empty strings, got the name 1"),
        ({"parameters": {"w": [1.0]}}, TypeError, "parameters: 'w' must be a NumPy or CuPy array, or offer DLPack"),
        (
            {"parameters": {"w": Tensor(np.ones(3), shares=False)}},
            TypeError,
            "'w' offers DLPack, but it would be a copy",
        ),
        ({"parameters": {"w": Tensor(READ_ONLY)}}, ValueError, "'w' must be writable, since it is updated in place"),
        (
            {"parameters": {"w": np.ones(3, int)}},
            TypeError,
            "'w' must be one of float16, bfloat16, float32, float64, got int64",
        ),
        (
            {"parameters": {"w": np.ones((6, 4))[::2]}},
            ValueError,
            "'w' must be dense, in any memory order, got shape (3, 4)",
        ),
        ({"parameters": {"w": READ_ONLY}}, ValueError, "'w' must be writable"),
        ({"parameters": {"u": SHARED[:4], "v": SHARED[3:]}}, ValueError, "'u' and 'v' share memory"),
        ({"optimizer": "rmsprop"}, ValueError, "unknown optimizer 'rmsprop'; known: adagrad, adam, onebit_adam, sgd"),
        (
            {"optimizer": SGD},
            TypeError,
            "optimizer must be a name (adagrad, adam, onebit_adam, sgd) or an instance of Optimizer, "
            "got the class SGD itself",
        ),
        ({"optimizer": LBFGS()}, TypeError, "got LBFGS(memory=10), which is for bitring.Sandblaster"),
        ({"optimizer": "sgd:eps=1"}, ValueError, "unknown setting 'eps' of the optimizer sgd; known: lr, momentum, "),
        ({"mode": "local:tau=0"}, ValueError, "Local: tau must be at least 1; got 0"),
        ({"mode": "async"}, ValueError, f"unknown mode 'async'; known: {', '.join(modes.names())}"),
        (
            {"mode": 3},
            TypeError,
            f"mode must be a name ({', '.join(modes.names())}) or an instance of Mode, got 3",
        ),
        ({"compression": "twobit"}, ValueError, "'twobit'; known: "),
        ({"compression": "none"}, ValueError, "'none' is no compressor: compression=None is exact; known: "),
        ({"compression": "topk:densty=1"}, ValueError, "unknown setting 'densty' of the compressor topk; known: "),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0; got -1"),
        ({"warmup_steps": 1.5}, TypeError, "warmup_steps must be an int; got float"),
        ({"algorithm": lambda: "ring"}, TypeError, "algorithm must be a name (auto, "),
        ({"bucket_bytes": 0}, ValueError, "bucket_bytes must be at least 1; got 0"),
    ],
)
def test_wrong_arguments(comm, agree, arguments, kind, text):
    """On all ranks, and on the last one only."""
    good: dict[str, Any] = {"parameters": {"w": np.ones(3)}, "optimizer": "sgd", "comm": comm}
    error = raised(DataParallel, **{**good, **arguments})
    agree(comm, describes(error, kind, text), repr(error))
    last = comm.size - 1
    error = raised(DataParallel, **{**good, **(arguments if comm.rank == last else {})})
    if comm.rank == last:
        agree(comm, describes(error, kind, text), repr(error))
    else:
        agree(comm, describes(error, PeerError, text, f"rank {last} raised {kind.__name__}"), repr(error))


def test_settings_as_text(comm, agree):
    trainer = DataParallel([np.ones(3)], "adagrad:eps=1e-6", comm=comm, mode="block_momentum:tau=20,zeta=0.5")
    agree(comm, trainer.optimizer == AdaGrad(eps=1e-6), str(trainer.optimizer))
    agree(comm, trainer.mode == BlockMomentum(tau=20, zeta=0.5), str(trainer.mode))
    trainer.optimizer, trainer.mode = "adagrad:lr=0.1", "block_momentum:tau=5"
    agree(comm, trainer.optimizer == AdaGrad(lr=0.1), str(trainer.optimizer))
    agree(comm, trainer.mode == BlockMomentum(tau=5), str(trainer.mode))
    trainer.free()


def test_unknown_algorithm(comm, agree):
    error = raised(DataParallel, [np.ones(3)], "sgd", comm=comm, algorithm="rign")
    agree(comm, isinstance(error, ValueError) and "rign" in str(error) and "ring" in str(error), repr(error))


class WithoutTextError(Exception):
    def __str__(self):
        raise KeyError("text")


@dataclasses.dataclass(frozen=True)
class FailingOptimizer(SGD):
    """Raises in ``method`` on the last rank of the world."""

    method: str = ""

    def _fail(self, method):
        from mpi4py import MPI

        if method == self.method and MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
            raise WithoutTextError

    def init(self, parameters):
        self._fail("init")
        return super().init(parameters)

    def update(self, parameters, gradients, state):
        self._fail("update")
        super().update(parameters, gradients, state)

    def __repr__(self):
        self._fail("repr")
        return "FailingOptimizer()"


@dataclasses.dataclass(frozen=True)
class FailingMode(Local):
    def init(self, trainer: Any):
        if trainer.rank == trainer.size - 1:
            raise WithoutTextError
        return super().init(trainer)


@pytest.mark.parametrize("where", ["mode", "init", "repr", "update"])
def test_callbacks_that_raise_without_a_text(comm, agree, where):
    """When the trainer is made, and in a step; whatever a user's exception says of itself."""
    optimizer = FailingOptimizer(method=where)

    def train():
        trainer = DataParallel(
            {"w": np.ones(3)}, optimizer, comm=comm, mode=FailingMode() if where == "mode" else "sync"
        )
        trainer.step({"w": np.ones(3)})

    error = raised(train)
    if comm.rank == comm.size - 1:
        agree(comm, type(error) is WithoutTextError)
    else:
        text = f"rank {comm.size - 1} raised WithoutTextError: (no text: its __str__ raised KeyError)"
        agree(comm, describes(error, PeerError, text), repr(error))


@pytest.mark.parametrize("comm_given", ["world", 3])
def test_wrong_comm(comm_given):
    with pytest.raises(
        TypeError, match=r"DataParallel: comm must be an MPI.Intracomm such as MPI.COMM_WORLD; got (str|int)"
    ):
        DataParallel([np.ones(3)], "sgd", comm=comm_given)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"parameters": {"w": np.ones((3, 2)), "b": np.ones(2)}},
            "parameter 'w' is float64 of shape (3, 2), not float64 of shape (2, 3)",
        ),
        (
            {"parameters": {"w": np.ones((2, 3), "f4"), "b": np.ones(2)}},
            "parameter 'w' is float32 of shape (2, 3), not float64",
        ),
        ({"parameters": {"b": np.ones(2), "w": np.ones((2, 3))}}, "the parameters are ['b', 'w'], not ['w', 'b']"),
        ({"parameters": {"w": np.ones((2, 3))}}, "the parameters are ['w'], not ['w', 'b']"),
        ({"optimizer": SGD(lr=0.5)}, "optimizer is SGD(lr=0.5"),
        ({"mode": "local"}, "mode is Local(tau=50), not Sync()"),
        ({"compression": "onebit"}, "compression is OneBit("),
        ({"algorithm": "ring"}, "algorithm is ring, not auto"),
        ({"warmup_steps": 2}, "warmup_steps is 2, not 0"),
        ({"check_every": 3}, "check_every is 3, not 0"),
        ({"bucket_bytes": 8}, "bucket_bytes is 8, not"),
    ],
)
def test_ranks_that_differ(comm, agree, arguments, text):
    good: dict[str, Any] = {
        "parameters": {"w": np.ones((2, 3)), "b": np.ones(2)},
        "optimizer": SGD(lr=0.1),
        "comm": comm,
    }
    last = comm.size - 1
    error = raised(DataParallel, **{**good, **(arguments if comm.rank == last else {})})
    if comm.size == 1:
        agree(comm, error is None)
    else:
        agree(
            comm, describes(error, MismatchError, f"DataParallel: rank {last} differs from rank 0: {text}"), repr(error)
        )


def test_ranks_at_different_trainers_or_steps(comm, agree):
    """After a hundred good steps: all raise, naming a rank that differs; then training goes on."""
    trainers = [DataParallel([np.zeros(3)], SGD(lr=1.0), comm=comm) for _ in range(2)]
    for _ in range(100):
        trainers[0].step([np.ones(3)])
    last = comm.size - 1
    error = raised(trainers[1 if comm.rank == last else 0].step, [np.ones(3)])
    if comm.size == 1:
        agree(comm, error is None)
    else:
        agree(comm, describes(error, MismatchError, "ranks do not do the same", f"rank {last} is at step"), repr(error))
        if comm.rank == last:
            trainers[1]._stepper.steps += 1
        error = raised(trainers[1].step, [np.ones(3)])
        agree(comm, describes(error, MismatchError, "after 1 steps", "after 0 steps"), repr(error))
        if comm.rank == last:
            trainers[1]._stepper.steps -= 1
    for trainer in trainers:
        trainer.step([np.ones(3)])
        agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)
        trainer.free()


def test_the_learning_rate_may_change(comm, agree):
    w = np.zeros(3)
    trainer = DataParallel([w], SGD(lr=1.0), comm=comm)
    trainer.step([np.ones(3)])
    settings: Any = trainer.optimizer
    trainer.optimizer = dataclasses.replace(settings, lr=0.5)
    trainer.step([np.ones(3)])
    agree(comm, np.allclose(w, -1.5))
    trainer.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_state_dict_goes_back_in_time(comm, agree, compression):
    rng = np.random.default_rng(comm.rank)
    gradients = rng.standard_normal((6, 2000)).astype(np.float32)
    trainer = DataParallel(
        [np.zeros(2000, np.float32)], SGD(momentum=0.9), comm=comm, compression=compression, warmup_steps=2
    )
    for gradient in gradients[:3]:
        trainer.step([gradient])
    state = trainer.state_dict()
    for gradient in gradients[3:]:
        trainer.step([gradient])
    first = trainer.digest()
    trainer.load_state_dict(state)
    agree(comm, trainer.steps == 3)
    for gradient in gradients[3:]:
        trainer.step([gradient])
    agree(comm, trainer.digest() == first)
    trainer.free()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"parameters": [np.zeros(5)]}, "parameter '0' is float64 of shape (4,), not float64 of shape (5,)"),
        ({"compression": "onebit"}, "compression is None, not OneBit("),
        ({"mode": "local"}, "mode is Sync, not Local"),
        ({"optimizer": "adagrad"}, "optimizer is SGD, not AdaGrad"),
        ({"optimizer": SGD(momentum=0.5)}, "optimizer/velocity/0 is only in one of the two"),
        ({"bucket_bytes": 8}, "bucket_bytes is 26214400, not 8"),
    ],
)
def test_state_of_another_trainer(comm, agree, arguments, text):
    good: dict[str, Any] = {"parameters": [np.zeros(4)], "optimizer": "sgd", "comm": comm}
    trainer, other = DataParallel(**good), DataParallel(**{**good, **arguments})
    error = raised(trainer.load_state_dict, other.state_dict())
    agree(comm, describes(error, ValueError, "the state is of another trainer", text), repr(error))
    trainer.free()
    other.free()


def test_on_part_of_the_world(comm, agree):
    """Each half trains alone; what they make differs."""
    half = comm.Split(comm.rank % 2)
    w = np.zeros(3)
    trainer = DataParallel([w], SGD(lr=1.0), comm=half)
    trainer.step([np.full(3, comm.rank % 2 + 1.0)])
    agree(comm, np.allclose(w, -(comm.rank % 2 + 1)), str(w))
    trainer.free()
    half.Free()


@pytest.mark.gpu
@pytest.mark.parametrize("compression", [None, "onebit"])
@pytest.mark.parametrize("mode", ["sync", "local", "block_momentum"])
def test_on_a_device(comm, agree, mode, compression):
    import cupy

    rng = np.random.default_rng(comm.rank)
    host, device = [np.zeros(3000, np.float32)], [cupy.zeros(3000, cupy.float32)]
    trainers = [
        DataParallel(w, SGD(momentum=0.9), comm=comm, mode=mode, compression=compression) for w in (host, device)
    ]
    for _ in range(60):
        gradient = rng.standard_normal(3000).astype(np.float32)
        trainers[0].step([gradient])
        trainers[1].step([cupy.asarray(gradient)])
    for trainer in trainers:
        trainer.synchronize()
    agree(comm, np.allclose(host[0], device[0].get(), rtol=1e-4, atol=1e-5))
    error = raised(trainers[1].step, host)
    agree(comm, isinstance(error, TypeError) or mode != "sync", repr(error))
    for trainer in trainers:
        trainer.free()


@pytest.mark.parametrize("mode", ["sync", "local"])
@pytest.mark.parametrize("compression", [None, "onebit", "sufficient_factors"])
def test_without_samples_gradients_are_not_looked_at(comm, agree, mode, compression):
    w = np.ones((30, 40), np.float32)
    trainer = DataParallel({"w": w}, SGD(lr=1.0), comm=comm, mode=mode, compression=compression)
    nothings: list[Any] = [{"w": None}, {}, None, [], [np.full(3, np.nan)], "no gradients"]
    for nothing in nothings:
        gradients = {"w": np.ones_like(w)} if comm.rank == 0 else nothing
        trainer.step(gradients, weight=int(comm.rank == 0))
    trainer.synchronize()
    agree(comm, np.allclose(w, -5, atol=1e-5) and trainer.steps == 6, str(w[0, 0]))
    trainer.free()


def test_unused_parameters_as_zeros(comm, agree):
    """On some ranks or on all; what is no parameter's is still a mistake."""
    parameters = {"a": np.ones(3), "b": np.ones((2, 2)), "c": np.ones(4, ml_dtypes.bfloat16)}
    trainer = DataParallel(parameters, SGD(lr=1.0), comm=comm, unused="zeros")
    only = comm.rank == comm.size - 1
    trainer.step({"a": np.ones(3), "b": None, "c": np.ones(4, ml_dtypes.bfloat16) if only else None})
    agree(comm, np.allclose(parameters["a"], 0) and (parameters["b"] == 1).all(), str(parameters))
    agree(comm, np.allclose(parameters["c"].astype(float), 1 - 1 / comm.size, atol=1e-2), str(parameters["c"]))
    trainer.step({"a": np.ones(3)})
    trainer.step([np.ones(3), None, None])
    agree(comm, np.allclose(parameters["a"], -2) and (parameters["b"] == 1).all(), str(parameters))
    error = raised(trainer.step, {"a": np.ones(3), "z": np.ones(3)})
    agree(comm, describes(error, ValueError, "missing: ['b', 'c'], unknown: ['z']"), repr(error))
    error = raised(DataParallel, [np.ones(3)], "sgd", comm, unused="ignore")
    agree(comm, describes(error, ValueError, "DataParallel: unused must be 'error' or 'zeros', got 'ignore'"))
    trainer.free()


def in_order(array, axes):
    """The same values, in memory by these axes from the slowest to the fastest."""
    return array.transpose(axes).copy().transpose(np.argsort(axes))


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1, momentum=0.9), AdaGrad(lr=0.1)], ids=["sgd", "adagrad"])
@pytest.mark.parametrize("compression", [None, "onebit"])
@pytest.mark.parametrize("mode", ["sync", "local"])
def test_parameters_in_any_dense_order(comm, agree, mode, compression, optimizer, mpi_tmp_path):
    """They train as in C order, bit for bit, whatever each rank's order and its gradients' is; so do restored ones."""
    rng = np.random.default_rng(0)
    values = {"small": rng.standard_normal((3, 4)), "big": rng.standard_normal((10, 20, 5, 7))}
    values = {name: w.astype(np.float32) for name, w in values.items()}
    axes = [(0, 2, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3)][comm.rank % 3]  # channels_last, Fortran, C
    kinds = {
        "C": {name: w.copy() for name, w in values.items()},
        "others": {"small": np.asfortranarray(values["small"]), "big": in_order(values["big"], axes)},
    }
    digests = {}
    for kind, parameters in kinds.items():
        trainer = DataParallel(parameters, optimizer, comm=comm, mode=mode, compression=compression)
        strides = {name: w.strides for name, w in parameters.items()}
        for step in range(4):
            mine = np.random.default_rng((step, comm.rank))
            gradients = {name: mine.standard_normal(w.shape).astype(np.float32) for name, w in parameters.items()}
            gradients["big"] = in_order(gradients["big"], (1, 3, 2, 0))
            if step == 2:
                save_checkpoint(mpi_tmp_path / f"{kind}.npz", trainer)
                for w in parameters.values():
                    w[...] = 0
                load_checkpoint(mpi_tmp_path / f"{kind}.npz", trainer)
            trainer.step(gradients)
        trainer.synchronize()
        digests[kind] = trainer.digest()
        agree(comm, strides == {name: w.strides for name, w in trainer.parameters.items()})
        trainer.free()
    agree(comm, digests["C"] == digests["others"] and len(set(comm.allgather(digests["C"]))) == 1, str(digests))
    agree(comm, all(np.array_equal(kinds["C"][name], kinds["others"][name]) for name in values))


def test_parameters_that_cannot_be_trained(comm, agree):
    cases = [
        (np.ones((4, 6))[:, ::2], ValueError, "'0' must be dense, in any memory order, got shape (4, 3) with strides"),
        (np.broadcast_to(np.ones(()), (3, 3)), ValueError, "'0' must be dense, in any memory order"),
        (np.ones(3, ">f4"), TypeError, "'0' must have this machine's byte order; got >f4"),
        (Immutable(np.ones(3)), ValueError, "'0' must be writable, since it is updated in place"),
        (np.ones(3, np.int32), TypeError, "'0' must be one of float16, bfloat16, float32, float64, got int32"),
    ]
    for parameter, kind, text in cases:
        error = raised(DataParallel, [parameter], "sgd", comm)
        agree(comm, describes(error, kind, text), repr(error))


def test_subclasses_of_arrays_are_their_plain_data(comm, agree):
    masked = np.ma.masked_array(np.ones(3), [True, False, True])
    trainer = DataParallel({"w": masked}, SGD(lr=1.0), comm=comm)
    trainer.step({"w": np.ma.masked_array(np.ones(3), [False, True, True])})
    agree(comm, np.array_equal(masked.data, [0, 0, 0]), repr(masked))
    factors = Factors(np.ma.masked_array(np.ones((1, 3)), True), np.ones((1, 2)))
    agree(comm, np.array_equal(factors.product(), np.ones((3, 2))))
    trainer.free()


def test_bfloat16_and_immutable_tensors(comm, agree):
    """PyTorch's bfloat16 in its own memory, with gradients such as JAX's."""
    w = tensors.Tensor(np.ones((3, 4), ml_dtypes.bfloat16))
    trainer = DataParallel({"w": w}, SGD(lr=1.0), comm=comm)
    for kind in (tensors.Tensor, Immutable):
        trainer.step({"w": kind(np.ones((3, 4), ml_dtypes.bfloat16))})
    agree(comm, bool((w.array == -1).all()), str(w.array))
    trainer.free()


class Layer(NamedTuple):
    """As JAX's libraries have them."""

    w: Any
    b: Any


def test_nested_parameters(comm, agree):
    """Named by their places; the bits are those of flat ones, and gradients may be nested or flat."""
    rng = np.random.default_rng(3)
    flat = {"in/w": rng.standard_normal((4, 3)), "in/b": np.zeros(4), "out/0/w": np.ones((2, 4)), "out/0/b": np.ones(2)}
    nested: Any = {
        "in": {"w": flat["in/w"].copy(), "b": flat["in/b"].copy()},
        "out": [Layer(flat["out/0/w"].copy(), flat["out/0/b"].copy())],
    }
    one, other = (DataParallel(each, SGD(lr=0.1), comm=comm) for each in (flat, nested))
    agree(comm, list(other.parameters) == list(flat), repr(list(other.parameters)))
    for step in range(3):
        g = {name: rng.standard_normal(w.shape) + comm.rank for name, w in flat.items()}
        one.step(g)
        if step == 2:
            other.step(g)
            continue
        tree = {"out": [Layer(g["out/0/w"], g["out/0/b"])], "in": {"b": g["in/b"], "w": g["in/w"]}}
        other.step(tree)
    agree(comm, other.digest() == one.digest() and np.array_equal(nested["out"][0].w, flat["out/0/w"]))
    for wrong, text in (({"in": nested["in"]}, "missing: ['out/0/w', 'out/0/b']"), ([[1.0]], "got 1"), (3, "got int")):
        error = raised(other.step, wrong)
        agree(comm, text in str(error), repr(error))
    for each in (one, other):
        each.free()


@pytest.mark.single
def test_nested_parameters_in_a_list_and_two_of_one_name():
    trainer = DataParallel([{"w": np.ones(3)}, np.ones(2)], "sgd")
    assert list(trainer.parameters) == ["0/w", "1"]
    trainer.step([{"w": np.ones(3)}, np.ones(2)])
    with pytest.raises(ValueError, match="two arrays are named 'a/b'"):
        DataParallel({"a": {"b": np.ones(2)}, "a/b": np.ones(2)}, "sgd")
    with pytest.raises(TypeError, match="must be named by non-empty strings, got the name 3"):
        DataParallel({"a": {3: np.ones(2)}}, "sgd")
