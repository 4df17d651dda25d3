"""bitring.jax: reductions inside jit and outside, their order, derivatives and errors; means for optax; broadcast."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

jax: Any = pytest.importorskip("jax", reason="JAX is not installed")
optax: Any = pytest.importorskip("optax", reason="optax is not installed")

import jax.numpy as jnp  # noqa: E402
from mpi4py import MPI  # noqa: E402

import bitring  # noqa: E402
import bitring.jax  # noqa: E402
from bitring.errors import MismatchError, NonFiniteError, PeerError  # noqa: E402
from bitring.jax import handler, primitive  # noqa: E402
from bitring.jax.channel import channel_of  # noqa: E402


def raised(call: Any, *arguments: Any, **named: Any) -> Any:
    try:
        return jax.block_until_ready(call(*arguments, **named)) and None
    except Exception as error:
        return error


def values_of(rank: int, n: int = 5) -> Any:
    return np.arange(n, dtype=np.float32) + rank


def summed(comm: Any, n: int = 5) -> Any:
    return sum(values_of(rank, n) for rank in range(comm.size))


@pytest.fixture(params=["ffi", "callback"])
def way(request, monkeypatch):
    """Both ways into compiled code."""
    if request.param == "callback":
        monkeypatch.setattr(primitive, "registered", lambda: False)
    return request.param


def test_there_is_an_ffi_target(comm, agree):
    agree(comm, handler.registered())


def test_a_tree_inside_jit_and_outside(comm, agree, way):
    def reduced(x: Any) -> Any:
        return bitring.jax.allreduce({"a": x, "b": [x * 2, x.reshape(5, 1)], "n": 3}, comm=comm)

    x = jnp.asarray(values_of(comm.rank))
    want = summed(comm)
    for call in (reduced, jax.jit(reduced)):
        found = call(x)
        agree(comm, list(found) == ["a", "b", "n"] and found["n"] == 3 * comm.size)
        agree(comm, isinstance(found["a"], jax.Array) and np.array_equal(found["a"], want), f"{way}: {found}")
        agree(comm, np.array_equal(found["b"][0], 2 * want) and np.array_equal(found["b"][1], want.reshape(5, 1)))
    agree(comm, np.array_equal(x, values_of(comm.rank)), "the argument has changed")


def test_dtypes_and_sizes(comm, agree):
    """Also large arrays, alone; nothing; one value; and an empty tree."""
    dtypes = ["float16", "bfloat16", "float32", "int8", "uint32", "complex64"]
    tree = {dtype: [jnp.asarray(np.full(n, comm.rank + 1), dtype) for n in (0, 1, 17, 70_000)] for dtype in dtypes}
    found = jax.jit(lambda tree: bitring.jax.allreduce(tree, comm=comm))(tree)
    want = comm.size * (comm.size + 1) // 2
    for dtype, arrays in tree.items():
        for x, y in zip(arrays, found[dtype], strict=True):
            agree(comm, y.dtype == dtype and y.shape == x.shape and (np.asarray(y) == want).all(), f"{dtype}: {y}")
    agree(comm, bitring.jax.allreduce({}, comm=comm) == {})


def test_mean_operations_and_algorithms(comm, agree):
    x = jnp.asarray(values_of(comm.rank))
    found = jax.jit(
        lambda x: (
            bitring.jax.allreduce(x, mean=True, comm=comm),
            bitring.jax.allreduce(x, op=MPI.MAX, comm=comm),
            bitring.jax.allreduce(x, algorithm="ring", comm=comm),
        )
    )(x)
    want = summed(comm)
    agree(comm, np.allclose(found[0], want / comm.size) and np.array_equal(found[2], want))
    agree(comm, np.array_equal(found[1], values_of(comm.size - 1)))


def test_derivatives_and_vmap(comm, agree):
    """The cotangent of a sum is the sum of the ranks' cotangents; of a mean, the mean."""
    x = jnp.asarray(values_of(comm.rank))
    c = jnp.asarray(values_of(comm.rank) + 1)
    want = summed(comm)
    cotangents = want + comm.size

    def loss(x: Any, mean: bool) -> Any:
        tree = {"x": x} if mean else {"x": x, "n": jnp.arange(3)}  # which has no derivative
        return (bitring.jax.allreduce(tree, comm=comm, mean=mean)["x"] * c).sum()

    for mean in (False, True):
        by = comm.size if mean else 1
        for call in (jax.grad(loss), jax.jit(jax.grad(loss), static_argnums=1)):
            agree(comm, np.allclose(call(x, mean), cotangents / by), f"mean={mean}")
    out, moved = jax.jvp(lambda x: bitring.jax.allreduce(x, comm=comm), (x,), (c,))
    agree(comm, np.array_equal(out, want) and np.array_equal(moved, cotangents))
    mapped = jax.jit(jax.vmap(lambda x: bitring.jax.allreduce(x, comm=comm)))(jnp.stack([x, 2 * x]))
    agree(comm, np.array_equal(mapped, np.stack([want, 2 * want])))
    error = raised(jax.grad(lambda x: bitring.jax.allreduce(x, op=MPI.MAX, comm=comm).sum()), x)
    agree(comm, "allreduce with op=MAX has no derivative" in str(error), repr(error))


