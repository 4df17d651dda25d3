"""Sandblaster when a rank dies or ends before the others."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.single

START = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
import bitring
comm = MPI.COMM_WORLD
last = comm.rank == comm.size - 1
def die():
    os.kill(os.getpid(), signal.SIGKILL)
class Model(bitring.Softmax):
    portions = None  # it dies after so many
    def loss_and_gradients(self, *args, **more):
        if self.portions is not None:
            self.portions -= 1
            if self.portions < 0:
                die()
        return super().loss_and_gradients(*args, **more)
rng = np.random.default_rng(0)
x, y = rng.standard_normal((200, 5)), rng.integers(0, 3, 200)
model = Model((5,), 3, dtype=np.float64, seed=comm.rank)
"""

GO_ON = """
def begun(comm, model, **more):
    return bitring.Sandblaster(model, bitring.LBFGS(memory=3), comm=comm, portions=20, **more)
alone = begun(MPI.COMM_SELF, Model((5,), 3, dtype=np.float64))
wanted = [alone.step(x, y) for _ in range(12)]
end = alone.parameters()
alone.free()
job = begun(comm, model)
losses = []
for step in range(10):
    if deaths.get(comm.rank) == step:
        while job._service.held.era < [*deaths].index(comm.rank):
            time.sleep(1e-3)  # one after the other
        model.portions = 1
    losses.append(job.step(x, y))
if comm.rank in deaths:  # it was given no portion
    die()
job.synchronize()
bitring.save_checkpoint(path, job)
losses += [job.step(x, y) for _ in range(2)]
again = begun(job.comm, Model((5,), 3, dtype=np.float64))
bitring.load_checkpoint(path, again)
losses += [again.step(x, y) for _ in range(2)]
same = losses == wanted + wanted[10:]
for each in (job, again):
    same = same and all((w == end[name]).all() for name, w in each.parameters().items())
    same = same and each.evaluations == alone.evaluations
    each.free()
print(f"rank {comm.rank} of {job.comm.size}: {same}\\n", end="", flush=True)
"""

IN_A_CALL = """
job = bitring.Sandblaster(model, bitring.LBFGS(), comm=comm, portions=20)
job.step(x, y)
calls, service = job._calls, job._service
meet = calls._meet
def met(function, era):
    # All come to the call, and one of two hears of the death before it exchanges anything, or says that it has.
    if victim == comm.rank and era == 0:
        die()
    if comm.rank == slow and era == 0:
        while service.place is None or service.place[0] == 0:
            time.sleep(1e-3)
    there = meet(function, era)
    if before and victim == comm.rank:
        die()
    if before and comm.rank == slow:
        while service.place is None or service.place[0] == 0:
            time.sleep(1e-3)
    return there
calls._meet = met
bitring.save_checkpoint(path, job)
calls._meet = meet
again = bitring.Sandblaster(model, bitring.LBFGS(), comm=job.comm, portions=20)
bitring.load_checkpoint(path, again)
same = job.step(x, y) == again.step(x, y)
again.free()
job.free()
kept = open(f"{path}-{comm.rank}", "w")
kept.write(f"rank {comm.rank}: {same}")  # and not closed
"""

DIES = """
job = bitring.Sandblaster(model, bitring.LBFGS(), comm=comm, portions=20, survives=False)
job.step(x, y)
job.synchronize()
if last:
    model.portions = 0
losses = []
try:
    while True:
        losses.append(job.step(x, y))
except bitring.DeadRankError as error:
    print(f"rank {comm.rank}: {error.ranks}", flush=True)
    kept = abs(model.loss(x, y) - losses[-1]) < 1e-12 if losses else True
    rest = MPI.Intracomm(comm.Create_group(comm.group.Excl(error.ranks)))
    again = bitring.Sandblaster(model, bitring.LBFGS(), comm=rest, portions=20)
    more = [again.step(x, y) for _ in range(3)]
    falls = all(b < a for a, b in zip([*losses, *more], [*losses, *more][1:]))
    print(f"rank {comm.rank} of {rest.size}: {kept} {falls}", flush=True)
    again.free()
os._exit(0)
"""

ENDS = """
job = bitring.Sandblaster(model, bitring.LBFGS(), comm=comm, portions=20)
job.step(x, y)
if last:
    sys.exit(0)
losses = [job.step(x, y) for _ in range(5)]
print(f"rank {comm.rank}: {losses == sorted(losses, reverse=True)}", flush=True)
try:
    job.parameters()
except RuntimeError as error:
    print(f"rank {comm.rank}: {error}", flush=True)
"""


@pytest.mark.parametrize("deaths", [{2: 4}, {0: 3, 2: 6}], ids=["the last", "the first, then another"])
def test_a_death_changes_no_bit_for_the_others(on_survivors, tmp_path: Path, deaths: dict[int, int]):
    """Nor in a checkpoint of those that are left. In the middle of a step, if a rank comes in time for a portion."""
    done = on_survivors(f"{START}\ndeaths, path = {deaths}, {str(tmp_path / 'job.npz')!r}\n{GO_ON}")
    assert done.returncode == 3, done.stdout + done.stderr
    for rank in {0, 1, 2} - set(deaths):
        assert f"rank {rank} of {3 - len(deaths)}: True" in done.stdout, done.stdout + done.stderr
    gone = "rank 2 is" if len(deaths) == 1 else "ranks [0, 2] are"
    assert f"Sandblaster: {gone} gone; {3 - len(deaths)} of 3 ranks go on, with step" in done.stderr


def test_the_kept_deaths():
    kept = json.loads((ROOT / "benchmarks" / "results" / "sandblaster-deaths.json").read_text())["trials"]
    assert len(kept) == 100
    assert [each for each in kept if each["wrong"]] == []
    took = [each["seconds_to_go_on"] for each in kept if each["seconds_to_go_on"] is not None]
    page = " ".join((ROOT / "docs" / "sandblaster.md").read_text().split())
    assert f"{statistics.median(took):.2f} s after the last death in the median, {max(took):.2f} s at most" in page
    assert f"In {sum(each['lost'] for each in kept)} trials the two had a shard and its copy" in page


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("victim", "slow"), [(2, 1), (0, 1)])
def test_a_call_of_all_ends_on_all_when_a_rank_dies_in_it(on_survivors, tmp_path: Path, before, victim, slow):
    """Before what it exchanges, or after it; what the ranks do then they do to the end."""
    path = tmp_path / "job.npz"
    done = on_survivors(f"{START}\nvictim, slow, before, path = {victim}, {slow}, {before}, {str(path)!r}\n{IN_A_CALL}")
    for rank in {0, 1, 2} - {victim}:
        kept = Path(f"{path}-{rank}")
        assert kept.exists() and kept.read_text() == f"rank {rank}: True", done.stdout + done.stderr
    assert "Abort" not in done.stderr


def test_without_copies_a_death_is_named_and_the_others_begin_anew_where_they_were(on_survivors):
    done = on_survivors(START + DIES)
    for rank in (0, 1):  # their lines may be mixed
        assert f"rank {rank}: (2,)" in done.stdout, done.stdout + done.stderr
        assert f"rank {rank} of 2: True True" in done.stdout, done.stdout + done.stderr


def test_a_rank_that_ends_serves_its_shard_until_all_have(on_ranks, tmp_path: Path):
    done = on_ranks(3, "-c", START + ENDS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert f"rank {rank}: True" in done.stdout
        wanted = f"rank {rank}: Sandblaster.parameters: ranks [2] have freed it, or have ended"
        assert wanted in done.stdout, done.stdout + done.stderr
