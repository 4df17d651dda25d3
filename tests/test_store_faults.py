"""A store, and a trainer of one, when a rank raises, ends, dies, is interrupted, or does not come; at any level."""

import importlib
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bitring.native import native

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
faults: Any = importlib.import_module("store_faults")

pytestmark = pytest.mark.single

BEGIN = """
import os, signal, sys, threading, time
import mpi4py
mpi4py.rc.thread_level = sys.argv[2] if len(sys.argv) > 2 else "multiple"
import numpy as np
from mpi4py import MPI
import bitring
from bitring.collectives.runtime import watch
comm, how = MPI.COMM_WORLD, sys.argv[1]

def print(*words):  # a line at a time
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
"""

Ranks = Callable[..., subprocess.CompletedProcess[str]]


def run(on_ranks: Ranks, tmp_path: Path, text: str, *arguments: str, ranks: int = 3, **env: str) -> str:
    """The output of both kinds of the script on so many ranks; it must end within its time."""
    script = tmp_path / "script.py"
    script.write_text(BEGIN + text)
    done = on_ranks(ranks, script, *arguments, env=env, timeout=150)
    return done.stdout + done.stderr


TRIALS = {
    "an owner is killed": faults.Trial("kill", "asynchronous:scale=none", 1, 3, None, 40, 0, 6, 1e-3),
    "a worker is killed": faults.Trial("kill", "soft_sync:gather=2", 1, 3, "float16", 200_000, 2, 6, 0.0),
    "one stops in shared memory": faults.Trial("stop", "ssp:staleness=1", None, 3, None, 40, 1, 5, 0.0),
    "one stops before all meet": faults.Trial("stop", "project_adam", 1, 3, None, 40, 1, 9, 1e-3),
    "an owner is killed whose shard has a copy": faults.Trial(
        "kill", "ssp:staleness=1", 1, 3, None, 200_000, 0, 6, 2e-3, 1
    ),
    "the keeper of a copy is killed": faults.Trial("kill", "store", 1, 3, None, 40, 1, 6, 1e-3, 1),
    "one leaves": faults.Trial("leave", "backup_workers:gather=2", 4, 3, None, 40, 1, 4, 0.0),
    "one ends": faults.Trial("end", "ssp:staleness=1", 4, 3, None, 40, 1, 4, 0.0),
    "one raises": faults.Trial("exception", "peers", None, 2, None, 40, 1, 4, 0.0),
    "one has a NaN": faults.Trial("nan", "hogwild:locks=true", None, 2, None, 40, 1, 4, 0.0),
}


@pytest.fixture(scope="module")
def under_way() -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """All trials; they mostly wait, so several run at a time."""
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    if "HYDRA" not in subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout:
        pytest.skip("needs the mpirun of MPICH, which can be told to let the others live")
    with ThreadPoolExecutor(4) as pool:
        yield {name: pool.submit(faults.run_trial, trial) for name, trial in TRIALS.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRIALS)
def test_nobody_hangs_and_who_it_was_is_said(under_way, name):
    if native() is None and TRIALS[name].mode.startswith("hogwild"):
        pytest.skip("there is no native engine")
    result = under_way[name].result()
    assert not result["wrong"], result


def test_a_list_of_trials_is_the_same_again_and_covers_all_pairs():
    trials = list(itertools.islice(faults.draw(0), 300))
    assert trials == list(itertools.islice(faults.draw(0), 300))
    assert {(t.fault, t.mode) for t in trials} == set(itertools.product(faults.FAULTS, faults.MODES))
    assert {(t.fault, t.servers, t.victim == 0) for t in trials} == set(
        itertools.product(faults.FAULTS, faults.SERVERS, (False, True))
    )


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_300_faults(tmp_path):
    results = faults.run_trials(300, 0, tmp_path / "faults.json", jobs=2)
    assert len(results) == 300
    assert [result for result in results if result["wrong"]] == []