def test_calls_keep_their_order(comm, agree):
    """In loops, branches and several computations under way; a result that nobody uses is exchanged all the same."""

    @jax.jit
    def several(x: Any) -> Any:
        bitring.jax.allreduce(x[:3], comm=comm)  # of other sizes, which would not match in another order
        once, _ = jax.lax.scan(lambda s, _: (bitring.jax.allreduce(s, comm=comm, mean=True), None), x, None, length=3)
        return jax.lax.cond(x.sum() > -1, lambda y: bitring.jax.allreduce(y[:4], comm=comm), lambda y: y[:4], once)

    x = jnp.asarray(values_of(comm.rank))
    found = [several(x + i) for i in range(6)]
    eager = bitring.jax.allreduce(x, comm=comm)
    for i, each in enumerate(found):
        agree(comm, np.allclose(each, summed(comm)[:4] + i * comm.size, rtol=1e-5), f"{i}: {each}")
    agree(comm, np.array_equal(eager, summed(comm)))


def test_works_are_kept_as_long_as_their_computations(comm, agree):
    call = jax.jit(lambda x: bitring.jax.allreduce(x, comm=comm, algorithm="binomial_tree"))
    for _ in range(3):
        call(jnp.ones(3))
        gc.collect()
    other = jax.jit(lambda x: bitring.jax.allreduce(x + 1, comm=comm, algorithm="binomial_tree"))
    other(jnp.ones(3))
    del call
    jax.clear_caches()
    gc.collect()
    agree(comm, np.array_equal(other(jnp.ones(3)), np.full(3, 2 * comm.size)))


def test_compiled_ahead_of_time(comm, agree):
    compiled = jax.jit(lambda x: bitring.jax.allreduce(x, comm=comm)).lower(jnp.ones(3)).compile()
    found = [float(compiled(jnp.full(3, float(i))).sum()) for i in range(3)]
    agree(comm, found == [3.0 * i * comm.size for i in range(3)], repr(found))


def test_a_freed_communicator_takes_its_own_of_jax_along(comm, agree):
    compiled = None
    for _ in range(20):
        mine = bitring.Communicator(comm.Dup())
        agree(comm, bitring.jax.allreduce(1.0, comm=mine) == comm.size)
        channel = channel_of(mine, "allreduce")
        if compiled is None:
            compiled = jax.jit(lambda x, mine=mine: bitring.jax.allreduce(x, comm=mine))
            compiled(1.0)
            jax.effects_barrier()
        mine.Free()
        agree(comm, channel == MPI.COMM_NULL)
    error = raised(compiled, 1.0)
    agree(
        comm, "RuntimeError: allreduce: the communicator that this was compiled for is freed" in str(error), repr(error)
    )


def test_errors_of_reductions(comm, agree):
    bad = comm.size - 1
    ones = jnp.ones(3)
    for call, kind, text in (
        (lambda: bitring.jax.allreduce(["x"], comm=comm), TypeError, "tree: '0' must be an array or a number; got str"),
        (lambda: bitring.jax.allreduce(ones, algorithm="rng", comm=comm), ValueError, "'rng'"),
        (
            lambda: bitring.jax.allreduce(ones, mean=True, op=MPI.MAX, comm=comm),
            ValueError,
            "mean=True is for op=MPI.SUM",
        ),
        (lambda: bitring.jax.allreduce(jnp.arange(3), mean=True, comm=comm), TypeError, "mean=True is for float"),
        (lambda: bitring.jax.allreduce({"k": jax.random.key(0)}, comm=comm), TypeError, "'k' is of key<fry>"),
        (lambda: jax.jit(lambda x: bitring.jax.broadcast({"w": x}, comm=comm))(ones), TypeError, "'w' is a tracer"),
    ):
        error = raised(call)
        agree(comm, type(error) is kind and text in str(error), repr(error))
    if comm.size == 1:
        return
    mine = jnp.ones(4 if comm.rank == bad else 3)
    error = raised(bitring.jax.allreduce, mine, comm=comm)
    agree(comm, type(error) is MismatchError, repr(error))
    error = raised(jax.jit(lambda x: bitring.jax.allreduce(x, comm=comm)), mine)
    agree(
        comm, isinstance(error, jax.errors.JaxRuntimeError) and "MismatchError: allreduce: " in str(error), repr(error)
    )
    swapped = [ones, jnp.ones(5)][:: -1 if comm.rank == bad else 1]  # small ones, which travel together
    for _ in range(2):
        error = raised(bitring.jax.allreduce, swapped, comm=comm)
        agree(comm, type(error) is MismatchError and "disagree on shapes" in str(error), repr(error))
        bitring.jax.allreduce([ones, jnp.ones(5)], comm=comm)
    agree(comm, np.array_equal(bitring.jax.allreduce(ones, comm=comm), np.full(3, comm.size)), "it goes on")


