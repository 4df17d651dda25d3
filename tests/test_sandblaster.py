"""Sandblaster: the same bits whoever computes what, slow and failing replicas, and what travels."""

import contextlib
import time
from collections import deque
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.collectives.runtime.objects import allgather
from bitring.errors import MismatchError, NonFiniteError
from bitring.training.coordinator import Kind
from bitring.training.lbfgs import LBFGS
from bitring.training.sandblaster import Sandblaster
from bitring.training.shard import parts_for, parts_of
from bitring.training.sum_tree import nodes_of

RNG = np.random.default_rng(5)
X = RNG.standard_normal((480, 12))
Y = (X @ RNG.standard_normal((12, 4)) + RNG.standard_normal((480, 4))).argmax(1)


class Told(bitring.MLP):
    """An MLP that waits, raises or gives NaN when it is told to."""

    held_up: Any = None  # says whether it still is
    error: BaseException | None = None
    nan = False

    def loss_and_gradients(self, *args: Any, **more: Any) -> Any:
        while self.held_up is not None and self.held_up():
            time.sleep(1e-3)
        if self.error is not None:
            raise self.error
        loss, gradients = super().loss_and_gradients(*args, **more)
        return (np.nan if self.nan else loss), gradients


def model(seed: int = 0, dtype: Any = np.float64) -> Told:
    return Told((12,), 4, (8,), dtype=dtype, seed=seed)


def packed(parameters: Any) -> bytes:
    return b"".join(w.tobytes() for w in parameters.values())


def trained(comm: Any, steps: int = 6, **settings: Any) -> tuple[list[float], bytes]:
    job = Sandblaster(model(comm.rank), LBFGS(), comm=comm, portions=16, **settings)
    losses = [job.step(X, Y) for _ in range(steps)]
    result = losses, packed(job.parameters())
    job.free()
    return result


def wait_for(comm: Any, w: Told, rank: int) -> Any:
    """No other rank computes a portion before ``rank`` has begun one; a communicator, to be freed at the end."""
    between = comm.Dup()
    others = [each for each in range(comm.size) if each != rank]
    told: list[Any] = []
    word = between.irecv(source=rank) if comm.rank != rank else None

    def held_up() -> bool:
        if word is None and not told:
            told.extend(between.isend(None, other) for other in others)
        if word is None or word.test()[0]:
            w.held_up = None
        return w.held_up is not None

    w.held_up = held_up
    return between


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], bytes]:
    """The result of one rank."""
    from mpi4py import MPI

    return trained(MPI.COMM_SELF)


def test_the_losses_are_of_the_whole_batch_at_the_new_parameters(comm, agree):
    w = model()
    job = Sandblaster(w, LBFGS(memory=3), comm=comm, portions=7)
    for _ in range(4):
        loss = job.step(X, Y)
        job.synchronize()
        agree(comm, abs(w.loss(X, Y) - loss) < 1e-12)
    job.free()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batches_that_change_and_portions_as_given(comm, agree, dtype):
    losses = []
    for given in ("arrays", "portions"):
        w = model(dtype=dtype)
        job = Sandblaster(w, LBFGS(), comm=comm, portions=3)
        for part in (slice(0, 300), slice(100, 400), slice(100, 400), slice(0, 300)):
            x, y = X[part].astype(dtype), Y[part]
            if given == "arrays":
                losses.append(job.step(x, y))
            else:
                losses.append(job.step((x[i : i + 100], y[i : i + 100]) for i in (0, 100, 200)))
        evaluations = job.evaluations
        job.free()
    agree(comm, losses[:4] == losses[4:])
    agree(comm, evaluations >= 4 + 3, f"{evaluations}: three batches were new")


@pytest.mark.parametrize("which", ["the last", "the coordinator's"])
def test_a_rank_that_is_held_up_keeps_nobody_and_its_late_result_does_not_count(comm, agree, which):
    """The others wait until it has begun a portion, and it does not end before another rank has made both steps."""
    if comm.size == 1:
        pytest.skip("needs another rank")
    slow, other = (comm.size - 1, 0) if which == "the last" else (0, comm.size - 1)
    between = comm.Dup()
    w = model()
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    job.step(X, Y)
    job.synchronize()
    before = job.evaluations
    word = between.irecv(source=other if comm.rank == slow else slow)

    begun: list[int] = []

    def held_up() -> bool:
        if comm.rank == slow and not begun:
            begun.extend(set(range(comm.size)) - {slow})
            for rank in begun:
                between.isend(None, rank)
        if word.test()[0]:
            w.held_up = None
        return w.held_up is not None

    w.held_up = held_up
    losses = [job.step(X, Y) for _ in range(2)]
    if comm.rank == other:
        between.isend(None, slow).wait()
    job.synchronize()
    agree(comm, losses == sorted(losses, reverse=True))
    agree(comm, len(set(allgather(comm, tuple(losses), "test"))) == 1)
    late = [each for each in job.records if each.replica == slow and each.evaluation > before]
    agree(comm, not any(each.counts for each in late))
    agree(comm, comm.rank > 0 or len(late) > 0, "it was given no portion")
    job.free()
    between.Free()