STORE = """
store = bitring.ParameterStore({"w": np.zeros(10)}, bitring.SGD(lr=1.0), comm=comm, staleness=0, servers=3)
for c in range(10):
    if comm.rank == 1 and c == 3:
        raise OSError("no data")
    store.get(), store.inc({"w": -np.ones(10)}), store.clock()
print("rank", comm.rank, "has", store.synchronize()["w"][0], store.clocks)
store.free()
"""


def test_a_store_goes_on_without_a_rank_that_has_raised(on_ranks, tmp_path):
    said = run(on_ranks, tmp_path, STORE, "raise")
    assert "rank 0 has 23.0 [10.0, inf, 10.0]" in said and "rank 2 has 23.0 [10.0, inf, 10.0]" in said, said


WAITING = """
store = bitring.ParameterStore({"w": np.zeros(10)}, bitring.SGD(lr=1.0), comm=comm, staleness=0, servers=3)
store.get()
if comm.rank == 0:
    store.inc({"w": -np.ones(10)}), store.clock()
    if how == "wait":
        os.environ["BITRING_TIMEOUT"] = "1.5"
        watch.timeout.cache_clear()
    try:
        if how == "interrupt":
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        store.get()
    except KeyboardInterrupt:
        print("interrupted")
        comm.send(None, 1)
    except TimeoutError as error:
        print(error)
        [comm.send(None, rank) for rank in (1, 2)]
        os._exit(0)
else:
    comm.recv(source=0)
    if how == "wait":
        os._exit(0)
    store.inc({"w": -np.ones(10)}), store.clock()
print("rank", comm.rank, "has", store.get()["w"][0])
store.free()
"""


def test_an_interrupted_wait_is_over_and_the_store_goes_on(on_ranks, tmp_path):
    said = run(on_ranks, tmp_path, WAITING, "interrupt", ranks=2)
    assert "interrupted" in said and "rank 0 has 2.0" in said and "rank 1 has 2.0" in said, said


def test_a_wait_is_under_the_timeout_and_names_who_is_waited_for(on_ranks, tmp_path):
    said = run(on_ranks, tmp_path, WAITING, "wait")
    words = r"rank 0 has waited \d+ s in ParameterStore\.get; messages due from ranks \[1, 2\] \(BITRING_TIMEOUT=1\.5\)"
    assert re.search(words, said), said


LEVELS = """
import logging, pathlib
watch.SILENCE_SECONDS = 20.0 if sys.argv[2] == "multiple" else 1.5
named = pathlib.Path(sys.argv[3])

class Names(logging.Handler):
    def emit(self, record):
        print(record.getMessage())
        named.touch()

together = bitring.Communicator(comm)
x = np.ones(4)
for _ in range(4):  # by the way past the engine, where there is one
    together.Allreduce(MPI.IN_PLACE, x)
store = bitring.ParameterStore({"w": np.zeros(1000)}, bitring.SGD(lr=1.0), comm=comm, servers=2)
if comm.rank == 0:
    for c in range(10):
        store.get(), store.inc({"w": -np.ones(1000)}), store.clock()
together.Allreduce(MPI.IN_PLACE, x)
store.synchronize()
if comm.rank == 1:  # in no call of bitring's until rank 0 has what it wants, or has complained
    comm.send(None, 0)
    while not (comm.iprobe(source=0) or named.exists()):
        time.sleep(0.01)
else:
    logging.getLogger("bitring").addHandler(Names())
    comm.recv(source=1)
    store.get()
    print("got it", "after a complaint" if named.exists() else "at once")
    comm.send(None, 1)
if comm.rank == 1:
    store.get()
    comm.recv(source=0)
store.free()
print("through at", MPI.Query_thread())
"""