def test_all_go_on_after_a_computation_that_failed_beside_them(comm, agree):
    """It is large enough for JAX not to wait for it; whether somebody looks at its results or nobody."""
    if comm.size == 1:
        pytest.skip("needs several ranks")
    call = jax.jit(lambda x: bitring.jax.allreduce(x @ x @ x, comm=comm)[0, 0])
    good, bad = jnp.eye(400), jnp.eye(400 + (comm.rank == 0))
    for look in (True, False):
        failed = raised(lambda: call(bad) if look else [call(bad), 0][1])  # noqa: B023
        agree(comm, not look or "MismatchError" in str(failed), repr(failed))
        agree(comm, call(good) == comm.size)
        agree(comm, bitring.jax.allreduce(1.0, comm=comm) == comm.size)


def test_what_was_dispatched_is_done_though_its_computation_or_communicator_is_dropped(comm, agree):
    own = bitring.Communicator(comm.Dup())
    x = jnp.eye(400)
    found = [jax.jit(lambda x: bitring.jax.allreduce(x @ x @ x, comm=own)[0, 0])(x) for _ in range(3)]
    gc.collect()
    own.Free()
    agree(comm, all(each == comm.size for each in found))


def test_one_rank_has_bad_arguments(comm, agree):
    """The others hear of it in their call, inside jit too, and all go on."""
    if comm.size == 1:
        pytest.skip("needs several ranks")
    bad, ones = comm.rank == comm.size - 1, jnp.ones(3)
    jitted = jax.jit(lambda x: bitring.jax.allreduce(x, comm=comm))
    made = bitring.jax.average(comm=comm)
    state = made.init({"w": ones})
    for call in (
        lambda: bitring.jax.allreduce(["x"] if bad else ones, comm=comm),
        lambda: bitring.jax.allreduce(["x"], comm=comm) if bad else jitted(ones),
        lambda: bitring.jax.average(comm=comm).init({"w": "x" if bad else ones}),
        lambda: made.update({} if bad else {"w": ones}, state),
        lambda: jax.jit(made.update)({"w": jnp.ones(4 if bad else 3)}, state),
        lambda: made.update({"w": ones}, state, weight=jnp.ones(2) if bad else 1),
    ):
        error = raised(call)
        if bad:
            agree(comm, isinstance(error, (TypeError, ValueError)), repr(error))
        else:
            agree(comm, f"rank {comm.size - 1}" in str(error) and "PeerError" in repr(error), repr(error))
        agree(comm, np.array_equal(jitted(ones), np.full(3, comm.size)), "it goes on")
    agree(comm, np.array_equal(made.update({"w": ones}, state)[0]["w"], ones))
    made.trainer.free()


def test_broadcast(comm, agree):
    tree = {
        "w": jnp.full((2, 3), comm.rank, jnp.bfloat16),
        "state": [jnp.int32(comm.rank), None, np.float32(comm.rank)],
    }
    found = bitring.jax.broadcast(tree, root=comm.size - 1, comm=comm)
    agree(comm, jax.tree.structure(found) == jax.tree.structure(tree))
    same = all((x == comm.size - 1).all() and isinstance(x, jax.Array) for x in jax.tree.leaves(found))
    agree(comm, same and found["w"].dtype == jnp.bfloat16, repr(found))
    for wrong, root, kind, text in (
        ({"w": jnp.ones(3)}, 5, ValueError, "root"),
        ({"w": object()}, 0, TypeError, "'w' must be an array"),
        ({"w": jnp.ones(2)}, 0, MismatchError, "'w' is float32 of shape (2,); there, w is float32 of shape (3,)"),
    ):
        last = comm.rank == comm.size - 1
        error = raised(bitring.jax.broadcast, wrong if last else {"w": jnp.ones(3)}, root if last else 0, comm=comm)
        if kind is MismatchError:
            agree(comm, comm.size == 1 or (type(error) is kind and text.replace("'w'", "w") in str(error)), repr(error))
        else:
            agree(comm, type(error) is (kind if last else PeerError) and text in str(error), repr(error))