def test_a_rank_that_raises_costs_its_portion_and_may_come_back(comm, agree, alone):
    w = model(comm.rank)
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    losses, between = [], comm
    for step in range(6):
        if step == 2:
            between = wait_for(comm, w, comm.size - 1)
        if step == 2 and comm.rank == comm.size - 1:
            w.error = OSError("the disk is gone")
            with pytest.raises(OSError, match="the disk is gone"):
                job.step(X, Y)
            w.error = None
        losses.append(job.step(X, Y))
    agree(comm, (losses, packed(job.parameters())) == alone)
    job.free()
    between.Free()


@pytest.mark.single
def test_a_step_that_all_have_given_up_may_be_made_of_other_samples(comm, agree):
    w, other = model(), model()
    job, wanted = (Sandblaster(each, LBFGS(), comm=comm, portions=16) for each in (w, other))
    losses = [job.step(X, Y)]
    w.error = OSError("no such samples")
    for part in (slice(0, 100), slice(100, 200)):
        with pytest.raises(OSError, match="no such samples"):
            job.step(X[part], Y[part])
    w.error = None
    losses += [job.step(X, Y), job.step(X, Y)]
    agree(comm, losses == [wanted.step(X, Y) for _ in range(3)])
    agree(comm, packed(w.parameters) == packed(other.parameters))
    job.free()
    wanted.free()


@pytest.mark.single
def test_portions_that_count_are_not_lost_when_the_step_is_made_again(comm, agree, alone):
    w = model()
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    losses, calls = [], iter(range(1000))

    def held_up() -> bool:
        if next(calls) == 5:  # not the step's first
            w.error = OSError("the disk is gone")
        return False

    for step in range(6):
        w.held_up = held_up if step == 2 else None
        if step == 2:
            with pytest.raises(OSError, match="the disk is gone"):
                job.step(X, Y)
            w.error = None
        losses.append(job.step(X, Y))
    agree(comm, (losses, packed(job.parameters())) == alone)
    job.free()


@pytest.mark.single
def test_a_portion_that_comes_while_an_old_one_is_dropped_is_not_lost(comm, agree):
    class Raced(deque[tuple[int, int]]):
        """The job turns to the next evaluation between a look and what is done about it."""

        def popleft(self) -> tuple[int, int]:
            if self[0] == old:
                self[0] = new
            return super().popleft()

    job = Sandblaster(model(), LBFGS(), comm=comm, portions=16)
    job.step(X, Y)
    service, now = job._service, job._service.latest
    for old, new, wanted in (((now - 1, 3), (now, 5), 5), ((now, 3), (now + 1, 5), None)):
        service.assigned = Raced([old])
        agree(comm, service.has_work(now))
        agree(comm, service.take_portion(now) == wanted)
        agree(comm, list(service.assigned) == ([new] if wanted is None else []))
    service.assigned = deque()
    job.free()


def test_models_whose_loss_is_drawn_are_refused(comm):
    layers = [bitring.Dense("dense1", 3), bitring.Dropout(0.5)]
    with pytest.raises(ValueError, match="dropout2 is a Dropout, which draws anew"):
        Sandblaster(bitring.Sequence(layers, (2,), 3), LBFGS(), comm=comm)


def test_a_rank_that_leaves(comm, agree, alone):
    w = model(comm.rank)
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    steps = 6 if comm.rank < comm.size - 1 or comm.size == 1 else 2
    losses = [job.step(X, Y) for _ in range(steps)]
    if steps == 2:
        job.leave()
        with pytest.raises(RuntimeError, match=r"Sandblaster\.step: this rank has left"):
            job.step(X, Y)
    agree(comm, losses == alone[0][:steps])
    agree(comm, packed(job.parameters()) == alone[1])
    job.free()


def test_nan_is_raised_on_all_ranks_and_training_goes_on(comm, agree):
    w = model()
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    before = job.step(X, Y)
    parameters = packed(job.parameters())
    w.nan = True
    raised = None
    try:
        job.step(X[:200], Y[:200])
    except NonFiniteError as error:
        raised = str(error)
    agree(comm, raised is not None and "the loss is nan" in raised, str(raised))
    agree(comm, packed(job.parameters()) == parameters)
    w.nan = False
    agree(comm, job.step(X, Y) < before)
    job.free()