@pytest.mark.parametrize("level", ["funneled", "serialized", "multiple"])
def test_a_rank_in_a_collective_serves_at_every_thread_level(on_ranks, tmp_path, level):
    """One that computes does with multiple; below it, it is named."""
    said = run(on_ranks, tmp_path, LEVELS, "level", level, str(tmp_path / "named"), ranks=2)
    assert said.count("through at") == 2, said
    assert ("got it at once" in said) == (level == "multiple"), said
    words = (
        r"rank 0 has waited \d+ s in ParameterStore\.get; "
        r"(ranks that have not come to it: \[1\]|messages due from ranks \[1\])"
    )
    assert bool(re.search(words, said)) == (level != "multiple"), said
    assert ("MPI's thread level is below multiple" in said) == (level != "multiple"), said


LAST_WORDS = """
store = bitring.ParameterStore({"w": np.zeros(4)}, bitring.SGD(lr=1.0), comm=comm, servers=2, staleness=0)
store.synchronize()
if comm.rank == 1:
    store.leave()
    comm.recv(source=0)
else:
    for c in range(3):
        store._table.pull({"w": np.array([0])})  # of this rank's shard
        store.clock()
    comm.send(None, 1)
store.free()
print("through")
"""


@pytest.mark.parametrize("level", ["serialized", "multiple"])
def test_what_a_rank_says_last_goes_out_though_it_comes_to_no_other_call(on_ranks, tmp_path, level):
    assert run(on_ranks, tmp_path, LAST_WORDS, "leave", level, ranks=2).count("through") == 2


DROPPED = """
def main():
    w = {"w": np.zeros(1000)}
    steps = 3 if comm.rank else 12
    with bitring.DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode="ssp:staleness=1,servers=2") as trainer:
        for step in range(steps):
            trainer.step({"w": -np.ones(1000)})
            time.sleep(0.0 if comm.rank else 0.05)
    if comm.rank == 0:
        print("rank 0 has", w["w"][0])
main()
gc.collect()
if comm.rank and how == "stays":
    comm.recv(source=0)
"""


@pytest.mark.parametrize("ends", ["", "with trainer:"])
def test_a_trainer_that_is_dropped_has_left_and_its_shard_stays(on_ranks, tmp_path, ends):
    text = "import gc\n" + DROPPED
    if not ends:  # it is not left by its block, but dropped
        text = (
            text.replace("    with bit", "    trainer = bit")
            .replace(" as trainer:", "")
            .replace("        for", "    for")
        )
        text = text.replace("            t", "        t")
    assert "rank 0 has 15.0" in run(on_ranks, tmp_path, text, "dropped", ranks=2)


FREED = """
for servers in (None, 2):
    with bitring.ParameterStore({"w": np.zeros(4)}, bitring.SGD(lr=1.0), comm=comm, servers=servers) as store:
        store.synchronize()
    store.free()
    trainer = bitring.DataParallel([np.zeros(4)], "sgd:lr=1", comm=comm, mode=bitring.ParameterServer(servers=servers))
    trainer.free()
    for call in (lambda: trainer.step([np.ones(4)]), trainer.synchronize):
        try:
            call()
            print("it was not refused")
        except RuntimeError as error:
            assert str(error) == "DataParallel: it has been freed"
if comm.rank == 1:
    raise OSError("the disk is gone")
comm.recv(source=1)
"""


def test_an_exception_after_the_end_of_all_stores_ends_all_ranks(on_ranks, tmp_path):
    said = run(on_ranks, tmp_path, FREED, "freed", ranks=2)
    assert "[rank 1] OSError: the disk is gone" in said and "it was not refused" not in said, said


