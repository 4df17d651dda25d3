"""Split models: the loss and gradients of one process whatever the placement, bits, bytes, errors, states."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

import bitring
from bitring.collectives.runtime.job import Job
from bitring.errors import MismatchError, NonFiniteError, PeerError
from bitring.models.layers import Layer, ReLU
from bitring.models.model import Model
from bitring.native import extension
from bitring.training.optimizer import Elementwise
from bitring.training.placement import native_messages
from bitring.training.tree import leaves

RNG = np.random.default_rng(0)


def mlp(dtype: Any = np.float64) -> Model:
    return bitring.MLP((7,), 5, (9, 6, 3), dtype=dtype, seed=1)


def cnn(dtype: Any = np.float64) -> Model:
    return bitring.CNN((8, 8), 10, dtype=dtype, seed=1)


def narrow(dtype: Any = np.float64) -> Model:
    """Fewer features than ranks, and a first layer whose input may be cut by rows."""
    return bitring.Sequence(
        [bitring.Dense("dense1", 2), bitring.ReLU(), bitring.Dense("dense2", 1), bitring.Dense("dense3", 3)],
        (3,),
        3,
        dtype=dtype,
        seed=2,
    )


def branches(dtype: Any = np.float64) -> Model:
    """A shared LSTM on two sequences, a sum of what two layers give, a value that is taken twice."""
    lstm = bitring.LSTM("lstm", 4)
    return bitring.Graph(
        {
            "a": (bitring.Select(0), "input"),
            "b": (bitring.Select(1), "input"),
            "code_a": (lstm, "a"),
            "code_b": (lstm, "b"),
            "both": (bitring.Concatenate(), ("code_a", "code_b")),
            "d1": (bitring.Dense("dense1", 6), "both"),
            "r1": (bitring.ReLU(), "d1"),
            "d2": (bitring.Dense("dense2", 6), "r1"),
            "sum": (bitring.Add(), ("d1", "d2")),
            "out": (bitring.Dense("dense3", 2), "sum"),
        },
        (2, 5, 3),
        2,
        dtype=dtype,
        seed=3,
    )


MODELS = {"mlp": mlp, "cnn": cnn, "narrow": narrow, "branches": branches}


def placements(name: str, ranks: int) -> list[Any]:
    last = ranks - 1
    found: list[Any] = ["data", "hybrid"]
    if name == "mlp":
        found += [
            {"dense1": "rows", "dense2": "columns", "dense3": "columns", "dense4": "rows"},
            {"dense1": "columns", "dense2": "rows", "dense3": last, "dense4": "samples"},
            {"dense1": 0, "dense2": last, "dense3": "rows", "dense4": last // 2},
        ]
    elif name == "cnn":
        found += [{"conv1": last, "dense1": "rows", "dense2": "columns"}]
    elif name == "narrow":
        found += [{"dense1": "rows", "dense2": "rows", "dense3": "columns"}]
    else:
        found += [
            {"code_a": 0, "code_b": last, "dense1": 0, "dense2": last, "dense3": 0},
            {"code_a": "samples", "code_b": last, "dense1": "columns", "dense2": "rows", "dense3": "columns"},
        ]
    found.append("hybrid_in_turns")
    learned = [name for name, w in MODELS[name]().parameters.items() if w.ndim > 1 and "recurrent" not in name]
    for count in [ranks] if ranks <= len(learned) else []:
        found += [
            bitring.Placement(stages=count, microbatches=3),
            bitring.Placement(stages=count, microbatches=4, schedule="gpipe"),
        ]
    return found


def batch(model: Model, samples: int) -> tuple[Any, Any]:
    random = np.random.default_rng(samples)
    x = random.standard_normal((samples, *model.input_shape)).astype(model.dtype)
    return x, random.integers(0, model.classes, samples)


def off(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest difference relative to the largest value of all."""
    largest = max(float(np.abs(w).max()) for w in wanted.values())
    return max(float(np.abs(found[name] - w).max()) for name, w in wanted.items()) / max(largest, 1e-300)


def splits(size: int) -> list[int]:
    """Numbers of replicas that there can be: 1, and 2 where they divide the ranks."""
    return [1, 2] if size % 2 == 0 else [1]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.timeout(300)
