"""Preemption: what signals do within the block, and that all ranks are given the same answer at the same place."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator

import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import allgather

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def send(number: int = signal.SIGTERM) -> None:
    """To this process, whose main thread has handled it when this returns."""
    signal.raise_signal(number)


@contextlib.contextmanager
def counting_jobs(comm: MPI.Intracomm) -> Generator[list[int]]:
    """How many jobs the communicator's ranks made within."""
    queue = context_of(comm).queue
    made = [-queue.count]
    yield made
    made[0] += queue.count


def trainer(comm: MPI.Intracomm, mode: bitring.Mode | str = "sync") -> bitring.DataParallel:
    return bitring.DataParallel({"w": np.zeros(8, np.float32)}, bitring.SGD(lr=0.1), comm=comm, mode=mode)


def step(training: bitring.DataParallel) -> None:
    training.step({"w": np.ones(8, np.float32)})


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_one_rank_is_every_ranks_answer(comm, agree, number: int):
    answers: list[bool] = []
    with bitring.Preemption(comm) as preemption:
        answers.append(preemption.requested)
        if comm.rank == comm.size - 1:
            send(number)
        answers += [preemption.requested, preemption.requested]
    answers.append(preemption.requested)  # after the block: the last answer
    agree(comm, answers == [False, True, True, True], str(answers))


def test_the_answer_is_never_another_on_another_rank(comm, agree):
    """Signals come at moments of their own, with a trainer and without."""
    random = np.random.default_rng(comm.rank)
    training = trainer(comm)
    for stepping in (False, True) * 3:
        answers: list[bool] = []
        with bitring.Preemption(comm) as preemption:
            pause = float(random.uniform(0.001, 0.02))
            sender = threading.Timer(pause, os.kill, (os.getpid(), signal.SIGUSR1))
            if comm.rank != 0 or comm.size == 1:
                sender.start()
            while not (answers and answers[-1]) and len(answers) < 5_000_000:
                if stepping:
                    step(training)
                answers.append(preemption.requested)
            if sender.ident is not None:
                sender.join()
            time.sleep(0.001)  # its signal has come by now
        agree(comm, len(set(comm.allgather(len(answers)))) == 1 and answers[-1], f"asked {len(answers)} times")
    training.free()


def test_after_a_step_the_answer_is_there_without_an_exchange(comm, agree):
    training = trainer(comm)
    answers: list[bool] = []
    with bitring.Preemption(comm) as preemption:
        step(training)
        answers.append(preemption.requested)
        if comm.rank == 0:
            send()
        step(training)
        with counting_jobs(comm) as jobs:
            answers.append(preemption.requested)
    agree(comm, answers == [False, True] and jobs == [0], f"{answers}, {jobs[0]} jobs")
    training.free()


def test_without_a_step_in_between_all_ranks_are_asked(comm, agree):
    """So an evaluation between two steps can be ended, too."""
    training = trainer(comm)
    with bitring.Preemption(comm) as preemption:
        step(training)
        first = preemption.requested
        if comm.rank == 0:
            send()
        with counting_jobs(comm) as jobs:
            second = preemption.requested
    agree(comm, (first, second) == (False, True) and jobs == [int(comm.size > 1)], f"{first}, {second}, {jobs}")
    training.free()


def test_ranks_that_got_apart_and_were_told_ask_alike(comm, agree):
    """Of a step that failed there is no answer."""
    training = trainer(comm, bitring.Local(tau=2))
    answers: list[bool] = []
    with bitring.Preemption(comm) as preemption:
        step(training)
        answers.append(preemption.requested)
        if comm.size > 1:
            with pytest.raises(bitring.MismatchError):
                step(training) if comm.rank == 0 else training.synchronize()
        if comm.rank == comm.size - 1:
            send()
        answers.append(preemption.requested)
    agree(comm, answers == [False, True], str(answers))
    training.free()


def test_an_evaluation_can_be_ended_in_modes_with_blocks(comm, agree):
    training = trainer(comm, bitring.Local(tau=50))
    with bitring.Preemption(comm) as preemption:
        step(training)
        first = preemption.requested
        training.synchronize()
        if comm.rank == 0:
            send()
        second = preemption.requested
    agree(comm, (first, second) == (False, True), f"{first}, {second}")
    training.free()


@pytest.mark.parametrize("mode", [bitring.Local(tau=3), bitring.BlockMomentum(tau=3)])
def test_modes_with_blocks_hear_of_it_at_the_next_exchange(comm, agree, mode: bitring.Mode):
    training = trainer(comm, mode)
    answers: list[bool] = []
    exchanges = 0
    with bitring.Preemption(comm) as preemption:
        for number in range(8):
            if number == 3 and comm.rank == comm.size - 1:
                send()
            step(training)
            with counting_jobs(comm) as jobs:
                answers.append(preemption.requested)
            exchanges += jobs[0]
    agree(comm, answers == [False] * 5 + [True] * 3 and exchanges == 0, f"{answers}, {exchanges} jobs")
    training.free()


