"""Generalized requests that the MPI library polls."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import numpy as np
import pytest

from bitring.collectives.communicator import Communicator
from bitring.collectives.interop import polled_request
from bitring.collectives.requests import GeneralRequest, PersistentRequest
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.engine import engine


@pytest.fixture
def world(comm):
    world = Communicator(comm.Dup())
    yield world
    world.Free()


@pytest.fixture
def polled(comm):
    from mpi4py import MPI

    if not re.match(r"MPICH Version:\s*[5-9]", MPI.Get_library_version()):
        pytest.skip("the MPI library is not MPICH 5")
    assert polled_request._extension() is not None


@pytest.mark.parametrize("how", ["Waitall", "Waitany", "Waitsome", "Testall"])
def test_whoever_waits_in_the_library_does_the_work(world, polled, agree, monkeypatch, how: str):
    from mpi4py import MPI

    world.Allreduce(MPI.IN_PLACE, np.zeros(3))
    monkeypatch.setattr(engine, "start_thread", lambda: True)  # the progress thread is not told of these
    xs = [np.full(n, world.rank + 1.0) for n in (3, 40_000)]
    requests = [world.Iallreduce(MPI.IN_PLACE, x) for x in xs]
    if how == "Waitall":
        MPI.Request.Waitall(requests)
    elif how == "Testall":
        while not MPI.Request.Testall(requests):
            pass
    else:
        while any(requests):
            getattr(MPI.Request, how)(requests)
    agree(world, all((x == world.size * (world.size + 1) / 2).all() for x in xs), "wrong sum")


def test_it_takes_other_communicators_further_too(world, polled, agree, monkeypatch):
    """A rank may wait in one while others need its part of what it has begun in another."""
    from mpi4py import MPI

    other = world.Dup()
    for each in (world, other):
        each.Allreduce(MPI.IN_PLACE, np.zeros(3))
    monkeypatch.setattr(engine, "start_thread", lambda: True)
    xs = [np.full(5000, world.rank + 1.0) for _ in range(2)]
    first = other.Iallreduce(MPI.IN_PLACE, xs[0])
    if world.rank > 0:
        first.Wait()
    MPI.Request.Waitany([world.Iallreduce(MPI.IN_PLACE, xs[1])])
    if world.rank == 0:
        first.Wait()
    agree(world, all((x == world.size * (world.size + 1) / 2).all() for x in xs), "wrong sum")
    other.Free()


def wait(request):
    request.Wait()


def until_over(request):
    while not request.Test():
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_error_of_a_job_reaches_whoever_completes_its_request(world, agree, error: type[BaseException]):
    from mpi4py import MPI

    def fails(progress):
        yield
        raise error("no such luck")

    known = len(polled_request._known)
    told = []
    for complete in (MPI.Request.Waitall, MPI.Request.Waitany):
        part = world.Dup()
        with pytest.raises(MPI.Exception) as raised:
            complete([GeneralRequest(context_of(part), fails, "this")])
        told.append(raised.value.Get_error_string())
        part.Free()
    for complete in (wait, until_over):
        part = world.Dup()
        with pytest.raises(error, match="no such luck"):
            complete(GeneralRequest(context_of(part), fails, "this"))
        part.Free()
    part, x = world.Dup(), np.ones(5)
    part.Allreduce(MPI.IN_PLACE, x)  # the ranks' words about the failures do not reach the next communicator
    part.Free()
    agree(world, bool((x == world.size).all()), f"{x[0]} after the failures")
    agree(world, told[1] == f"{error.__name__}: no such luck", told[1])  # Waitall refers to statuses
    agree(world, len(polled_request._known) == known, "requests that are over are still known")


@pytest.mark.single
@pytest.mark.parametrize("how", ["Waitall", "Waitany", "Waitsome"])
def test_an_interrupt_ends_a_wait_in_the_library(world, polled, how: str):
    from mpi4py import MPI

    over, inside = False, threading.Event()

    def until_over(progress):
        while not over:
            if threading.current_thread() is threading.main_thread():
                inside.set()
            yield

    def interrupt() -> None:
        if inside.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    request = GeneralRequest(context_of(world), until_over, "this")
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(MPI.Exception):
        getattr(MPI.Request, how)([request])
    interrupter.join()
    over = True
    x = np.ones(3)
    world.Allreduce(MPI.IN_PLACE, x)  # what was interrupted is the wait, not the collective
    assert (x == 1).all()


def test_what_cannot_begin_leaves_no_request(world, agree):
    known = len(polled_request._known)
    part = world.Dup()
    part.Allreduce(None, np.ones(3))
    context_of(part).queue.breaks("it was told so")
    with pytest.raises(RuntimeError, match="unusable since it was told so"):
        part.Iallreduce(None, np.ones(3))
    agree(world, len(polled_request._known) == known, "a request that never began is still known")
    part.Free()


def test_a_test_that_fails_leaves_the_error_to_be_told(world, agree):
    over = False

    def fails_later(progress):
        while not over:
            yield
        raise ValueError("no such luck")

    def library():
        raise OSError("interrupted")

    part = world.Dup()
    part.Allreduce(None, np.ones(3))
    request = GeneralRequest(context_of(part), fails_later, "this")
    with pytest.raises(OSError, match="interrupted"):
        request._run.test(library)
    over = True
    with pytest.raises(ValueError, match="no such luck"):
        request.Wait()
    part.Free()
    agree(world, True)


@pytest.mark.single
def test_a_persistent_request_whose_wait_was_interrupted_is_not_freed_under_its_run(world, polled):
    over = False

    def until_over(progress):
        while not over:
            yield

    request = PersistentRequest(context_of(world), until_over, "this", None)
    request.Start()
    run = request._run
    assert run is not None
    run._interrupted(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        request.Test()
    with pytest.raises(RuntimeError, match="Free of an active request"):
        request.Free()
    over = True
    while not run.over:
        time.sleep(0.001)
    request.Free()
