"""Sandblaster: the same bits whoever computes what, slow and failing replicas, and what travels."""

import time
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.collectives.runtime.objects import allgather
from bitring.errors import MismatchError, NonFiniteError
from bitring.training.coordinator import Kind
from bitring.training.lbfgs import LBFGS
from bitring.training.sandblaster import Sandblaster

RNG = np.random.default_rng(5)
X = RNG.standard_normal((480, 12))
Y = (X @ RNG.standard_normal((12, 4)) + RNG.standard_normal((480, 4))).argmax(1)


class Told(bitring.MLP):
    """An MLP that sleeps, raises or gives NaN when it is told to."""

    sleep = 0.0
    error: BaseException | None = None
    nan = False

    def loss_and_gradients(self, *args: Any, **more: Any) -> Any:
        time.sleep(self.sleep)
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


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], bytes]:
    """The result of one rank."""
    from mpi4py import MPI

    return trained(MPI.COMM_SELF)


@pytest.mark.parametrize("backups", [True, False])
def test_bits_of_one_rank_on_any_number(comm, agree, alone, backups):
    agree(comm, trained(comm, backups=backups) == alone)
    losses = alone[0]
    assert losses == sorted(losses, reverse=True)


def test_bits_with_ranks_of_any_speed(comm, agree, alone):
    w = model(comm.rank)
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    losses = []
    for step in range(6):
        w.sleep = 0.003 * ((comm.rank + step) % 3)
        losses.append(job.step(X, Y))
    agree(comm, (losses, packed(job.parameters())) == alone)
    agree(comm, packed(w.parameters) == alone[1])
    job.free()


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


def test_a_slow_rank_costs_little_and_keeps_nobody(comm, agree):
    """It sleeps for longer than all others need for the whole step."""
    slow = comm.size - 1
    w = model()
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    job.step(X, Y)
    job.synchronize()
    if comm.rank == slow and comm.size > 1:
        w.sleep = 2.0
    begin = time.monotonic()
    losses = [job.step(X, Y) for _ in range(2)]
    took = time.monotonic() - begin
    agree(comm, took < 2.0 or comm.rank == slow, f"{took:.1f} s for two steps")
    agree(comm, losses == sorted(losses, reverse=True))
    agree(comm, len(set(allgather(comm, tuple(losses), "test"))) == 1)
    job.free()


def test_the_coordinator_may_be_the_slow_one(comm, agree):
    w = model()
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    w.sleep = 1.5 if comm.rank == 0 and comm.size > 1 else 0.0
    begin = time.monotonic()
    job.step(X, Y)
    took = time.monotonic() - begin
    agree(comm, took < 1.5 or comm.rank == 0, f"{took:.1f} s")
    job.free()


def test_a_rank_that_raises_costs_its_portion_and_may_come_back(comm, agree, alone):
    w = model(comm.rank)
    job = Sandblaster(w, LBFGS(), comm=comm, portions=16)
    losses = []
    for step in range(6):
        if step == 2 and comm.rank == comm.size - 1:
            w.error = OSError("the disk is gone")
            with pytest.raises(OSError, match="the disk is gone"):
                job.step(X, Y)
            w.error = None
        losses.append(job.step(X, Y))
    agree(comm, (losses, packed(job.parameters())) == alone)
    job.free()


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
    shards = 8
    allowed = shards * (4 * 8 * (8 * memory + 8) + 32 * (job.evaluations - before))
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
    if comm.rank == 0:
        w.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            job.step(X, Y)
        w.error = None
    losses = [job.step(X, Y) for _ in range(2)]
    agree(comm, losses[1] < losses[0])
    job.free()


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