def test_loss_and_gradients_are_those_of_one_process(comm, agree, name, every):
    """Every placement, uneven sizes, fewer samples than ranks."""
    samples = [11, 1, 6] if every else [5] if name == "cnn" else [11, 1]
    for replicas in splits(comm.size) if every else splits(comm.size)[-1:]:
        for placement in placements(name, comm.size // replicas)[slice(None) if every else slice(1, 4, 2)]:
            proved(comm, agree, name, placement, samples, replicas)


def proved(comm: Any, agree: Any, name: str, placement: Any, samples: list[int], replicas: int = 1) -> None:
    """Loss and gradients of steps with so many samples are within 1e-13 of one process, bytes as predicted."""
    trainer = bitring.ModelParallel(
        MODELS[name](), bitring.SGD(lr=1.0), comm=comm, placement=placement, replicas=replicas
    )
    for count in samples:
        before = trainer.parameters()
        alone = MODELS[name]()
        for parameter, w in alone.parameters.items():
            w[...] = before[parameter]
        x, y = batch(alone, count)
        wanted, gradients = alone.loss_and_gradients(x, y, draw=bitring.Draw(trainer.steps))
        sent = trainer._nbytes_sent
        loss = trainer.step(x, y)
        after = trainer.parameters()
        # The update rounds to the parameters' size: 1e-13 of the largest of them and of the gradients.
        error = off({k: before[k] - after[k] for k in before}, gradients)
        what = f"{placement}, {replicas} replicas, {count} samples: {error:.1e}"
        agree(comm, abs(loss - wanted) < 1e-13 * abs(wanted), f"{what}, loss {loss} for {wanted}")
        agree(comm, error < 1e-13 * max(1.0, *(abs(w).max() for w in before.values())) * 4, what)
        # To the byte as in closed form: all but the gradients' sums.
        if count % replicas == 0:
            traffic = trainer._predicted(trainer._split.placement, count // replicas)
            values = sum(there[trainer.rank] + back[trainer.rank] for _, there, back in traffic.edges)
            agree(comm, trainer._nbytes_sent - sent == values, f"{what}: {values} bytes")
    trainer.free()


def dropping(dtype: Any = np.float64) -> Model:
    layers = [
        bitring.Dense("dense1", 9),
        bitring.ReLU(),
        bitring.Dropout(0.5),
        bitring.Dense("dense2", 6),
        bitring.Dropout(0.2),
        bitring.Dense("dense3", 3),
        bitring.Dense("dense4", 3),
        bitring.Dense("dense5", 3),
    ]
    return bitring.Sequence(layers, (7,), 3, dtype=dtype, seed=1)


def test_dropout_is_the_same_on_any_placement(comm, agree, monkeypatch):
    """Cut by samples, by features, in pieces and between replicas."""
    monkeypatch.setitem(MODELS, "dropping", dropping)
    replicas = splits(comm.size)[-1]
    pipeline = bitring.Placement(stages=comm.size // replicas, microbatches=3)
    for placement in ("data", "hybrid", "hybrid_in_turns", pipeline):
        proved(comm, agree, "dropping", placement, [11, 2], replicas)


class Centred(Layer):
    """It takes the batch's mean away, as batch normalization does."""

    mixes_samples = True

    def forward(self, workspace: Any, parameters: Any, x: Any) -> Any:
        return x - x.mean(0), lambda dy, emit: dy - dy.mean(0)


def test_layers_that_look_at_the_whole_batch(comm, agree, monkeypatch):
    """Are refused where they would get a part of it, and work on one rank."""

    def centred(dtype: Any = np.float64) -> Model:
        model = mlp(dtype)
        model.nodes[1] = model.nodes[1]._replace(layer=Centred())
        return model

    placement: Any = "data" if comm.size > 1 else bitring.Placement(stages=1, microbatches=2)
    with pytest.raises(ValueError, match=r"relu2 \(Centred\) computes over all samples of a batch, and would get"):
        bitring.ModelParallel(centred(), "sgd", comm=comm, placement=placement)
    monkeypatch.setitem(MODELS, "centred", centred)
    proved(comm, agree, "centred", {"dense1": "columns"} if comm.size == 1 else {"dense1": comm.size - 1}, [11])


def test_each_ranks_samples_in_turn(comm, agree):
    """Krizhevsky's other batch scheme: dense layers take one rank's samples after the other's."""
    for name, samples in (("cnn", [5]), ("branches", [11, 1])):
        proved(comm, agree, name, "hybrid_in_turns", samples, splits(comm.size)[-1])


class Python:
    """The extension is as if it were not there, for the messages of split models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native_messages, "native", lambda: None)


@pytest.mark.parametrize("encoder", [None, "float16"])
def test_both_executors_give_the_same_bits(comm, agree, monkeypatch, encoder):
    """The native engine's, and its reference in Python: losses and parameters, batches of several sizes."""
    for name, placement in (("branches", "hybrid"), ("mlp", {"dense1": "rows", "dense2": 0, "dense3": "columns"})):
        found = []
        for native in (True, False):
            with monkeypatch.context() as patch:
                if not native:
                    Python(patch)
                trainer = bitring.ModelParallel(
                    MODELS[name](np.float32), "sgd", comm=comm, placement=placement, value_compression=encoder
                )
                losses = [trainer.step(*batch(trainer.model, count)) for count in (6, 1, 7, 6)]
                found.append((losses, trainer.parameters(), trainer.bytes_sent))
                words = bitring.explain(trainer)
                runs_in = "the native engine" if native and extension is not None else "Python"
                agree(comm, f"messages by {runs_in}" in words, words)
                trainer.free()
        (losses, w, nbytes), others = found
        agree(comm, losses == others[0] and nbytes == others[2], f"{name}: {losses}, {others[0]}")
        agree(comm, all((w[key] == others[1][key]).all() for key in w), name)


def test_threads_take_turns_with_a_step(comm, agree, monkeypatch):
    """Its caller and the progress thread do, whichever comes first; here it is another thread each time."""
    guarded = Job._guarded

    def elsewhere(job: Job) -> bool:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(guarded, job).result()

    trainer = bitring.ModelParallel(mlp(), "sgd", comm=comm, placement="hybrid")
    losses = [trainer.step(*batch(mlp(), 6))]
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_guarded", elsewhere)
        losses += [trainer.step(*batch(mlp(), 6)) for _ in range(2)]
    agree(comm, losses == sorted(losses, reverse=True) and np.geterr()["over"] == "warn", f"{losses}, {np.geterr()}")
    trainer.free()


def test_more_messages_than_tags_are_refused(comm, agree):
    """And the next batch is trained with."""
    if comm.size != 2:
        pytest.skip("of two stages")
    placement = bitring.Placement(stages=comm.size, microbatches=2048)
    trainer = bitring.ModelParallel(mlp(), "sgd", comm=comm, placement=placement)
    with pytest.raises(ValueError, match="would send 2048 messages from one rank to another, which may be 2047"):
        trainer.step(*batch(mlp(), 2048))
    trainer.step(*batch(mlp(), 2))
    agree(comm, trainer.steps == 1)
    trainer.free()


def test_values_that_travel_encoded(comm, agree):
    """16 bits a value: half the bytes, gradients to about its precision; encoders that cannot are refused."""
    x, y = batch(mlp(np.float32), 11)
    sent, losses = [], []
    for encoder in (None, "float16"):
        trainer = bitring.ModelParallel(
            mlp(np.float32), "sgd", comm=comm, placement="hybrid", value_compression=encoder
        )
        losses.append(trainer.step(x, y))
        sent.append(trainer._nbytes_sent)
        trainer.free()
    agree(comm, sent[0] == 2 * sent[1] and abs(losses[0] - losses[1]) < 1e-2, f"{sent}, {losses}")
    for encoder in ("topk:density=0.1", "powersgd"):
        with pytest.raises(ValueError, match="value_compression must be an encoder whose payloads have a fixed size"):
            bitring.ModelParallel(mlp(np.float32), "sgd", comm=comm, value_compression=encoder)


def kept(trainer: Any) -> bytes:
    return b"".join(w.tobytes() for w in trainer._split.mine.values())


@pytest.mark.timeout(300)
def test_training_goes_the_same_way_and_replicas_are_equal_to_the_bit(comm, agree):
    """With momentum, in float32 and float64, batches smaller than the ranks and empty ones among them."""
    for dtype, bound in ((np.float32, 1e-5), (np.float64, 1e-12)):
        for replicas in splits(comm.size):
            for placement in ("data", {"dense1": "columns", "dense2": "rows", "dense4": 0}):
                alone, optimizer = mlp(dtype), bitring.SGD(lr=0.1, momentum=0.9)
                trainer = bitring.ModelParallel(
                    mlp(dtype), optimizer, comm=comm, placement=placement, replicas=replicas
                )
                state = optimizer.init(alone.parameters)
                for count in (8, 0, 1, 13, 2):
                    x, y = batch(alone, count)
                    loss, gradients = alone.loss_and_gradients(x, y)
                    if count:
                        optimizer.update(alone.parameters, gradients, state)
                    agree(comm, abs(trainer.step(x, y) - loss) < bound, f"{placement}: loss")
                agree(comm, trainer.steps == 5)
                error = off(trainer.parameters(), alone.parameters)
                agree(comm, error < bound, f"{placement}, {replicas} replicas, {dtype}: {error}")
                everyone = comm.allgather((trainer.rank, kept(trainer)))
                agree(comm, all(theirs == kept(trainer) for rank, theirs in everyone if rank == trainer.rank))
                trainer.free()


def test_a_state_goes_on_under_another_placement(comm, agree):
    optimizer = bitring.SGD(lr=0.1, momentum=0.9)
    first = bitring.ModelParallel(mlp(), optimizer, comm=comm, placement="hybrid")
    x, y = batch(mlp(), 10)
    for _ in range(2):
        first.step(x, y)
    state = first.state_dict()
    losses = [first.step(x, y) for _ in range(2)]
    other = {"dense1": "rows", "dense2": 0, "dense3": "columns"}
    second = bitring.ModelParallel(mlp(), optimizer, comm=comm, placement=other)
    second.load_state_dict(state)
    agree(comm, np.allclose([second.step(x, y) for _ in range(2)], losses, rtol=1e-12, atol=0) and second.steps == 4)
    third = bitring.ModelParallel(cnn(), optimizer, comm=comm)
    with pytest.raises(ValueError, match=r"load_state_dict: parameters/.* must be of shape"):
        third.load_state_dict(state)
    with pytest.raises(ValueError, match=r"optimizer/velocity/.* must be there, of shape"):
        second.load_state_dict({**state, "optimizer": {}})
    last = comm.rank == comm.size - 1
    for part in ("steps", "residuals", None):
        bad: Any = {key: x for key, x in state.items() if key != part} if part else None
        with pytest.raises(TypeError if last else bitring.PeerError, match=f"with '{part or 'parameters'}', a"):
            second.load_state_dict(bad if last else state)
        agree(comm, second.steps == 4)
    for trainer in (first, second, third):
        trainer.free()


@pytest.mark.parametrize("mode", ["sync", "delayed", "block_momentum:tau=2"])
def test_a_checkpoint_goes_on_under_another_placement(comm, agree, mpi_tmp_path, mode):
    """Parameters, slots and the mode's state; bit for bit where placement and replicas are the same."""
    optimizer: Any = bitring.SGD(lr=0.05, momentum=0.9) if "block" in mode else bitring.Adam(lr=0.01)
    x_y = batch(mlp(), 12)
    made: dict[str, Any] = {"comm": comm, "mode": mode}
    first = bitring.ModelParallel(mlp(), optimizer, placement="hybrid", replicas=splits(comm.size)[-1], **made)
    for _ in range(3):
        first.step(*x_y)
    bitring.save_checkpoint(mpi_tmp_path / "c.npz", first, epoch=3)
    losses = [first.step(*x_y) for _ in range(3)]
    same = bitring.ModelParallel(mlp(), optimizer, placement="hybrid", replicas=splits(comm.size)[-1], **made)
    agree(comm, bitring.load_checkpoint(mpi_tmp_path / "c.npz", same) == {"epoch": 3} and same.steps == 3)
    agree(comm, [same.step(*x_y) for _ in range(3)] == losses, "not bit for bit")
    other = bitring.ModelParallel(mlp(), optimizer, placement={"dense1": "rows", "dense2": 0}, **made)
    if mode == "sync":
        bitring.load_checkpoint(mpi_tmp_path / "c.npz", other)
        agree(comm, np.allclose([other.step(*x_y) for _ in range(3)], losses, rtol=1e-12, atol=0))
    with pytest.raises(bitring.CheckpointError, match="belongs to other training: here, "):
        bitring.load_checkpoint(mpi_tmp_path / "c.npz", bitring.ModelParallel(mlp(), bitring.SGD(lr=0.1), comm=comm))
    for trainer in (first, same, other):
        trainer.free()


def test_a_checkpoint_with_state_of_each_rank_is_refused(comm, agree, mpi_tmp_path):
    """A DataParallel's residuals, which would be lost."""
    made: dict[str, Any] = {"comm": comm, "compression": "onebit:block=64"}
    replicas = bitring.DataParallel(cnn(np.float32).parameters, bitring.SGD(lr=0.05), **made)
    split = bitring.ModelParallel(cnn(np.float32), bitring.SGD(lr=0.05), placement="data", **made)
    replicas.step({name: w + comm.rank for name, w in replicas.parameters.items()})
    bitring.save_checkpoint(mpi_tmp_path / "c.npz", replicas)
    with pytest.raises(bitring.CheckpointError, match=r"holds (arrays that each rank has of its own|residual, which)"):
        bitring.load_checkpoint(mpi_tmp_path / "c.npz", split)
    agree(comm, split.steps == 0)
    replicas.free()
    split.free()


def test_telemetry_is_of_conversions_and_of_the_exchange_between_replicas(comm, agree):
    made: dict[str, Any] = {"comm": comm, "placement": "hybrid", "replicas": splits(comm.size)[-1]}
    trainer = bitring.ModelParallel(mlp(np.float32), bitring.SGD(lr=0.05), compression="onebit:block=64", **made)
    agree(comm, trainer.telemetry() == {})
    trainer.step(*batch(mlp(np.float32), 12))
    told, parts = trainer.telemetry(), comm.size // trainer.replicas
    agree(
        comm,
        ("conversion_bytes" in told) == (parts > 1) and ("wait_seconds" in told) == (trainer.replicas > 1),
        repr(told),
    )
    agree(comm, told.get("conversion_seconds", 0.0) >= 0 and trainer.telemetry() == {}, repr(told))
    trainer.free()


def test_residuals_between_replicas_are_conserved(comm, agree, mpi_tmp_path):
    """What all replicas owe of a parameter, under one placement, is what they owe under another."""
    x, y = batch(mlp(np.float32), 12)
    made: dict[str, Any] = {"comm": comm, "compression": "topk:density=0.1", "replicas": splits(comm.size)[-1]}
    first = bitring.ModelParallel(mlp(np.float32), bitring.SGD(lr=0.05), placement="hybrid", **made)
    for _ in range(3):
        first.step(x, y)
    bitring.save_checkpoint(mpi_tmp_path / "c.npz", first)
    owed = first.state_dict()["residuals"]
    second = bitring.ModelParallel(mlp(np.float32), bitring.SGD(lr=0.05), placement="data", **made)
    bitring.load_checkpoint(mpi_tmp_path / "c.npz", second)
    again = second.state_dict()["residuals"]
    agree(comm, owed.keys() == again.keys() and all((owed[name] == again[name]).all() for name in owed))
    for trainer in (first, second):
        trainer.free()


def test_modes_and_compression_between_replicas(comm, agree):
    x, y = batch(mlp(np.float32), 12)
    for replicas in splits(comm.size):
        for mode, compression in (("local:tau=2", None), ("block_momentum:tau=2", "onebit:block=64")):
            trainer = bitring.ModelParallel(
                mlp(np.float32),
                bitring.SGD(lr=0.05),
                comm=comm,
                placement="hybrid",
                replicas=replicas,
                mode=mode,
                compression=compression,
            )
            losses = [trainer.step(x, y) for _ in range(20)]
            agree(comm, losses[-1] < losses[0], f"{mode}, {compression}: {losses}")
            told = "between replicas, were it exact and in every step, not by " in bitring.explain(trainer)
            agree(comm, told == (replicas > 1), bitring.explain(trainer))
            trainer.synchronize()
            everyone = comm.allgather((trainer.rank, kept(trainer)))
            agree(comm, all(theirs == kept(trainer) for rank, theirs in everyone if rank == trainer.rank))
            trainer.free()


def test_downpour_of_parts(comm, agree):
    """With one replica it is the optimizer alone; a rank pushes and fetches its part, and shared ones are equal."""
    x, y = batch(mlp(np.float32), 12)
    hybrid = {"dense1": "columns", "dense2": "rows", "dense3": "samples", "dense4": comm.size // 2 - 1}
    alone, split = (
        bitring.ModelParallel(mlp(np.float32), bitring.SGD(lr=0.05), comm=comm, placement="hybrid", mode=mode)
        for mode in ("sync", "downpour:fetch=1,push=1")
    )
    for _ in range(3):
        agree(comm, alone.step(x, y) == split.step(x, y))
    wanted, found = alone.parameters(), split.parameters()
    agree(comm, all((found[name] == w).all() for name, w in wanted.items()))
    for each in (alone, split):
        each.free()
    if comm.size % 2:
        return
    mode: dict[str, Any] = {"comm": comm, "mode": "downpour:fetch=1,push=1", "replicas": 2}
    trainer = bitring.ModelParallel(mlp(np.float32), bitring.SGD(lr=0.05), placement=hybrid, **mode)
    x, y = batch(mlp(np.float32), 12 + trainer.replica)
    losses = [trainer.step(x, y) for _ in range(10)]
    trainer.synchronize()
    mine = {} if trainer._split.trainer is None else trainer._split.trainer.parameters
    everyone = comm.allgather((trainer.replica, trainer.rank, sum(w.size for w in mine.values()), kept(trainer)))
    agree(comm, losses[-1] < losses[0], f"{losses}")
    agree(comm, all(each[3] == kept(trainer) for each in everyone if each[1] == trainer.rank), "replicas differ")
    values = sum(each[2] for each in everyone if each[0] == 0)  # each of them goes through one rank of a replica
    agree(comm, values == sum(w.size for w in trainer.model.parameters.values()), f"{values} values")
    shared = {name: w for name, w in trainer._split.mine.items() if name.startswith("dense3")}
    copies = comm.allgather((trainer.replica, {name: w.tobytes() for name, w in shared.items()}))
    agree(comm, all(theirs == copies[0][1] for _, theirs in copies))
    trainer.free()


@pytest.mark.parametrize("optimizer", [bitring.SGD(lr=0.05, momentum=0.9), bitring.Adam(lr=0.01)], ids=repr)
def test_a_checkpoint_of_a_store_goes_on_to_the_bit_where_the_order_is_fixed(comm, agree, mpi_tmp_path, optimizer):
    """Replicas that are gathered all, without staleness; its placement may be another."""
    replicas = splits(comm.size)[-1]
    mode = bitring.ParameterServer(gather=replicas, staleness=0)
    made: dict[str, Any] = {"comm": comm, "mode": mode, "replicas": replicas}
    hybrid = {"dense1": "columns", "dense2": "rows", "dense3": "samples", "dense4": comm.size // replicas - 1}
    first, same = (bitring.ModelParallel(mlp(), optimizer, placement=hybrid, **made) for _ in range(2))
    x, y = batch(mlp(), 12 + first.replica)
    for _ in range(3):
        first.step(x, y)
    bitring.save_checkpoint(mpi_tmp_path / "c.npz", first, epoch=3)
    state = first.state_dict()
    losses, wanted = [first.step(x, y) for _ in range(3)], first.parameters()
    for load in (lambda: bitring.load_checkpoint(mpi_tmp_path / "c.npz", same), lambda: same.load_state_dict(state)):
        load()
        agree(comm, same.steps == 3)
        agree(comm, [same.step(x, y) for _ in range(3)] == losses, "not bit for bit")
        agree(comm, all((wanted[name] == w).all() for name, w in same.parameters().items()))
    other = bitring.ModelParallel(mlp(), optimizer, placement="data", **made)
    bitring.load_checkpoint(mpi_tmp_path / "c.npz", other)
    agree(comm, np.allclose([other.step(x, y) for _ in range(3)], losses, rtol=1e-12, atol=0))
    for trainer in (first, same, other):
        trainer.free()


@pytest.mark.parametrize("mode", ["ssp", "downpour:fetch=2,push=2", "project_adam", "peers"])
def test_nothing_of_a_store_is_lost_under_another_placement(comm, agree, mpi_tmp_path, mode):
    """Replicas that have made different numbers of steps: parameters, slots, the sum of what pushes still owe."""
    made: dict[str, Any] = {"comm": comm, "mode": mode, "replicas": splits(comm.size)[-1]}
    if mode != "peers":
        made["compression"] = "onebit"
    first = bitring.ModelParallel(mlp(np.float32), bitring.SGD(lr=0.05, momentum=0.9), placement="hybrid", **made)
    x, y = batch(mlp(np.float32), 12 + first.replica)
    for _ in range(3 + first.replica):
        first.step(x, y)
    bitring.save_checkpoint(mpi_tmp_path / "c.npz", first)
    state = first.state_dict()
    made["replicas"] = 1
    second = bitring.ModelParallel(mlp(np.float32), bitring.SGD(lr=0.05, momentum=0.9), placement="data", **made)
    bitring.load_checkpoint(mpi_tmp_path / "c.npz", second)
    again = second.state_dict()
    for kind in ("parameters", "optimizer"):
        there = dict(leaves(again[kind]))
        agree(comm, all(np.array_equal(there[path], x) for path, x in leaves(state[kind])), kind)
    owed, still = state["residuals"], again["residuals"]
    agree(comm, all(np.allclose(still.get(name, 0.0), x, atol=1e-6) for name, x in owed.items()), "residuals")
    agree(
        comm,
        second.steps == state["steps"]
        and all((second.parameters()[n] == w).all() for n, w in state["parameters"].items()),
    )
    loss = second.step(*batch(mlp(np.float32), 12))
    agree(comm, np.isfinite(loss), repr(loss))
    for trainer in (first, second):
        trainer.free()


def test_downpour_sends_a_ranks_part(comm, agree):
    """Two replicas' shards, reached by messages: of what a rank has half goes to the other, and half comes back."""
    if comm.size % 2:
        pytest.skip("wants two replicas")
    model = bitring.MLP((784,), 10, hidden=(256, 64), seed=0)
    mode: dict[str, Any] = {"comm": comm, "mode": "downpour:fetch=1,push=1,servers=2", "replicas": 2}
    trainer = bitring.ModelParallel(model, bitring.SGD(lr=0.05), placement="hybrid", **mode)
    x, y = batch(model, 16)
    store = trainer._split.trainer
    assert store is not None
    before = store.bytes_sent
    for _ in range(4):
        trainer.step(x, y)
    trainer.synchronize()  # fetches once more
    part = sum(w.nbytes for w in store.parameters.values())
    sent = store.bytes_sent - before
    agree(comm, abs(part * comm.size / 2 / sum(w.nbytes for w in model.parameters.values()) - 1) < 0.01, f"{part}")
    agree(comm, 4 <= sent / part <= 4.5 * 1.01, f"{sent} bytes, a part has {part}")
    trainer.free()


class Fails(ReLU):
    """It raises when it is told to, or gives what is of another shape, there or back."""

    now: Any = False

    def forward(self, workspace: Any, parameters: Any, x: Any) -> Any:
        if self.now is True:
            raise RuntimeError("no memory")
        y, backward = super().forward(workspace, parameters, x)
        if self.now == "smaller":
            return y[:, :1], backward
        return y, (lambda dy, emit: backward(dy, emit)[:, :1]) if self.now == "smaller back" else backward


@pytest.mark.parametrize("stages", [False, True])
def test_what_fails_leaves_all_as_it_was(comm, agree, monkeypatch, stages):
    """NaN, an error in a layer, a bad argument, other batches: on one rank, and the next step is made."""
    model = mlp()
    last = comm.size - 1
    trouble = Fails()
    for i, node in enumerate(model.nodes):
        if isinstance(node.layer, ReLU):
            model.nodes[i] = node._replace(layer=trouble)
    count = min(comm.size, 4)
    placement = bitring.Placement(stages=count, microbatches=2) if stages and comm.size <= 4 else "hybrid"
    trainer = bitring.ModelParallel(model, bitring.SGD(lr=0.1), comm=comm, placement=placement)
    x, y = batch(model, 9)
    trainer.step(x, y)
    before = trainer.parameters()

    def fails(x: Any) -> Any:
        raise OSError("it cannot be arranged")

    def raised(*kinds: type[Exception], x: Any = x, y: Any = y) -> str:
        try:
            trainer.step(x, y)
        except Exception as error:
            agree(comm, isinstance(error, kinds), repr(error))
            return str(error)
        agree(comm, False, "raised nothing")
        return ""

    mine = comm.rank == 0
    trouble.now = mine
    text = raised(RuntimeError if mine else PeerError)
    agree(comm, "no memory" in text, text)
    for kind, words in (("smaller", "gives values of shape"), ("smaller back", "gives back of shape")):
        trouble.now = kind if mine else False
        text = raised(ValueError if mine else PeerError)
        agree(comm, words in text, text)
    trouble.now = False
    text = raised(NonFiniteError, x=np.full_like(x, np.nan))
    agree(comm, "the gradient of dense" in text, text)
    if comm.size > 1:
        mine = comm.rank == last
        text = raised(TypeError if mine else PeerError, y=y.astype(float) if mine else y)
        agree(comm, "y must be integers" in text, text)
        with monkeypatch.context() as patch:
            if mine:
                patch.setattr(model, "arranged", fails)
            text = raised(OSError if mine else PeerError)
        agree(comm, "cannot be arranged" in text, text)
        text = raised(MismatchError, x=x + 1 if mine else x)
        agree(comm, "ranks disagree on batch" in text, text)
        text = raised(MismatchError, x=x[: 9 - mine], y=y[: 9 - mine])
        agree(comm, "ranks disagree on samples" in text, text)
        trainer.optimizer = bitring.SGD(lr=0.2 if mine else 0.1)
        text = raised(MismatchError)
        agree(comm, "ranks disagree on optimizer" in text, text)
        trainer.optimizer = bitring.SGD(lr=0.1)
    after = trainer.parameters()
    agree(comm, all((after[name] == w).all() for name, w in before.items()) and trainer.steps == 1)
    trainer.step(x, y)
    agree(comm, trainer.steps == 2)
    for _ in range(2):
        trainer.free()
    with pytest.raises(RuntimeError, match=r"ModelParallel\.step: it has been freed"):
        trainer.step(x, y)


@dataclass(frozen=True)
class Unlucky(Elementwise):
    """Plain gradient descent that raises on the world's last rank when it is told to."""

    fails: ClassVar[bool] = False

    @property
    def slots(self) -> tuple[str, ...]:
        return ()

    def apply(self, w: Any, g: Any, slots: Any, t: Any, u: Any) -> None:
        w -= 0.1 * g
        if self.fails:
            raise OverflowError("no luck")


def test_an_update_that_fails_on_one_rank_is_made_on_none(comm, agree, monkeypatch):
    """Ranks that exchange one part do not hear of what fails in another."""
    x, y = batch(mlp(), 7)
    replicas = 2 if comm.size % 2 == 0 else 1
    for compression in (None, "onebit") if replicas == 2 else (None,):
        trainers = [
            bitring.ModelParallel(
                mlp(), Unlucky(), comm=comm, placement="hybrid", replicas=replicas, compression=compression
            )
            for _ in range(2)
        ]
        for trainer in trainers:
            trainer.step(x, y)
        with monkeypatch.context() as patch:
            patch.setattr(Unlucky, "fails", comm.rank == comm.size - 1)
            expected = OverflowError if comm.rank == comm.size - 1 else PeerError
            with pytest.raises(expected, match="no luck"):
                trainers[0].step(x, y)
        agree(comm, [trainer.steps for trainer in trainers] == [1, 1])
        for _ in range(2):
            losses = [trainer.step(x, y) for trainer in trainers]
            found = [trainer.parameters() for trainer in trainers]
            agree(comm, losses[0] == losses[1])
            agree(comm, all(np.array_equal(w, found[1][name]) for name, w in found[0].items()))
        for trainer in trainers:
            trainer.free()


@pytest.mark.parametrize("native", [True, False])
def test_memory_of_a_step_that_is_cut_short_stays(comm, agree, monkeypatch, native):
    """Messages may still arrive in it."""
    if comm.size < 2:
        pytest.skip("needs another rank")
    if not native:
        Python(monkeypatch)
    mine, model = comm.Dup(), mlp()
    trainer = bitring.ModelParallel(model, "sgd", comm=mine, placement="hybrid")
    x, y = batch(model, 9)
    trainer.step(x, y)
    alive = weakref.ref(trainer._split.exchange(9)[1])

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    if comm.rank == 0:
        monkeypatch.setattr(ReLU, "forward", interrupted)
    try:
        trainer.step(x, y)
    except BaseException as error:
        kind = KeyboardInterrupt if comm.rank == 0 else PeerError
        agree(comm, isinstance(error, kind), repr(error))
        error.__traceback__ = None
    del trainer
    gc.collect()
    agree(comm, alive() is not None)


def test_arguments_are_checked_on_all_ranks(comm, agree):
    def raised(kind: type[Exception], text: str, model: Any = None, **given: Any) -> None:
        try:
            bitring.ModelParallel(model or mlp(), given.pop("optimizer", "sgd"), comm=comm, **given)
        except Exception as error:
            agree(comm, isinstance(error, kind) and text in str(error), repr(error))
        else:
            agree(comm, False, f"{text}: raised nothing")

    raised(TypeError, "model must be a bitring.Model; got int", model=3)
    raised(ValueError, f"replicas must divide the {comm.size} ranks; got {comm.size + 1}", replicas=comm.size + 1)
    raised(ValueError, "placement must be 'data'", placement="all")
    raised(ValueError, "unknown optimizer 'nothing'", optimizer="nothing")
    if comm.size > 1:
        only = "hybrid" if comm.rank == 1 else "data"
        raised(MismatchError, "placement must be the same on all ranks", placement=only)


def test_auto_takes_what_is_predicted_to_take_least_and_explain_says_what(comm, agree):
    """Wide layers and few samples: hybrid; small ones and many: data, whatever the number of ranks."""
    for layers, samples, best in (((30, 2000, 2000), 4, "hybrid"), ((30, 40, 20), 4000, "data")):
        model = bitring.MLP(layers[:1], 10, layers[1:], dtype=np.float32, seed=1)
        trainer = bitring.ModelParallel(model, "sgd", comm=comm, placement="auto")
        trainer.step(*batch(model, samples))
        words = bitring.explain(trainer)
        agree(comm, f"placement {best if comm.size > 1 else 'data'!r}," in words, words)
        agree(comm, "considered 'hybrid': predicted" in words and "dense1" in words and "in all" in words, words)
        state = trainer.state_dict()
        later = bitring.ModelParallel(
            bitring.MLP(layers[:1], 10, layers[1:], dtype=np.float32), "sgd", comm=comm, placement="auto"
        )
        later.load_state_dict(state)  # before its first batch
        losses = [each.step(*batch(model, samples)) for each in (trainer, later)]
        agree(comm, abs(losses[0] - losses[1]) < 1e-5 and later.steps == 2, str(losses))
        agree(comm, bitring.explain(later).splitlines()[0] == words.splitlines()[0], bitring.explain(later))
        for each in (trainer, later):
            each.free()


def test_bytes_of_the_cards_network(comm, agree):
    """The network of 28×28 images, 64 a batch: on 4 ranks 6.67 MB out of a rank as data, 0.71 MB as hybrid."""
    model = bitring.CNN((28, 28), 10, seed=1)
    x, y = batch(model, 64)
    sent = {}
    for placement in ("data", "hybrid"):
        trainer = bitring.ModelParallel(bitring.CNN((28, 28), 10, seed=1), "sgd", comm=comm, placement=placement)
        trainer.step(x, y)
        sent[placement] = trainer.bytes_sent
        wanted = trainer._predicted(placement, 64).total[trainer.rank]
        agree(comm, abs(sent[placement] - wanted) <= 0.001 * wanted, f"{placement}: {sent[placement]}, not {wanted}")
        trainer.free()
    if comm.size == 4:
        agree(comm, round(sent["data"] / 1e6, 2) == 6.67 and round(sent["hybrid"] / 1e6, 2) == 0.71, str(sent))