def test_read_only_arrays(comm, agree):
    """JAX's arrays never change: where bitring writes in place they are refused in words."""
    x = jnp.ones(3)
    for call in (
        lambda: bitring.DataParallel({"w": x}, "sgd", comm=comm),
        lambda: bitring.allreduce(np.ones(3, np.float32), out=x, comm=comm),
    ):
        error = raised(call)
        agree(comm, isinstance(error, (TypeError, ValueError)) and "writable" in str(error), repr(error))
    agree(comm, np.array_equal(x, np.ones(3)))


PARAMS = {"layer": {"w": np.zeros((40, 50), np.float32)}, "b": np.zeros(7, np.float32)}


def gradients_of(rank: int, step: int) -> Any:
    random = np.random.default_rng([rank, step])
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), PARAMS)


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_average_is_that_of_a_trainer_and_resumes(comm, agree, mpi_tmp_path, compression):
    """Weighted, inside jit and outside, bit for bit a DataParallel's; residuals come back from a checkpoint."""

    def new() -> Any:
        made = bitring.jax.average(comm=comm, compression=compression)
        chained = optax.chain(made, optax.sgd(0.1))
        return made, chained, jax.jit(chained.update), chained.init(PARAMS)

    made, chained, update, state = new()
    copies = jax.tree.map(np.copy, PARAMS)
    trainer = bitring.DataParallel(copies, bitring.SGD(lr=0.1), comm=comm, compression=compression)
    params: Any = jax.tree.map(jnp.asarray, PARAMS)
    for step in range(6):
        if step == 4:
            bitring.save_checkpoint(mpi_tmp_path / "run", made.trainer)
            made, chained, update, state = new()
            bitring.load_checkpoint(mpi_tmp_path / "run", made.trainer)
        weight = float((comm.rank + step) % 3 + (comm.size == 1))
        gradients = gradients_of(comm.rank, step)
        moved, state = (chained.update if step == 2 else update)(gradients, state, params, weight=weight)
        params = optax.apply_updates(params, moved)
        trainer.step(gradients, weight=weight)
        same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6, atol=1e-7), params, copies)
        agree(comm, all(jax.tree.leaves(same)), f"step {step}")
    agree(comm, made.trainer.steps == 6 and (comm.size == 1 or made.trainer.bytes_sent > 0))
    bits = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))
    agree(comm, len(set(comm.allgather(bits))) == 1, "replicas differ")
    if compression and comm.size > 1:
        kept = [x for plan in made.trainer.plans for x in plan.state_dict().values()]
        agree(comm, any(np.any(x) for x in kept), "no residuals")
    for each in (made.trainer, trainer):
        each.free()


def test_average_without_samples_and_its_errors(comm, agree):
    made = bitring.jax.average(comm=comm)
    error = raised(lambda: made.trainer)
    agree(comm, type(error) is RuntimeError and "before init(params)" in str(error), repr(error))
    state = made.init({"w": jnp.zeros(3)})
    ones = {"w": jnp.ones(3)}
    found, state = made.update(ones, state, weight=2)
    agree(comm, np.array_equal(found["w"], np.ones(3)))
    found, state = made.update(ones, state, weight=0)
    agree(comm, np.array_equal(found["w"], np.zeros(3)), "nobody had samples")
    bad = {"w": jnp.array([1, np.nan, 1]) if comm.rank == comm.size - 1 else jnp.ones(3)}
    error = raised(made.update, bad, state)
    agree(comm, type(error) is NonFiniteError, repr(error))
    error = raised(jax.jit(made.update), bad, state)
    agree(comm, "NonFiniteError: DataParallel.step" in str(error) and "'w'" in str(error), repr(error))
    error = raised(made.update, {"v": jnp.ones(3)}, state)
    agree(comm, type(error) is ValueError and "must be as init(params) had them" in str(error), repr(error))
    error = raised(jax.vmap(lambda x: made.update({"w": x}, state)), jnp.ones((2, 3)))
    agree(comm, type(error) is NotImplementedError and "cannot be mapped by vmap" in str(error), repr(error))
    found, state = made.update(ones, state)
    agree(comm, np.array_equal(found["w"], np.ones(3)), "it goes on")
    made.trainer.free()
    bare = bitring.jax.average(comm=comm)
    found, _ = bare.update(jnp.full(2, comm.rank, jnp.float32), bare.init(jnp.zeros(2)))
    agree(comm, np.allclose(found, (comm.size - 1) / 2), repr(found))
    bare.trainer.free()
