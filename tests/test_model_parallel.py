"""Split models: the loss and gradients of one process whatever the placement, bits, bytes, errors, states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bitring
from bitring.errors import MismatchError, NonFiniteError, PeerError
from bitring.models.layers import ReLU
from bitring.models.model import Model

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
@pytest.mark.timeout(240)
def test_loss_and_gradients_are_those_of_one_process(comm, agree, name, every):
    """Every placement, uneven sizes, fewer samples than ranks."""
    samples = [11, 1, 6] if every else [5] if name == "cnn" else [11, 1]
    for replicas in splits(comm.size) if every else splits(comm.size)[-1:]:
        for placement in placements(name, comm.size // replicas)[slice(None) if every else slice(1, 4, 2)]:
            model = MODELS[name]()
            trainer = bitring.ModelParallel(
                model, bitring.SGD(lr=1.0), comm=comm, placement=placement, replicas=replicas
            )
            for count in samples:
                before = trainer.parameters()
                alone = MODELS[name]()
                for parameter, w in alone.parameters.items():
                    w[...] = before[parameter]
                x, y = batch(alone, count)
                wanted, gradients = alone.loss_and_gradients(x, y)
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
                    traffic = trainer._predicted(trainer._chosen, count // replicas)
                    values = sum(there[trainer.rank] + back[trainer.rank] for _, there, back in traffic.edges)
                    agree(comm, trainer._nbytes_sent - sent == values, f"{what}: {values} bytes")
            trainer.free()


def kept(trainer: Any) -> bytes:
    return b"".join(w.tobytes() for w in trainer._mine.values())


@pytest.mark.timeout(120)
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
    with pytest.raises(ValueError, match="load_state_dict: parameters must be of shapes"):
        third.load_state_dict(state)
    with pytest.raises(ValueError, match=r"optimizer keeps .*; state has"):
        second.load_state_dict({**state, "optimizer": {}})
    for trainer in (first, second, third):
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
            trainer.synchronize()
            everyone = comm.allgather((trainer.rank, kept(trainer)))
            agree(comm, all(theirs == kept(trainer) for rank, theirs in everyone if rank == trainer.rank))
            trainer.free()


class Fails(ReLU):
    """It raises when it is told to."""

    now = False

    def forward(self, workspace: Any, parameters: Any, x: Any) -> Any:
        if self.now:
            raise RuntimeError("no memory")
        return super().forward(workspace, parameters, x)


@pytest.mark.parametrize("stages", [False, True])
def test_what_fails_leaves_all_as_it_was(comm, agree, stages):
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
    trouble.now = False
    text = raised(NonFiniteError, x=np.full_like(x, np.nan))
    agree(comm, "the gradient of dense" in text, text)
    if comm.size > 1:
        mine = comm.rank == last
        text = raised(TypeError if mine else PeerError, y=y.astype(float) if mine else y)
        agree(comm, "y must be integers" in text, text)
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
    trainer.free()


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


def test_auto_takes_what_sends_less_and_explain_says_what(comm, agree):
    model = bitring.MLP((30,), 10, (40, 20), dtype=np.float32, seed=1)
    trainer = bitring.ModelParallel(model, "sgd", comm=comm, placement="auto")
    x, y = batch(model, 4)
    trainer.step(x, y)
    words = bitring.explain(trainer)
    agree(comm, ("'hybrid'" if comm.size > 1 else "'data'") in words, words)
    agree(comm, "dense1" in words and "in all" in words, words)
    large = bitring.ModelParallel(
        bitring.MLP((30,), 10, (40, 20), dtype=np.float32, seed=1), "sgd", comm=comm, placement="auto"
    )
    large.step(*batch(model, 4000))
    agree(comm, "'data'" in bitring.explain(large))
    for each in (trainer, large):
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