INTERRUPTS = """
def interrupted(call, after=0.2):
    try:
        threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        call()
    except KeyboardInterrupt:
        return comm.send("it was", 1 - comm.rank)
    print("it was not interrupted")

def wait():  # until the other one was
    while not comm.iprobe():
        time.sleep(0.01)
    comm.recv()

for servers in (None, 2):
    w, g = {"w": np.zeros(4)}, {"w": -np.ones(4)}
    mode = bitring.ParameterServer(servers=servers, staleness=0, push=2, fetch=6)
    trainer = bitring.DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode=mode)
    if comm.rank == 0:
        for step in range(3):
            trainer.step(g)
        interrupted(lambda: trainer.step(g))
        trainer.step(g)
        interrupted(trainer.synchronize)
    else:
        trainer.step(g)
        wait()
        for step in range(3):
            trainer.step(g)
        wait()
        interrupted(lambda: time.sleep(60))
    for _ in range(2):
        trainer.synchronize()
    print("rank", comm.rank, "has", w["w"][0])
    if comm.rank == 0:
        wait()
        interrupted(trainer.free)
    else:
        wait()
    trainer.free()
"""


def test_who_is_interrupted_where_all_meet_meets_the_others_again(on_ranks, tmp_path):
    said = run(on_ranks, tmp_path, INTERRUPTS, "interrupt", ranks=2)
    assert all(said.count(f"rank {rank} has 8.0") == 2 for rank in range(2)), said
    assert "it was not interrupted" not in said, said


GROUP = """
world, x = bitring.Communicator(comm), np.ones(4)
world.Allreduce(MPI.IN_PLACE, x)
group = comm.Split(comm.rank < 2)
if comm.rank < 2:
    store = bitring.ParameterStore({"w": np.zeros(4)}, bitring.SGD(lr=1.0), comm=group, servers=2)
    if comm.rank == 1:
        raise OSError("the disk is gone")
try:
    world.Allreduce(MPI.IN_PLACE, x)
except (bitring.PeerError, bitring.DeadRankError) as error:
    print("rank", comm.rank, "heard of it")
"""


def test_who_has_raised_is_named_on_every_communicator(on_ranks, tmp_path):
    said = run(on_ranks, tmp_path, GROUP, "raise")
    assert "rank 0 heard of it" in said and "rank 2 heard of it" in said, said


REFUSED = """
class Refuses(bitring.Optimizer):
    slots, counters = (), ()
    def update_parameter(self, w, g, slots):
        if comm.rank == 1:
            raise ValueError("not this one")

for _ in range(6):
    w, g = [np.zeros(500), np.zeros(500)], [np.ones(500), np.ones(500)]
    trainer = bitring.DataParallel(w, Refuses(), comm=comm.Dup(), mode="asynchronous")
    for call in (lambda: [trainer.step(g) for _ in range(50)], trainer.free):
        try:
            call()
        except (ValueError, bitring.PeerError) as error:
            print("rank", comm.rank, "has a", type(error).__name__)
print("over")
"""


def test_an_optimizer_that_raises_on_a_shard_is_an_error_on_all_ranks_and_no_crash_at_the_end(on_ranks, tmp_path):
    script = tmp_path / "refused.py"
    script.write_text(BEGIN + REFUSED)
    done = on_ranks(2, script, "refused", timeout=150)
    said = done.stdout + done.stderr
    assert said.count("rank 1 has a ValueError") == 12 and said.count("rank 0 has a PeerError") == 12, said
    assert done.returncode == 0 and said.count("over") == 2, said


ENDED = """
from bitring.training.store import service_job
service_job.LEFT_SECONDS = 0.3
world, x = bitring.Communicator(comm), np.ones(4)
world.Allreduce(MPI.IN_PLACE, x)
store = bitring.ParameterStore({"w": np.zeros(4)}, bitring.SGD(lr=1.0), comm=comm, servers=2)
if comm.rank == 1:
    sys.exit()
time.sleep(1.0)
store.inc({"w": -np.ones(4)})
print("rank 0 has", store.synchronize()["w"][0])
try:
    world.Allreduce(MPI.IN_PLACE, x)
except bitring.DeadRankError as error:
    print(error)
"""


def test_who_has_ended_and_only_serves_is_missed_in_a_collective(on_ranks, tmp_path):
    said = run(on_ranks, tmp_path, ENDED, "end", ranks=2)
    assert "rank 0 has 1.0" in said and "Allreduce: rank 1 is gone" in said, said
