"""A recorded run, made again: the same bits, whatever the ranks' speed."""

import time
from typing import Any

import numpy as np
import pytest

import bitring
from bitring import PeerError
from bitring.training.store.replay import Record, Replay, recorded
from bitring.training.store.rule import Apply, Claim, Defer, Drop, Rule, Serve, Settle, Terms


def trained(comm: Any, mode: str, compression: Any, steps: int, slow: int) -> tuple[bytes, list[int]]:
    w = {"w": np.ones((50, 20), np.float32), "b": np.zeros(5)}
    claims = []
    trainer = bitring.DataParallel(w, bitring.SGD(lr=0.05, momentum=0.5), comm=comm, mode=mode, compression=compression)
    for step in range(steps):
        claims.append(trainer.claim((1, 2)))
        rng = np.random.default_rng((comm.rank, step))
        if comm.rank == slow:
            time.sleep(0.002)
        trainer.step({n: (x - rng.standard_normal(x.shape)).astype(x.dtype) for n, x in w.items()})
    trainer.synchronize()
    trainer.free()
    return b"".join(x.tobytes() for x in w.values()), claims


@pytest.mark.parametrize("mode", ["ssp:staleness=2", "ssp:staleness=1,fetch=3", "soft_sync", "backup_workers:gather=2"])
@pytest.mark.parametrize("compression", [None, "onebit"])
def test_the_recorded_order_gives_the_same_bits(comm, agree, mpi_tmp_path, mode, compression):
    path = mpi_tmp_path / "run"
    text = mode + ("," if ":" in mode else ":")
    first = trained(comm, f"{text}record={path}", compression, 8, slow=0)
    again = trained(comm, f"{text}replay={path}", compression, 8, slow=comm.size - 1)
    agree(comm, first == again)


def test_what_is_no_record_of_it_is_said_on_all_ranks(comm, agree, mpi_tmp_path):
    path = mpi_tmp_path / "run"
    trained(comm, f"asynchronous:record={path}", None, 2, slow=0)
    for mode, text in (
        (f"ssp:replay={path}", "replay: "),
        (f"asynchronous:replay={path}x", "No such file"),
        (f"asynchronous:record={path}x/none", "No such file"),
    ):
        error: Any = None
        try:
            trained(comm, mode, None, 2, slow=0)
        except (OSError, ValueError, PeerError) as problem:
            error = problem
        agree(comm, error is not None and text in str(error), repr(error))


@pytest.mark.single
def test_a_replay_does_each_thing_when_its_turn_has_come(tmp_path):
    done: list[Any] = [
        Serve(1, 1),
        Apply(((1, 0),), (1.0,), (0,)),
        Claim(0, 5, 0),
        Apply(((0, 0), (1, 1)), (0.5, 0.25), (1, 0)),
        Drop(0, 1),
        Settle((0, 1)),
    ]
    record = Record(str(tmp_path / "run"), 0, {"ranks": 2})
    for action in (*done, Defer(0, 1, (1,))):
        record.write(action)
    record.close()
    kept = list(recorded(str(tmp_path / "run"), 0, {"ranks": 2}))
    assert kept == done
    replay = Replay(Terms(), 2, [0, 0], iter(kept))
    assert isinstance(replay, Rule)
    assert replay.read(0, 1) == [Defer(0, 1, (1,))]  # the record has no read of rank 0 by now
    assert replay.push(1, 0) == []
    assert replay.read(1, 9) == [Serve(1, 9), done[1]]
    assert replay.push(0, 0) == []
    assert replay.push(1, 1) == []
    assert replay.claim(0, 7, (3.0,)) == [Claim(0, 7, 0), done[3]]
    assert replay.push(0, 1) == [done[4]]
    assert replay.rest(0) == []
    assert replay.rest(1) == [done[5]]
    with pytest.raises(RuntimeError, match="replay: ranks do more than in the run that was recorded"):
        replay.push(0, 2)
    with pytest.raises(ValueError, match="is of a run with ranks=2; got 3"):
        recorded(str(tmp_path / "run"), 0, {"ranks": 3})