def test_ranks_with_other_samples(comm, agree):
    job = Sandblaster(model(), LBFGS(), comm=comm, portions=16)
    job.step(X, Y)
    x = X + 1.0 * (comm.rank == comm.size - 1)
    raised = None
    try:
        job.step(x, Y)
    except MismatchError as error:
        raised = str(error)
    last = comm.rank == comm.size - 1
    agree(comm, comm.size == 1 or not last or "gave other samples" in str(raised), str(raised))
    job.synchronize()
    agree(comm, np.isfinite(job.step(X, Y)))
    job.free()


def test_state_goes_on_on_any_number_of_ranks(comm, agree):
    from mpi4py import MPI

    w = model()
    job = Sandblaster(w, LBFGS(memory=4), comm=comm, portions=16)
    for _ in range(6):
        job.step(X, Y)
    state = job.state_dict()
    wanted = [job.step(X, Y) for _ in range(3)], packed(job.parameters())
    job.free()
    for other in (comm, MPI.COMM_SELF):
        again = Sandblaster(model(3), LBFGS(memory=4), comm=other, portions=16)
        again.load_state_dict(state)
        evaluations = again.evaluations
        agree(comm, ([again.step(X, Y) for _ in range(3)], packed(again.parameters())) == wanted)
        agree(comm, again.evaluations > evaluations >= 6)
        state_again = again.state_dict()
        agree(comm, state_again["numbers"]["iterations"] == 9)
        again.free()
    job = Sandblaster(model(), LBFGS(memory=3), comm=comm, portions=16)
    with pytest.raises(ValueError, match=r"Sandblaster\.load_state_dict: state is of memory 4, not 3"):
        job.load_state_dict(state)
    job.free()


@pytest.mark.single
def test_states_that_do_not_fit(comm):
    job = Sandblaster(model(), LBFGS(memory=4), comm=comm, portions=16)
    for _ in range(3):
        job.step(X, Y)
    state, before = job.state_dict(), packed(job.parameters())
    for key, wrong, text in (
        ("s", state["s"][:1], r"s must be of shape \(3, 140\), got \(1, 140\)"),
        ("y", state["y"][:, 1:], r"y must be of shape \(3, 140\), got \(3, 139\)"),
        ("gradient", state["gradient"][1:], r"gradient must be of shape \(140,\), got \(139,\)"),
        ("numbers", {"pairs": 3}, "numbers must be a dict of pairs, loss, step, slope, iterations, evaluations"),
    ):
        with pytest.raises(ValueError, match=text):
            job.load_state_dict({**state, key: wrong})
    assert packed(job.parameters()) == before
    job.free()


def test_the_coordinator_sends_and_gets_few_bytes(comm, agree, monkeypatch):
    """8·(8m + 8) per shard and iteration, and 32 per evaluation, beside the messages about portions."""
    from bitring.collectives.runtime import mailbox

    memory, about_portions = 5, {Kind.READY, Kind.DONE, Kind.WORK, Kind.COUNTS, Kind.LATE, Kind.SEND, Kind.OVER}
    head = 8
    nbytes: dict[Kind, int] = {}
    send = mailbox.Mailbox.send

    def counted(self: Any, rank: int, kind: int, serial: int = 0, numbers: Any = (), payload: Any = None) -> None:
        if payload is None:
            nbytes[Kind(kind)] = nbytes.get(Kind(kind), 0) + head + 8 * len(numbers)
        send(self, rank, kind, serial, numbers, payload)

    job = Sandblaster(model(), LBFGS(memory=memory), comm=comm, portions=16)
    for _ in range(memory + 2):
        job.step(X, Y)
    job.synchronize()
    monkeypatch.setattr(mailbox.Mailbox, "send", counted)
    before = job.evaluations
    for _ in range(4):
        job.step(X, Y)
    job.synchronize()
    monkeypatch.undo()
    everyone: list[dict[Kind, int]] = allgather(comm, nbytes, "test")
    total = sum(n for each in everyone for kind, n in each.items() if kind not in about_portions)
    nodes = sum(len(list(nodes_of(*parts_of(rank, comm.size), parts_for(comm.size)))) for rank in range(comm.size))
    assert nodes == comm.size or comm.size not in (1, 2, 4, 8)  # a rank whose parts are no whole subtree answers twice
    allowed = nodes * (4 * 8 * (8 * memory + 8) + 32 * (job.evaluations - before))
    agree(comm, 0 < total <= allowed, f"{total} of {allowed}")
    job.free()