def test_several_trainers_and_one_of_other_ranks(comm, agree):
    """A trainer on a part of the ranks tells these alone, so it is not asked."""
    part = comm.Split(comm.rank % 2, comm.rank)
    same = comm.Dup()
    one, two, partial = trainer(comm), trainer(same), trainer(part)
    for last, exchanges in ((one, 0), (two, 0), (partial, 1)):
        with bitring.Preemption(comm) as preemption:
            for training in (one, two, partial):
                if training is not last:
                    step(training)
            first = preemption.requested
            if comm.rank == 0:
                send()
            step(last)
            with counting_jobs(comm) as jobs:
                second = preemption.requested
        right = (first, second) == (False, True) and jobs == [exchanges if comm.size > 1 else 0]
        agree(comm, right, f"{first}, {second}, {jobs[0]} jobs")
    for training in (one, two, partial):
        training.free()
    part.Free()
    same.Free()


def test_ranks_in_different_calls_are_told(comm, agree):
    message = ""
    with bitring.Preemption(comm) as preemption:
        try:
            if comm.rank == 0:
                _ = preemption.requested
            else:
                allgather(comm, 1, "test")
        except bitring.MismatchError as error:
            message = str(error)
        asked = preemption.requested
    agree(comm, not asked and ("Preemption.requested" in message or comm.size == 1), message)


def test_only_in_the_main_thread(comm, agree):
    errors: list[Exception] = []

    def enter() -> None:
        try:
            with bitring.Preemption(comm):
                errors.append(AssertionError("entered"))
        except (RuntimeError, bitring.PeerError) as error:
            errors.append(error)

    if comm.rank == comm.size - 1:
        thread = threading.Thread(target=enter, name="loader")
        thread.start()
        thread.join()
        wanted = "Preemption: expected in the main thread, which alone can mind signals; got the thread 'loader'"
    else:
        enter()
        wanted = f"Preemption: rank {comm.size - 1} could not take part: RuntimeError: Preemption: expected in the "
    agree(comm, str(errors[0]).startswith(wanted), str(errors[0]))
    agree(comm, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)


def test_misuse_is_named(comm, agree):
    texts: list[str] = []
    preemption = bitring.Preemption(comm)
    with pytest.raises(RuntimeError) as caught:
        _ = preemption.requested
    texts.append(str(caught.value))
    with preemption:
        with pytest.raises(RuntimeError) as caught, preemption:
            pass
        texts.append(str(caught.value))
        if comm.rank == 0:
            send()  # still noted
        asked = preemption.requested
    with pytest.raises(TypeError) as refused:
        bitring.Preemption("world")  # type: ignore[arg-type]
    texts.append(str(refused.value))
    agree(comm, asked)
    agree(comm, texts == [
        "Preemption.requested: expected inside the block `with Preemption(comm) as preemption:`",
        "Preemption: expected a new one for each `with` block; got one that was entered before",
        "Preemption: comm must be an MPI.Intracomm such as MPI.COMM_WORLD; got str",
    ], str(texts))  # fmt: skip


@pytest.mark.single
def test_earlier_handlers_are_called_and_come_back(comm):
    heard: list[int] = []

    def mine(number: int, frame: object) -> None:
        heard.append(number)

    signal.signal(signal.SIGTERM, mine)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with bitring.Preemption(comm) as outer:
            with bitring.Preemption(comm) as inner:
                send()
                assert outer.requested
                assert inner.requested
            send()
        assert heard == [signal.SIGTERM] * 2
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        send(signal.SIGUSR1)  # ignored, as before
        # One that the block put in place stays.
        with bitring.Preemption(comm):
            signal.signal(signal.SIGUSR1, mine)
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


@pytest.mark.single
def test_a_handler_written_in_c_comes_back(comm, tmp_path):
    """Python takes it for the default."""
    with (tmp_path / "stacks").open("w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        try:
            with bitring.Preemption(comm) as preemption:
                send(signal.SIGUSR1)
                assert preemption.requested
            assert not (tmp_path / "stacks").read_text()
            send(signal.SIGUSR1)
            assert "test_a_handler_written_in_c_comes_back" in (tmp_path / "stacks").read_text()
        finally:
            faulthandler.unregister(signal.SIGUSR1)


@pytest.mark.single
def test_an_exception_restores_the_handlers(comm):
    with pytest.raises(KeyError), bitring.Preemption(comm):
        raise KeyError("lost")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.single
def test_signals_end_a_forked_child(comm):
    """As those expect that end their workers by them."""
    runs, says = os.pipe()
    with bitring.Preemption(comm) as preemption:
        child = os.fork()
        if child == 0:
            os.write(says, b".")
            time.sleep(20)
            os._exit(1)
        os.read(runs, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not preemption.requested


TWO_SIGNALS = """
import signal
from types import SimpleNamespace
import bitring
from bitring.training import preemption as module
now = 0.0
module.time = SimpleNamespace(monotonic=lambda: now)
with bitring.Preemption() as preemption:
    signal.raise_signal(signal.SIGUSR1)
    now = 0.9
    signal.raise_signal(signal.SIGTERM)  # so soon after it, the same
    assert preemption.requested
    now = 1.1
    print("now", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("lives")
"""


@pytest.mark.single
def test_a_second_signal_ends_at_once(clean_environment):
    done = subprocess.run(
        [sys.executable, "-c", TWO_SIGNALS], env=clean_environment(), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "now\n"), done.stderr