def test_records_say_who_did_what(comm, agree):
    job = Sandblaster(model(), LBFGS(), comm=comm, portions=10)
    job.step(X, Y)
    job.synchronize()
    first = [each for each in job.records if each.evaluation == 1 and each.counts]
    agree(comm, (sorted(each.portion for each in first) == list(range(10))) == (comm.rank == 0))
    agree(comm, all(each.begin <= each.end and each.step == 1 for each in first))
    job.free()


def test_calls_in_the_wrong_place(comm, agree):
    job = Sandblaster(model(), LBFGS(), comm=comm, portions=16)
    with pytest.raises(ValueError, match="the batch has no samples"):
        job.step(X[:0], Y[:0])
    with pytest.raises(ValueError, match=r"Sandblaster\.step: x, y: arrays must have equal lengths, got 480, 3"):
        job.step(X, Y[:3])
    with pytest.raises(TypeError, match="x without y must be an iterable of portions, got ndarray"):
        job.step(X)
    loss = job.step(X, Y)
    job.free()
    job.free()
    with pytest.raises(RuntimeError, match=r"Sandblaster\.step: it has been freed"):
        job.step(X, Y)
    agree(comm, len(set(allgather(comm, loss, "test"))) == 1)


def test_bad_arguments_are_raised_on_all_ranks(comm, agree):
    optimizer: Any = bitring.SGD() if comm.rank == comm.size - 1 else LBFGS()
    with pytest.raises(TypeError, match=r"Sandblaster: optimizer must be bitring.LBFGS; got SGD"):
        Sandblaster(model(), optimizer, comm=comm)
    with pytest.raises(ValueError, match="Sandblaster: portions must be at least 1; got 0"):
        Sandblaster(model(), LBFGS(), comm=comm, portions=0)
    if comm.size > 1:
        with pytest.raises(MismatchError, match="Sandblaster: portions is"):
            Sandblaster(model(), LBFGS(), comm=comm, portions=3 + comm.rank)


def test_ctrl_c_in_a_step(comm, agree):
    """It ends the step on its rank; the rank may step on."""
    w = model()
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    between = wait_for(comm, w, 0)
    if comm.rank == 0:
        w.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            job.step(X, Y)
        w.error = None
    losses = [job.step(X, Y) for _ in range(2)]
    agree(comm, losses[1] < losses[0])
    job.free()
    between.Free()


def test_checkpoints(comm, agree, mpi_tmp_path):
    from mpi4py import MPI

    path = mpi_tmp_path / "job.npz"
    job = Sandblaster(model(), LBFGS(memory=3), comm=comm, portions=16)
    for _ in range(5):
        job.step(X, Y)
    bitring.save_checkpoint(path, job, seen=5)
    wanted = [job.step(X, Y) for _ in range(2)]
    job.free()
    agree(comm, True)
    for other in (comm, MPI.COMM_SELF):
        again = Sandblaster(model(1), LBFGS(memory=3), comm=other, portions=16)
        agree(comm, bitring.load_checkpoint(path, again) == {"seen": 5})
        agree(comm, [again.step(X, Y) for _ in range(2)] == wanted)
        again.free()
    job = Sandblaster(model(), LBFGS(memory=4), comm=comm, portions=16)
    with pytest.raises(bitring.CheckpointError, match="belongs to other training: here, optimizer is LBFGS"):
        bitring.load_checkpoint(path, job)
    job.free()


@pytest.mark.parametrize("second", [False, True])
def test_a_call_of_all_that_is_interrupted_can_be_made_again(comm, agree, monkeypatch, second):
    """By ranks that wait in it for the last one, or for its word that it has exchanged something, too."""
    job = Sandblaster(model(), LBFGS(), comm=comm, portions=16)
    calls, until, last = job._calls, job._calls._until, comm.rank == comm.size - 1
    count = 3 if second else 2  # that it waits

    def interrupted(there: Any) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            raise KeyboardInterrupt
        until(there)

    if not last:
        calls._until = interrupted
    if second or not last:
        with contextlib.suppress(KeyboardInterrupt):
            job.synchronize()
    calls._until = until
    losses = [job.step(X, Y)]
    if comm.rank == 0 and comm.size > 1 and not second:  # the last one comes first
        here = job._service.coordinator._here  # type: ignore[union-attr]
        while comm.size - 1 not in here:
            time.sleep(1e-3)
            here = job._service.coordinator._here  # type: ignore[union-attr]
    job.synchronize()
    losses.append(job.step(X, Y))
    agree(comm, comm.allgather(losses) == [losses] * comm.size)
    job.synchronize()
    job.free()
